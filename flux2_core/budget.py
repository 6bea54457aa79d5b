"""Fitting references to a budget of tokens, and putting them in another order.

Nothing is shrunk without a sentence that says so, and nothing is ever enlarged.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from . import references as rules
from .errors import Flux2Error
from .references import LEAST_SIDE, Fit, Reference, label, plan


def tokens_of(reference: Reference, fit: Fit) -> int:
    """Tokens of the sequence that a reference takes: the patches that its mask leaves, none at
    strength 0."""
    if reference.strength == 0:
        return 0
    kept = None if reference.mask is None else rules.keep(reference, fit)
    return fit.tokens if kept is None else int(kept.sum())


def moments(references: Sequence[Reference]) -> list[tuple[int, ...]]:
    """Which references (counted from 0) act together, wherever in the run one comes in."""
    starts = sorted({r.start for r in references})
    return [tuple(i for i, r in enumerate(references) if r.start <= s < r.end) for s in starts]


def fullest(references: Sequence[Reference], counts: Sequence[int]) -> tuple[int, ...]:
    """Those of `counts` whose references act where most tokens are in the sequence at once."""
    chosen = max(moments(references), key=lambda m: sum(counts[i] for i in m), default=())
    return tuple(counts[i] for i in chosen)


def fit(
    references: Sequence[Reference], tokens: int, *, why: str = "", together: bool = False
) -> tuple[tuple[Reference, ...], list[str]]:
    """References with `megapixels` set so that at most `tokens` are in the sequence at once, and
    a sentence for each that is shrunk.

    Room is shared by importance: a reference of importance 2 may have twice the tokens of one of
    1. Nobody gets more than its own size; what one leaves goes to the others. Where all fit, the
    very same references come back. `why` takes the place of the number of tokens in the sentences.
    `together` counts all references at once, whatever their step ranges: a cache holds them all.
    Raises Flux2Error where the budget is too small for 64 pixels a side.
    """
    sizes = _Sizes(references)
    groups = [tuple(range(len(references)))] if together else moments(references)
    why = why or f"{tokens:,} tokens"

    def over(levels: list[float]) -> list[tuple[int, ...]]:
        counts = sizes.at(levels)[2]
        return [group for group in groups if sum(counts[i] for i in group) > tokens]

    _check(sizes.at([0.0] * len(references))[2], groups, tokens, why)
    levels, free = [math.inf] * len(references), set(range(len(references)))
    for _ in references:
        if not over(levels):
            break
        # One level for all that are still free, as high as the fullest group allows. Those in
        # that group stay there; the others may have more.
        low, high = 0.0, sizes.highest
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if over(_raised(levels, free, middle)) else (middle, high)
        full = {i for group in over(_raised(levels, free, high)) for i in group}
        levels = _raised(levels, free & full, low)
        free -= full
    fitted, fits, counts = sizes.at(levels)
    said = [
        f"{label(i, r)}: {_size(a)} -> {_size(b)}, {count:,} tokens, to stay within {why}."
        for i, (r, a, b, count) in enumerate(zip(references, sizes.own, fits, counts, strict=True))
        if a != b
    ]
    return fitted, said


def _raised(levels: list[float], free: set[int], level: float) -> list[float]:
    return [level if i in free else known for i, known in enumerate(levels)]


def _size(fit: Fit) -> str:
    return f"{fit.size[0]} x {fit.size[1]}"


class _Sizes:
    """Sizes of references as functions of a level: tokens for each unit of importance."""

    def __init__(self, references: Sequence[Reference]):
        self.references, self.own = tuple(references), plan(references)
        self.counts: dict[tuple, int] = {}
        self.areas = [f.scaled[0] * f.scaled[1] for f in self.own]
        self.least = [
            _least_area(r, f, area)
            for r, f, area in zip(references, self.own, self.areas, strict=True)
        ]
        own = [max(1, self.count(i, f)) for i, f in enumerate(self.own)]
        self.dense = [n / area for n, area in zip(own, self.areas, strict=True)]
        shares = [n / r.importance for n, r in zip(own, references, strict=True)]
        self.highest = 2 * max(shares, default=1)  # here every reference has its own size

    def at(self, levels: Sequence[float]) -> tuple[tuple[Reference, ...], tuple[Fit, ...], list]:
        """A level for each -> the references, their sizes, their tokens."""
        changed = []
        for i, reference in enumerate(self.references):
            area = max(self.least[i], levels[i] * reference.importance / self.dense[i])
            shrinks = area < self.areas[i]
            changed.append(replace(reference, megapixels=area / 1e6) if shrinks else reference)
        fits = plan(changed)
        for i, (now, own) in enumerate(zip(fits, self.own, strict=True)):
            changed[i] = self.references[i] if now.size == own.size else changed[i]
        fits = tuple(o if n.size == o.size else n for n, o in zip(fits, self.own, strict=True))
        return tuple(changed), fits, [self.count(i, f) for i, f in enumerate(fits)]

    def count(self, i: int, fit: Fit) -> int:
        key = (i, fit.scaled)
        if key not in self.counts:
            self.counts[key] = tokens_of(self.references[i], fit)
        return self.counts[key]


def _least_area(reference: Reference, fit: Fit, own: float) -> float:
    """Pixels at which the shorter side is just 64, or more where a mask would lose its last patch."""
    width, height = fit.seen
    area = LEAST_SIDE**2 * max(width, height) / min(width, height) * (1 + 1e-6)
    while reference.mask is not None and area < own:
        shrunk = replace(reference, megapixels=area / 1e6)
        try:
            tokens_of(shrunk, *plan([shrunk]))
            break
        except Flux2Error:
            area *= 1.3
    return area


def _check(least: Sequence[int], groups, tokens: int, why: str) -> None:
    needed = max((sum(least[i] for i in group) for group in groups), default=0)
    if needed > tokens:
        raise Flux2Error(
            f"The references do not fit into {why}",
            f"at {LEAST_SIDE} pixels a side they still take {needed:,} tokens, "
            f"{needed - tokens:,} too many",
            "Raise the budget, or remove references",
        )


def order(references: Sequence[Reference], text: str) -> tuple[Reference, ...]:
    """References in the order that `text` names them: numbers, names or both, with commas.

    "2, 1, 3" or "hero, 1". Empty text changes nothing. Raises Flux2Error unless every reference is
    named exactly once.
    """
    words = [word.strip() for word in text.split(",")]
    if not any(words):
        return tuple(references)
    numbers = {r.name.lower(): i for i, r in enumerate(references) if r.name}
    numbers |= {str(i + 1): i for i in range(len(references))}
    chosen = []
    for word in words:
        key = re.sub(r"^(@|image\s+)", "", word, flags=re.IGNORECASE).lower()
        if key not in numbers:
            known = ", ".join(r.name or str(i + 1) for i, r in enumerate(references)) or "none"
            raise Flux2Error(
                f"The order names '{word}', which is no reference"
                if word
                else "The order has a gap",
                f"'{text}'; the references are {known}",
                "Name each once, with commas between: 2, 1, 3",
            )
        chosen.append(numbers[key])
    twice = [label(i, references[i]) for i in sorted(set(chosen)) if chosen.count(i) > 1]
    missing = [label(i, r) for i, r in enumerate(references) if i not in chosen]
    if twice or missing:
        raise Flux2Error(
            "The order must name every reference exactly once",
            "; ".join(
                f"{what}: {', '.join(which)}"
                for what, which in (("named twice", twice), ("not named", missing))
                if which
            ),
            "Name each once, with commas between: 2, 1, 3",
        )
    return tuple(references[i] for i in chosen)
