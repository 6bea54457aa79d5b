"""What the blocks made of the picture in earlier steps, used again while little has changed.

Neighbouring steps look at almost the same picture. The first double block always runs; what it adds
to the picture's rows tells how much has changed since all blocks ran last. While that is little, the
other blocks are left out, and what they added then is added again, carried on along the line through
the last two times. When all blocks run again, what would have been used is compared with the truth:
that is the measured error, and it costs next to nothing.

Idea: caching by the first block (ParaAttention) and by timestep (TeaCache, arXiv 2411.19108).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import Flux2Error
from .kv_cache import fingerprints


class Made(NamedTuple):
    """What a complete forward left behind, of the picture's rows (B, L, h)."""

    time: float
    first: Tensor  # what the first block added
    rest: Tensor  # what all other blocks added together


@dataclass
class _History:
    """Of one of the calls that a step consists of."""

    made: tuple[Made, ...]  # newest first, at most two
    step: int  # of its last call
    time: float
    reused: int = 0  # times in a row since the newest


@dataclass
class StepStatistics:
    """Of a run. computed, reused: forwards. steps: the numbers of the steps (from 0) in which some
    forward was reused, of `of`. error: each time that all blocks ran after reuse, the relative L1
    distance between what would have been used once more and the truth. saved: the share of the
    run's work in blocks that was left out."""

    computed: int = 0
    reused: int = 0
    steps: set[int] = field(default_factory=set)
    of: int = 0
    error: list[float] = field(default_factory=list)
    skipped_blocks: int = 0
    all_blocks: int = 0

    @property
    def saved(self) -> float:
        return self.skipped_blocks / max(1, self.all_blocks)


class StepCache:
    """One handle for a run, or for several one after the other.

    threshold: how far what the first block adds may lie from its expectation, as a share of it
    (relative L1, the largest of a batch's pictures), for the rest to be reused. 0 never reuses, and
    is stock bit for bit.
    start, end: the share of the run in which reuse is allowed: start <= step / steps < end. A run's
    first and last step always compute.
    most: how many times in a row a forward may be reused.

    The caller says where a run is (`step`, `steps`) and when another begins (`begin`). A forward
    whose settings, prompt, references or shapes differ from the last step's in one bit computes.
    """

    def __init__(
        self, threshold: float = 0.1, *, start: float = 0.0, end: float = 1.0, most: int = 3
    ):
        _check(0 <= threshold <= 1, "threshold", threshold, "Use a number from 0 (off) to 1")
        _check(0 <= start <= end <= 1, "window", (start, end), "Use 0 <= start <= end <= 1")
        _check(most >= 1, "number of steps in a row", most, "Use 1 or more")
        self.threshold, self.start, self.end, self.most = threshold, start, end, most
        self.run: Hashable = None
        self.weights: Hashable = None
        self.step, self.steps = 0, 0
        self.statistics = StepStatistics()
        self._histories: dict[Hashable, _History] = {}

    def __deepcopy__(self, memo) -> "StepCache":
        return self  # a handle: hosts copy the options it travels in

    def like(self) -> "StepCache":
        """An empty one with the same settings."""
        return StepCache(self.threshold, start=self.start, end=self.end, most=self.most)

    def begin(self, run: Hashable, weights: Hashable = None) -> None:
        """A run begins: nothing of another one is used. weights None: as set in `self.weights`."""
        self.run, self.step, self.steps = run, 0, 0
        if weights is not None:
            self.weights = weights
        self.statistics = StepStatistics()
        self.clear()

    def clear(self) -> None:
        """Give up what is remembered; the statistics stay."""
        self._histories.clear()

    @property
    def bytes(self) -> int:
        """Bytes held for all calls."""
        kept = [x for h in self._histories.values() for m in h.made for x in (m.first, m.rest)]
        return sum(x.numel() * x.element_size() for x in kept)

    def call(self, time: float, settings: Any, blocks: int) -> "Call | None":
        """One forward begins, at `time` (1 to 0), through `blocks` blocks. None where threshold 0
        switches all this off.

        settings: everything that must be as it was for reuse, in tuples, lists and dataclasses;
        tensors count by content.
        """
        if not self.threshold:
            return None
        tensors: list[Tensor] = []
        about = _without_tensors(settings, tensors)
        key = (self.weights, about, tuple(fingerprints(tensors)))
        self._histories = {
            k: h for k, h in self._histories.items() if self.step - 1 <= h.step <= self.step
        }
        self.statistics.of = self.steps
        return Call(self, key, time, blocks)

    def _may_reuse(self, history: _History, time: float) -> bool:
        inside = 0 < self.step < self.steps - 1
        inside = inside and self.start <= self.step / self.steps < self.end
        return inside and history.reused < self.most and time <= history.time


