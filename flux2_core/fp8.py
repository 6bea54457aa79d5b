"""Products of fp8 weights, and the passes in front of them in one: norm, modulation or activation
straight to codes, where a layer takes codes.

A layer that takes them has `takes_codes(x)` and `from_codes(codes, scale, x)`. Every other layer, and
every case that the fused passes do not cover, is computed as the stock blocks do, bit for bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .kernels.reference import E4M3
from .kernels.table import serves
from .layers import Modulation, swiglu


def product(x: Tensor, weight: Tensor, scale: Tensor | None, fp8: bool) -> Tensor:
    """x (..., K), weight (N, K) codes with scale (N, 1), () or none -> (..., N): both in fp8, or the
    weight alone."""
    rows, scale = x.reshape(-1, x.shape[-1]), whole(scale, weight)
    if fp8:
        return _shaped(kernels.fp8_linear(*kernels.quantize_rows(rows), weight, scale, x.dtype), x)
    return _shaped(kernels.fp8_weight_linear(rows, weight, scale), x)


def from_codes(
    codes: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor | None, x: Tensor
) -> Tensor:
    """The product for activations that are codes already; shape and dtype follow x."""
    out = kernels.fp8_linear(codes, row_scale, weight, whole(scale, weight), x.dtype)
    return _shaped(out, x)


def whole(scale: Tensor | None, weight: Tensor) -> Tensor:
    """A file's scale as the operations take it."""
    if scale is None:
        return torch.ones((), device=weight.device)
    return scale.float().reshape(() if scale.numel() == 1 else (-1, 1))


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def native(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], scales: int) -> bool:
    """True where something faster than plain PyTorch multiplies fp8 with fp8, or where the user has
    named what is to do it."""
    return serves("fp8_linear", device, (E4M3, E4M3, dtype), (*shape, scales))


# --------------------------------------------------------------------------------- fused passes


def takes_codes(layer: Any, x: Tensor) -> bool:
    asked = getattr(layer, "takes_codes", None)
    return asked is not None and asked(x)


class Codes(NamedTuple):
    """Activations as codes (B L, h) with a scale for each row; `like` has their shape and dtype."""

    codes: Tensor
    scale: Tensor
    like: Tensor


def applied(layer: Any, x: "Tensor | Codes") -> Tensor:
    """layer(x), whichever x is."""
    return layer.from_codes(*x) if isinstance(x, Codes) else layer(x)


def modulated(layer: Any, mod: Modulation, x: Tensor) -> "Tensor | Codes":
    """(1 + scale) LayerNorm(x) + shift, as `layer` takes it."""
    if not _plain(mod, x) or not takes_codes(layer, x):
        return mod.modulate(x)
    codes, scale = kernels.modulate_quantize(x, mod.shift, mod.scale)
    return Codes(codes, scale, x)


def added(
    layer: Any, first: Modulation, second: Modulation, x: Tensor, y: Tensor
) -> "tuple[Tensor, Tensor | Codes]":
    """x' = x + gate y by the first set -> x', and `modulated` of it by the second."""
    if not (_plain(first, x) and _plain(second, x)) or not takes_codes(layer, x):
        x = first.add(x, y)
        return x, second.modulate(x)
    modulation = second.shift, second.scale
    x, codes, scale = kernels.gated_modulate_quantize(x, y, first.gate, *modulation)
    return x, Codes(codes, scale, x)


def activated(layer: Any, hidden: Tensor, attention: Tensor | None = None) -> Tensor:
    """layer([attention, SwiGLU(hidden)]); hidden (B, L, 2n), attention (B, L, m) or none."""
    if not takes_codes(layer, hidden):
        if attention is None:
            return layer(swiglu(hidden))
        return layer(torch.cat((attention, swiglu(hidden)), -1))
    beside = None if attention is None else attention.flatten(0, 1)
    return layer.from_codes(*kernels.swiglu_quantize(hidden.flatten(0, 1), beside), hidden)


def _plain(mod: Modulation, x: Tensor) -> bool:
    """One set for all rows, one for each picture."""
    return mod.tail is None and mod.shift.shape[0] == x.shape[0]
