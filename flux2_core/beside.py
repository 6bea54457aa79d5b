"""Changes of a layer that lie beside it: y += strength * B (A x), whatever its weight is stored in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 64  # columns of low-rank factors that a product takes along in its own pass


class Branch:
    """One change beside its layer: low rank where it is a product, else the whole matrix. `delta` is
    a `lora.Delta`.

    `weight` gives the layer's whole weight, which DoRA needs; `width` is the model's.
    """

    def __init__(self, delta: Any, weight: Callable[[], Tensor], width: int):
        self.rows = delta.span(width)
        factors = delta.factors
        if factors is None:
            factors = (delta.matrix(weight()[self.rows] if "dora" in delta.parts else None),)
        self.factors: tuple[Tensor, ...] = factors

    def __call__(self, x: Tensor, out: Tensor, strength: float) -> Tensor:
        if not strength:
            return out
        y = x
        for factor in self.factors:
            y = F.linear(y, factor.to(x))
        if self.rows == slice(None):
            return out + strength * y
        out = out.clone()
        out[..., self.rows] += strength * y
        return out


@dataclass(eq=False)
class Change:
    """A branch at a strength, (x, y) -> y with the change."""

    branch: Branch
    strength: float

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        return self.branch(x, out, self.strength)

    @property
    def rank(self) -> int | None:
        """Of a product that changes all rows; None for any other change."""
        if len(self.branch.factors) != 2 or self.branch.rows != slice(None):
            return None
        return self.branch.factors[0].shape[0]


def are_low_rank(changes: Sequence[Any]) -> bool:
    """True where `low_rank` holds all of them."""
    ranks = [getattr(change, "rank", None) for change in changes]
    return None not in ranks and sum(rank or 0 for rank in ranks) <= MOST


def low_rank(changes: Sequence[Change], x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """x (R, K) -> low (R, r) and up (N, r), in x's dtype: the changes together are low @ up'."""
    on = [change for change in changes if change.strength]
    if not on:
        return None, None
    down = [change.branch.factors[0].to(x) for change in on]
    up = [change.strength * change.branch.factors[1].to(x) for change in on]
    return F.linear(x, torch.cat(down)), torch.cat(up, 1)
