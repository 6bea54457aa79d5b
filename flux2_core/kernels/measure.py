"""How `tune` runs its candidates on a card: random operands, each result held to the next best's,
the time the median of runs that find nothing of their operands in the card's cache.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..errors import Flux2Error
from . import decode, gemm, replicated, scaled
from .reference import E4M3_MAX, quantize_rows
from .tiles import Tile
from .tune import Shape

RUNS, WARM_UP = 20, 3
RANK = 16  # of the LoRA that the fused product is measured with
FLUSH = 256 << 20  # bytes, more than any card's cache
# Two results rounded to bfloat16 differ by 2.4e-3, Hopper's fast sums by up to 4e-3 more.
TOLERANCE = 8e-3


class Bench:
    """`bench(op, shape, accumulate, tile)` -> seconds, as `tune.tune` asks for them."""

    def __init__(self, device: torch.device, seconds: Callable[[Callable], float] | None = None):
        self.device, self.seconds = device, seconds or on_card(device)
        self.kind: tuple | None = None
        self.operands: tuple[Any, ...] = ()
        self.wanted: Tensor | None = None

    def __call__(self, op: str, shape: Shape, accumulate: str, tile: Tile | None) -> float:
        depth = tile.k if tile and op.endswith("narrow") else 64
        if self.kind != (op, shape, depth):
            self.kind, self.operands = (op, shape, depth), self.made(op, shape, depth)
            self.wanted = self.next_best(op)()
        if not accumulate:
            return self.seconds(self.next_best(op))
        call = self.ours(op, accumulate, tile)
        error = _relative(call(), self.wanted)
        if not error <= TOLERANCE:
            raise Flux2Error(f"The result is off by {error:.2g}, {TOLERANCE:g} is allowed")
        return self.seconds(call)

    def made(self, op: str, shape: Shape, depth: int) -> tuple[Tensor, ...]:
        """codes and scale, or x; then the weight's codes and scale."""
        x = torch.randn(shape.rows, shape.depth, device=self.device, dtype=torch.bfloat16)
        weight, weight_scale = quantize_rows(
            torch.randn(shape.columns, shape.depth, device=self.device, dtype=torch.bfloat16)
        )
        if op == "fp8_weight_linear":
            return x, weight, weight_scale
        top = E4M3_MAX
        if op.endswith("narrow"):
            gemm.rebase(weight)
            weight_scale, top = weight_scale * gemm.REBASE, gemm.ACTIVATION_MAX[depth]
        codes, scale = quantize_rows(x, top)
        sizes: list[tuple[int, ...]] = []
        if "fused" in op or "lora" in op:
            sizes = [(shape.rows, shape.columns), (shape.columns,)]
        if "lora" in op:
            sizes += [(shape.rows, RANK), (shape.columns, RANK)]
        parts = [torch.randn(s, device=self.device, dtype=torch.bfloat16) for s in sizes]
        return codes, scale, weight, weight_scale, *parts

    def next_best(self, op: str) -> Callable[[], Tensor]:
        if op == "fp8_weight_linear":
            decoded = self.operands[0].is_cuda
            product = decode.weight_linear if decoded else scaled.decoded_weight_linear
            return lambda: product(*self.operands)
        if len(self.operands) > 4:
            return lambda: _steps(*self.operands)
        return lambda: scaled.scaled_mm(*self.operands)

    def ours(self, op: str, accumulate: str, tile: Tile | None) -> Callable[[], Tensor]:
        if tile is None:
            return lambda: replicated.fp8_linear(*self.operands)
        if op == "fp8_weight_linear":
            return lambda: gemm.weight_only(*self.operands, tile=tile)
        product, parts = self.operands[:4], gemm.Epilogue(*self.operands[4:])
        return lambda: gemm.fp8(*product, tile=tile, accumulate=accumulate, epilogue=parts)


def _steps(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor,
    residual: Tensor, gate: Tensor, low: Tensor | None = None, up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The library's product, and what is added in passes of its own."""
    y = scaled.scaled_mm(codes, scale, weight, weight_scale)
    if low is not None and up is not None:
        y = y.addmm_(low, up.T)
    return torch.addcmul(residual, gate, y)


def on_card(device: torch.device) -> Callable[[Callable], float]:
    """-> a timer of what a call launches on a card."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def seconds(call: Callable) -> float:
        for _ in range(WARM_UP):
            call()
        spans = []
        for _ in range(RUNS):
            flush.zero_()
            span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            span[0].record()
            call()
            span[1].record()
            spans.append(span)
        torch.cuda.synchronize(device)
        return median(begun.elapsed_time(ended) for begun, ended in spans) / 1000

    return seconds


def _relative(y: Tensor, wanted: Tensor | None) -> float:
    assert wanted is not None
    return ((y.float() - wanted.float()).norm() / wanted.float().norm()).item()
