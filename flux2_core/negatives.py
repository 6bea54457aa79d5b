"""A negative prompt without a second pass: normalised attention guidance.

The negative text is one more segment of the same sequence. It sees itself, the picture and the
references, and nobody sees it, but for the picture's rows, whose attention is taken twice: once with
the prompt, once with the negative in its place. What both share (picture, references) is computed once
and merged by its log-sum-exp. So distilled models, which have no guidance, can be steered away from
something for little more than the negative's words.

Source: Chen et al. 2025, Normalized Attention Guidance, arXiv 2505.21179.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import Group, Kernel, Part, Table, attend_group, joined, merge, merged
from .errors import Flux2Error


@dataclass(frozen=True, eq=False)
class Negative:
    """`context` (B or 1, T, ctx), as long as the prompt's. z = z+ + (scale - 1)(z+ - z-), its L1 norm
    held to `tau` times that of z+, and `alpha` of it blended with z+. `scale` 1 or `alpha` 0 is stock.
    """

    context: Tensor
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25

    @property
    def active(self) -> bool:
        return self.scale != 1 and self.alpha > 0


def guide(positive: Tensor, negative: Tensor, how: Negative) -> Tensor:
    """Attention with the prompt and with the negative, (B, L, C) each -> what goes on."""
    z, other = positive.float(), negative.float()
    away = z + (how.scale - 1) * (z - other)
    grown = away.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    away = away * (how.tau / grown).clamp(max=1)
    return torch.lerp(z, away, how.alpha).to(positive.dtype)


@dataclass(frozen=True, eq=False)
class Both:
    """Where things stand in a forward with a negative: key rows of the two texts, and the picture's
    rows among the queries of a whole block (the last block has them alone)."""

    text: slice
    other: slice
    picture: slice
    how: Negative

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, table: Table, kernel: Kernel) -> Tensor:
        """q (B, H, Q, D), k and v (B, H, K, D) -> (B, Q, H * D)."""
        length = self.picture.stop - self.picture.start
        picture = slice(0, length) if q.shape[2] == length else self.picture
        outs = []
        for group in table.groups:
            for part, inside in _cut(group, picture):
                outs.append(
                    self.twice(q[:, :, part.rows], k, v, part.parts, kernel)
                    if inside
                    else attend_group(q[:, :, part.rows], k, v, part.parts, kernel)
                )
        return torch.cat(outs, 1)

    def twice(self, q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], kernel: Kernel):
        """The picture's rows: what they share once, each text beside it."""
        shared, weight = [], None
        for part in parts:
            spans = [span for span in part.keys if span.start >= self.text.stop]
            if len(spans) < len(part.keys) or part.keys[0].start < self.text.stop:
                weight = part.weight
                spans = [slice(max(s.start, self.text.stop), s.stop) for s in part.keys]
                spans = [s for s in spans if s.start < s.stop]
            if spans:
                shared.append(Part(tuple(spans), part.weight))
        if weight is None:  # a region that does not listen to the main prompt
            return attend_group(q, k, v, parts, kernel)
        rest = merged(q, k, v, shared)
        both = [merge(rest, merged(q, k, v, [Part((s,), weight)])) for s in (self.text, self.other)]
        plus, minus = (joined(out.to(q.dtype)) for out, _ in both)
        return guide(plus, minus, self.how)


def _cut(group: Group, picture: slice) -> list[tuple[Group, bool]]:
    """A group's rows before, in and after the picture; weights of single rows never cross its edge."""
    start, stop = group.rows.start, group.rows.stop
    inside = slice(max(start, picture.start), min(stop, picture.stop))
    if inside.start >= inside.stop:
        return [(group, False)]
    pieces = [
        (slice(start, inside.start), False),
        (inside, True),
        (slice(inside.stop, stop), False),
    ]
    return [(replace(group, rows=r), within) for r, within in pieces if r.start < r.stop]


def check(negative: Negative, context: Tensor) -> None:
    """Raise unless the negative has the prompt's length and width."""
    if negative.context.shape[1:] != context.shape[1:]:
        raise Flux2Error(
            "The negative prompt does not go with the prompt",
            f"{tuple(negative.context.shape[1:])} beside {tuple(context.shape[1:])}",
            "Make both with the same text encoder",
        )
