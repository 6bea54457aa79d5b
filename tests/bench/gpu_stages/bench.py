"""What the stages share: sizes, a clock for GPUs, comparisons."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

import report

L2_FLUSH = 256 << 20  # bytes: several times the second-level cache of any card
HEAD_START = 2_000_000  # cycles for which the card waits, so that no launch is late


@dataclass(frozen=True)
class Model:
    """A released size: width, and how many blocks of each kind."""

    hidden: int
    double: int
    single: int
    context: int
    fused_over_bf16: tuple[float, ...] = ()  # what 0, 4 and 10 references ask for


@dataclass
class Bench:
    """One run: where, how large, and what is measured against what."""

    out: report.Report
    device: torch.device
    small: bool
    ends: float  # on time.monotonic()'s clock
    copy: float = 0.0  # bytes a second that a plain copy reads and writes

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def judged(self) -> bool:
        """Requirements are those of an H100 at full size."""
        capable = self.cuda and torch.cuda.get_device_capability(self.device) == (9, 0)
        return capable and not self.small

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    @property
    def models(self) -> dict[str, Model]:
        if self.small:
            return {"tiny": Model(256, 1, 2, 384, (0.0, 0.0))}
        return {
            "dev": Model(6144, 8, 48, 15360, (1.6, 1.35, 1.2)),
            "klein 9B": Model(4096, 8, 24, 12288, (1.6, 1.35, 1.2)),
            "klein 4B": Model(3072, 5, 20, 7680, (1.6, 1.35, 1.2)),
        }

    @property
    def references(self) -> tuple[int, ...]:
        return (0, 1) if self.small else (0, 4, 10)

    @property
    def text(self) -> int:
        return 16 if self.small else 512

    @property
    def side(self) -> int:
        """Of a picture of one megapixel, in latent pixels."""
        return 8 if self.small else 64

    def rows(self, references: int = 0) -> int:
        return self.text + self.side**2 * (1 + references)

    def bound(self, value: float) -> float | None:
        return value if self.judged else None

    def randn(self, *shape: int, dtype=torch.bfloat16, scale: float = 1.0, seed: int = 0) -> Tensor:
        made = torch.Generator(self.device).manual_seed(seed)
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return out.normal_(0, scale, generator=made)

    # -------------------------------------------------------------------------------------- timing

    def seconds(
        self, calls: Sequence[Callable], times: int = 20, warm: int = 3, row: int = 1
    ) -> float:
        """The median time of a call. `calls` do the same on inputs of their own, in turn; before each
        the cache is flushed, and the card waits until all is queued. Random inputs: zeros are faster.
        `row` calls are queued one after another and share the time: what a model pays for one, without
        the few microseconds that the clock itself takes."""
        return self.each({"": calls}, times, warm, row)[""]

    def each(
        self, calls: dict[str, Sequence[Callable]], times: int = 20, warm: int = 3, row: int = 1
    ) -> dict[str, float]:
        """The same for several, measured in turn: what a warm card loses, all lose."""
        if self.small:
            times, warm = 2, 1
        for some in calls.values():
            for i in range(warm):
                some[i % len(some)]()
        taken: dict[str, list] = {name: [] for name in calls}
        for i in range(times):
            for name, some in calls.items():
                taken[name].append(self._once([some[(i + j) % len(some)] for j in range(row)]))
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return {name: median(self._read(t) for t in some) / row for name, some in taken.items()}

    @staticmethod
    def _read(taken) -> float:
        return taken if isinstance(taken, float) else taken[0].elapsed_time(taken[1]) / 1e3

    def _once(self, calls: list[Callable]):
        if not self.cuda:
            begun = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - begun
        self._flush().zero_()
        torch.cuda._sleep(HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        return start, end

    def _flush(self) -> Tensor:
        if not hasattr(self, "_flushed"):
            self._flushed = torch.empty(L2_FLUSH, dtype=torch.uint8, device=self.device)
        return self._flushed


def error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, in float64."""
    wanted = wanted.double()
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def decibels(got: Tensor, wanted: Tensor) -> float:
    return -20 * torch.tensor(error(got, wanted), dtype=torch.float64).log10().item()


def differing(a: Tensor, b: Tensor) -> float:
    """The share of codes that are not the same."""
    same = a.cpu().view(torch.uint8) == b.cpu().view(torch.uint8)
    return 1 - same.double().mean().item()


def numbers(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale
