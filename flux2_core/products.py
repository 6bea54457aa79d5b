"""Products of quantised weights, and the passes around them, each in one read and one write where
something faster than plain PyTorch serves: norm, modulation and activation, straight to codes where
a layer takes codes.

A layer that takes them has a `format`, `takes_codes(x)` and `from_codes(made, x)`. Every case that the
fused passes do not cover is computed as the stock blocks do, bit for bit.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .formats import Packed
from .kernels.attention import differentiated
from .kernels.reference import E4M3
from .kernels.table import serves
from .layers import Modulation, swiglu

FP8, INT8 = "float8_e4m3fn", "int8_tensorwise"
BLOCKS = ("mxfp8", "nvfp4")
CODED = (FP8, *BLOCKS)  # formats that activations are given in too
NATIVE = (*CODED, INT8)  # formats that some card multiplies without decoding

Made = tuple[Tensor, ...]  # codes, scales; for formats with blocks also a scale for the whole


def native(packed: Packed, x: Tensor) -> bool:
    """True where something faster than plain PyTorch multiplies this format with activations of its
    own kind, or where the user has named what is to do it."""
    form, (n, k) = packed.format, packed.shape
    if form == FP8:
        scale = packed.parts.get("weight_scale")
        widths = (n, k, 1 if scale is None else scale.numel())
        return serves("fp8_linear", x.device, (E4M3, E4M3, x.dtype), widths)
    if form == "mxfp8":
        return serves("mxfp8_linear", x.device, (E4M3, x.dtype), (n, k))
    if form == "nvfp4":
        scales = packed.parts["weight_scale_2"].numel()
        return serves("nvfp4_linear", x.device, (torch.uint8, x.dtype), (n, k, scales))
    scales = packed.parts["weight_scale"].numel()
    return serves("int8_linear", x.device, (x.dtype, torch.int8), (n, k, scales))


def product(x: Tensor, packed: Packed, coded: bool) -> Tensor:
    """x (..., K) by a matrix (N, K) -> (..., N): `coded`, both in the matrix's format; else decoded.
    e4m3 codes are multiplied by bfloat16 as they are, and scaled after."""
    rows, weight = x.reshape(-1, x.shape[-1]), packed.parts["weight"]
    if not coded:
        if packed.format != FP8 or x.dtype != torch.bfloat16:
            return F.linear(x, packed.decode(x.dtype))
        return _shaped(kernels.fp8_weight_linear(rows, weight, _scale(packed)), x)
    if packed.format == INT8:
        return _shaped(kernels.int8_linear(rows, weight, packed.parts["weight_scale"].float()), x)
    if packed.format == FP8:
        return from_codes(kernels.quantize_rows(rows), packed, x)
    return from_codes(kernels.quantize_blocks(rows, packed.format, _whole(packed, x)), packed, x)


def from_codes(made: Made, packed: Packed, x: Tensor) -> Tensor:
    """The product for activations that are codes already; shape and dtype follow x."""
    weight, scale = packed.parts["weight"], packed.parts.get("weight_scale")
    if packed.format == FP8:
        out = kernels.fp8_linear(*made, weight, _scale(packed), x.dtype)
    elif packed.format == "mxfp8":
        out = kernels.mxfp8_linear(*made[:2], weight, scale, x.dtype)
    else:
        whole = packed.parts["weight_scale_2"].float()
        out = kernels.nvfp4_linear(*made, weight, scale, whole, x.dtype)
    return _shaped(out, x)


def _scale(packed: Packed) -> Tensor:
    """An fp8 file's scale as the operations take it."""
    scale = packed.parts.get("weight_scale")
    if scale is None:
        return torch.ones((), device=packed.parts["weight"].device)
    return scale.float().reshape(() if scale.numel() == 1 else (-1, 1))


def _whole(packed: Packed, x: Tensor) -> Tensor | None:
    """The scale of all activations that an NVFP4 file was calibrated with."""
    scale = packed.parts.get("input_scale") if packed.format == "nvfp4" else None
    return None if scale is None else scale.to(x.device)


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


# --------------------------------------------------------------------------------- fused passes


class Codes(NamedTuple):
    """Activations as codes (B L, h) with their scales; `like` has their shape and dtype."""

    made: Made
    like: Tensor


def applied(layer: Any, x: Tensor | Codes) -> Tensor:
    """layer(x), whichever x is."""
    return layer.from_codes(*x) if isinstance(x, Codes) else layer(x)


def modulated(layer: Any, mod: Modulation, x: Tensor) -> Tensor | Codes:
    """(1 + scale) LayerNorm(x) + shift, as `layer` takes it."""
    if not _plain(mod, x):
        return mod.modulate(x)
    if not takes_codes(layer, x):
        one = _one_pass("modulate", x.shape[-1:], x, mod.shift)
        return kernels.modulate(x, mod.shift, mod.scale) if one else mod.modulate(x)
    if layer.format == FP8:
        return Codes(kernels.modulate_quantize(x, mod.shift, mod.scale), x)
    how = (layer.format, _whole(layer.packed, x))
    return Codes(kernels.modulate_quantize_blocks(x, mod.shift, mod.scale, *how), x)


def added(
    layer: Any, first: Modulation, second: Modulation, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor | Codes]:
    """x' = x + gate y by the first set -> x', and `modulated` of it by the second."""
    plain, coded = _plain(first, x) and _plain(second, x), takes_codes(layer, x)
    sides = first.gate, second.shift, second.scale
    if plain and coded and layer.format == FP8:
        x, codes, scale = kernels.gated_modulate_quantize(x, y, *sides)
        return x, Codes((codes, scale), x)
    if plain and not coded and _one_pass("gated_modulate", x.shape[-1:], x, y, second.shift):
        return kernels.gated_modulate(x, y, *sides)
    x = gated(first, x, y)
    return x, modulated(layer, second, x)


def gated(mod: Modulation, x: Tensor, y: Tensor) -> Tensor:
    """x + gate y."""
    one = _plain(mod, x) and _one_pass("gated_add", x.shape[-1:], x, y)
    return kernels.gated_add(x, y, mod.gate) if one else mod.add(x, y)


def activated(layer: Any, hidden: Tensor, attention: Tensor | None = None) -> Tensor:
    """layer([attention, SwiGLU(hidden)]); hidden (B, L, 2n), attention (B, L, m) or none."""
    coded = takes_codes(layer, hidden)
    widths = hidden.shape[-1] // 2, 0 if attention is None else attention.shape[-1]
    beside = hidden if attention is None else attention
    if not coded and not _one_pass("swiglu", widths, hidden, beside):
        if attention is None:
            return layer(swiglu(hidden))
        return layer(torch.cat((attention, swiglu(hidden)), -1))
    rows, beside = hidden.flatten(0, 1), None if attention is None else attention.flatten(0, 1)
    if not coded:
        return layer(_shaped(kernels.swiglu(rows, beside), hidden))
    if layer.format == FP8:
        return layer.from_codes(kernels.swiglu_quantize(rows, beside), hidden)
    how = (layer.format, _whole(layer.packed, hidden))
    return layer.from_codes(kernels.swiglu_quantize_blocks(rows, beside, *how), hidden)


def takes_codes(layer: Any, x: Tensor) -> bool:
    asked = getattr(layer, "takes_codes", None)
    return asked is not None and asked(x)


def _one_pass(op: str, widths: tuple[int, ...], x: Tensor, *others: Tensor) -> bool:
    """True where a kernel serves a pass between numbers. torch.compile fuses such passes itself, and
    gradients need PyTorch's own."""
    if torch.compiler.is_compiling() or differentiated(x, *others):
        return False
    return serves(op, x.device, tuple(t.dtype for t in (x, *others)), widths)


def _plain(mod: Modulation, x: Tensor) -> bool:
    """One set for all rows, one for each picture."""
    return mod.tail is None and mod.shift.shape[0] == x.shape[0]
