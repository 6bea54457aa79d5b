"""From a packed qkv to what attention reads: heads, normalised and turned, in one pass where something
faster than PyTorch's own operations does it."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from . import kernels
from .kernels.table import differentiated, serves
from .layers import QKNorm
from .positions import rotate

Rope = tuple[Tensor, Tensor] | tuple[()]


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 h) with rows q | k | v, each head-major -> three (B, H, L, D)."""
    q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=heads)
    return q, k, v


def turned_heads(
    qkv: Tensor,
    norm: QKNorm,
    heads: int,
    rope: Rope,
    text: Tensor | None = None,
    text_norm: QKNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, L, 3 h) -> q, k, v (B, H, T + L, D), q and k normalised and turned by rope, two tables
    (T + L, D / 2); without tables they stay as they are. `text` (B, T, 3 h) comes first."""
    norms = (norm,) if text_norm is None else (norm, text_norm)
    if rope and _one_pass(qkv, norms, heads, rope):
        weights = [w for n in norms for w in (n.query_norm.weight, n.key_norm.weight)]
        more = () if text is None else (text, *weights[2:])
        return kernels.qk_norm_rope(qkv, *weights[:2], *rope, *more)
    q, k, v = _normal(qkv, norm, heads)
    if text is not None and text_norm is not None:
        before = _normal(text, text_norm, heads)
        q, k, v = (torch.cat(pair, 2) for pair in zip(before, (q, k, v), strict=True))
    k = rotate(k, *rope)  # one after the other: what is turned is let go
    q = rotate(q, *rope)
    return q, k, v


def _normal(qkv: Tensor, norm: QKNorm, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split_heads(qkv, heads)
    return *norm(q, k), v


def _one_pass(qkv: Tensor, norms: tuple[QKNorm, ...], heads: int, rope: Rope) -> bool:
    """True where a kernel serves, the table is one for all pictures, and the norms' weights are at
    hand: a host may have them elsewhere, or wish to change them."""
    layers: list[Any] = [layer for n in norms for layer in (n.query_norm, n.key_norm)]
    weights = [layer.weight for layer in layers]
    ready = all(
        w.device == qkv.device and w.dtype == weights[0].dtype and not _changed(layer)
        for w, layer in zip(weights, layers, strict=True)
    )
    if not ready or not rope or rope[0].ndim != 2 or differentiated(qkv, *weights):
        return False
    widths = (heads, qkv.shape[-1] // (3 * heads))
    return serves("qk_norm_rope", qkv.device, (qkv.dtype, weights[0].dtype), widths)


def _changed(layer: Any) -> bool:
    """True where a hook watches the layer, or a host patches its weight at use."""
    lazy = getattr(layer, "weight_lowvram_function", None) is not None
    asked = getattr(layer, "weight_function", ()) or layer._forward_hooks
    return bool(lazy or asked or layer._forward_pre_hooks)
