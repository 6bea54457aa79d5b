"""The small parts: norms, modulation, SwiGLU, timestep embedding.

Module names are the BFL checkpoint's. Every weighted layer is built from the `ops` passed in
(torch.nn, or a host's own classes of the same names) and is called, never read: hosts move, cast
and patch weights inside the layer's own forward.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def linear(ops, inputs: int, outputs: int, **kw):
    return ops.Linear(inputs, outputs, bias=False, **kw)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis, no affine, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def swiglu(x: Tensor) -> Tensor:
    """(..., 2n) -> (..., n): silu(first half) * second half. The activated half comes first."""
    a, b = x.chunk(2, -1)
    y = F.silu(a)
    return y * b if y.requires_grad else y.mul_(b)


def own_rows(x: Tensor) -> Tensor:
    """x (B, L, h), a slice of some rows, laid out as if it were a tensor of its own.

    PyTorch takes a linear layer on a mere slice for a batched product and copies the weight first:
    half again the time. For B = 1 this copies nothing.
    """
    return x.flatten(0, 1).unflatten(0, x.shape[:2])


def sinusoid(t: Tensor, dim: int = 256) -> Tensor:
    """(B,) in [0, 1] -> float32 (B, dim) = [cos, sin] of 1000 t 10000^(-i / (dim / 2))."""
    half = dim // 2
    frequency = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = 1000.0 * t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


class MLPEmbedder(nn.Module):
    """(B, 256) -> (B, h): out_layer(silu(in_layer(x)))."""

    def __init__(self, hidden: int, ops=nn, **kw):
        super().__init__()
        self.in_layer = linear(ops, 256, hidden, **kw)
        self.out_layer = linear(ops, hidden, hidden, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class QKNorm(nn.Module):
    """RMSNorm over the head dim, one for queries and one for keys.

    The norms are `ops.RMSNorm`, whose parameter is called weight; checkpoints say `.scale`. The
    hooks translate, so state dicts read and write the checkpoint's names and accept both.
    """

    def __init__(self, dim: int, ops=nn, **kw):
        super().__init__()
        self.query_norm = ops.RMSNorm(dim, eps=EPS, **kw)
        self.key_norm = ops.RMSNorm(dim, eps=EPS, **kw)
        self.register_state_dict_post_hook(_weight_to_scale)
        self.register_load_state_dict_pre_hook(_scale_to_weight)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def _rename(state: dict, prefix: str, old: str, new: str) -> None:
    for norm in ("query_norm", "key_norm"):
        if (key := f"{prefix}{norm}.{old}") in state:
            state[f"{prefix}{norm}.{new}"] = state.pop(key)


def _weight_to_scale(module, state, prefix, metadata) -> None:
    _rename(state, prefix, "weight", "scale")


def _scale_to_weight(module, state, prefix, *_) -> None:
    _rename(state, prefix, "scale", "weight")


class Modulation(NamedTuple):
    """shift, scale, gate, each (B, 1, h), for all rows; `tail` holds another set for the last
    `tail_rows` rows (references that stand at t = 0)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    tail: "Modulation | None" = None
    tail_rows: int = 0

    def modulate(self, x: Tensor) -> Tensor:
        """(1 + scale) * LayerNorm(x) + shift."""
        n = layer_norm(x)
        if self.tail is None:
            return torch.addcmul(self.shift, n, 1 + self.scale)
        head, tail = self._split(n)
        t = self.tail
        return torch.cat(
            (
                torch.addcmul(self.shift, head, 1 + self.scale),
                torch.addcmul(t.shift, tail, 1 + t.scale),
            ),
            1,
        )

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + gate * y."""
        if self.tail is None:
            return torch.addcmul(x, self.gate, y)
        (x0, x1), (y0, y1) = self._split(x), self._split(y)
        return torch.cat(
            (torch.addcmul(x0, self.gate, y0), torch.addcmul(x1, self.tail.gate, y1)), 1
        )

    def head(self) -> "Modulation":
        """The set of the rows before the tail."""
        return Modulation(self.shift, self.scale, self.gate)

    def _split(self, x: Tensor):
        return x.split((x.shape[1] - self.tail_rows, self.tail_rows), 1)


class ModulationLayer(nn.Module):
    """vec (B, h) -> `sets` Modulations: lin(silu(vec)) cut into shift, scale, gate per set."""

    def __init__(self, hidden: int, sets: int, ops=nn, **kw):
        super().__init__()
        self.sets = sets
        self.lin = linear(ops, hidden, 3 * sets * hidden, **kw)

    def forward(
        self, vec: Tensor, tail: Tensor | None = None, tail_rows: int = 0
    ) -> tuple[Modulation, ...]:
        parts = self._parts(vec)
        if tail is None:
            return tuple(Modulation(*part) for part in parts)
        return tuple(
            Modulation(*part, tail=Modulation(*other), tail_rows=tail_rows)
            for part, other in zip(parts, self._parts(tail), strict=True)
        )

    def _parts(self, vec: Tensor):
        chunks = self.lin(F.silu(vec))[:, None].chunk(3 * self.sets, -1)
        return [chunks[i : i + 3] for i in range(0, len(chunks), 3)]