class Call:
    """One forward: told of the picture's rows after the first block, and after the last."""

    def __init__(self, cache: StepCache, key: Hashable, time: float, blocks: int):
        self._cache, self._key, self._time, self._blocks = cache, key, time, blocks
        self._history = cache._histories.get(key)
        self._first, self._after = torch.empty(0), torch.empty(0)

    def reuse(self, before: Tensor, after: Tensor, compute: bool = False) -> Tensor | None:
        """The picture's rows (B, L, h) before and after the first block -> what they would be after
        the last one, or None where the blocks must run. `compute` forbids reuse."""
        cache, history = self._cache, self._history
        # copies of their own: other packs may write into what a block returned
        self._first, self._after = after - before, after.clone()
        if history is not None and history.made[0].first.shape != after.shape:
            history = self._history = None
        if compute or history is None or not cache._may_reuse(history, self._time):
            return None
        expected = predict([(m.time, m.first) for m in history.made], self._time)
        if not distance(expected, self._first) < cache.threshold:
            return None
        history.step, history.time = cache.step, self._time
        history.reused += 1
        seen = cache.statistics
        seen.reused += 1
        seen.steps.add(cache.step)
        seen.skipped_blocks += self._blocks - 1
        seen.all_blocks += self._blocks
        return after + predict([(m.time, m.rest) for m in history.made], self._time)

    def computed(self, last: Tensor) -> None:
        """The picture's rows after the last block, where all of them ran."""
        cache, history, seen = self._cache, self._history, self._cache.statistics
        rest = last - self._after
        seen.computed += 1
        seen.all_blocks += self._blocks
        made = (Made(self._time, self._first, rest),)
        if history is not None:
            if history.reused:
                used = predict([(m.time, m.rest) for m in history.made], self._time)
                seen.error.append(distance(used, rest))
            if self._time < history.made[0].time:
                made = (*made, history.made[0])
        cache._histories[self._key] = _History(made, cache.step, self._time)


def predict(known: Sequence[tuple[float, Tensor]], time: float) -> Tensor:
    """The value at `time`: on the line through the two newest (time, value), newest first, or the
    newest where there is one."""
    if len(known) < 2:
        return known[0][1]
    (t1, x1), (t0, x0) = known[:2]
    return torch.lerp(x0, x1, (time - t0) / (t1 - t0))


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L1: |a - b| / |b| of each picture of (B, L, h), the largest of the batch."""
    if not a.numel():
        return 0.0
    apart, size = ((x.abs().sum((1, 2), dtype=torch.float32)) for x in (a - b, b))
    return float((apart / size.clamp_min(1e-30)).max())


def _without_tensors(settings: Any, taken: list[Tensor]) -> Hashable:
    """`settings` with its tensors taken out, in order: a tensor's own hash is its address."""
    if isinstance(settings, Tensor):
        taken.append(settings)
        return Tensor
    if is_dataclass(settings) and not isinstance(settings, type):
        parts = (getattr(settings, f.name) for f in fields(settings))
        return (type(settings), *(_without_tensors(part, taken) for part in parts))
    if isinstance(settings, tuple | list):
        return tuple(_without_tensors(part, taken) for part in settings)
    return settings


def _check(right: bool, name: str, seen: object, do: str) -> None:
    if not right:
        raise Flux2Error(f"The step cache cannot work with this {name}", repr(seen), do)
