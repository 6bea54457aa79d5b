"""Products of quantised weights, and the passes around them, each in one read and one write where
something faster than plain PyTorch serves: norm, modulation and activation, straight to codes where
a layer takes codes.

A layer that takes them has a `format`, `takes_codes(x)` and `from_codes(made, x, ...)`. Every case that the
fused passes do not cover is computed as the stock blocks do, bit for bit. Where `kernels.tune` found our
own product worth it, gate, residual and LoRAs are added in its pass, and codes are so small that sums fit
into float16 (`form`).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, narrow
from .beside import are_low_rank, low_rank
from .formats import Packed
from .kernels import choice
from .kernels.choice import PLAIN, Form
from .kernels.reference import E4M3
from .kernels.table import differentiated, serves
from .kernels.tiles import FEW_ROWS
from .layers import Modulation, swiglu

FP8, INT8 = "float8_e4m3fn", "int8_tensorwise"
BLOCKS = ("mxfp8", "nvfp4")
CODED = (FP8, *BLOCKS)  # formats that activations are given in too
NATIVE = (*CODED, INT8)  # formats that some card multiplies without decoding

Made = tuple[Tensor, ...]  # codes, scales; for formats with blocks also a scale for the whole


def native(packed: Packed, x: Tensor) -> bool:
    """True where something faster than plain PyTorch multiplies this format with activations of its
    own kind, or where the user has named what is to do it. Gradients need PyTorch's own."""
    if differentiated(x):
        return False
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


def form(layer: Any, x: Tensor, add: bool = False, low: bool = False) -> Form:
    """How a layer that multiplies codes does it best for x (B, L, K) or (..., K); `add`: gate and
    residual follow, one gate for each of B pictures; `low`: a LoRA too. May re-base the layer."""
    if layer.format != FP8:
        return PLAIN
    rows = x.shape[:-1].numel() // (x.shape[0] if add else 1)
    size = (FEW_ROWS if rows <= FEW_ROWS else FEW_ROWS + 1, layer.shape[0], layer.shape[1])
    best = choice.form(x.device, *size, add, low, True)
    if best.narrow and not narrow.ready(layer, x):
        return choice.form(x.device, *size, add, low, False)
    return best


def product(x: Tensor, packed: Packed, how: Form | None) -> Tensor:
    """x (..., K) by a matrix (N, K) -> (..., N): both in the matrix's format, or decoded for None.
    How e4m3 codes meet bfloat16 is `kernels.fp8_weight_linear`'s affair."""
    rows, weight = x.reshape(-1, x.shape[-1]), packed.parts["weight"]
    if how is None:
        if packed.format != FP8 or not _by_codes(packed, x):
            return F.linear(x, packed.decode(x.dtype))
        return _shaped(kernels.fp8_weight_linear(rows, weight, _scale(packed)), x)
    if packed.format == INT8:
        return _shaped(kernels.int8_linear(rows, weight, packed.parts["weight_scale"].float()), x)
    if packed.format == FP8:
        return from_codes(kernels.quantize_rows(rows, how.maximum), packed, x, how.narrow)
    return from_codes(kernels.quantize_blocks(rows, packed.format, _whole(packed, x)), packed, x)


def _by_codes(packed: Packed, x: Tensor) -> bool:
    """True where fp8 weights are multiplied from their codes: always in bfloat16, else where a kernel
    decodes them faster than PyTorch, to the same numbers. Never where gradients are wanted."""
    if differentiated(x):
        return False
    if x.dtype == torch.bfloat16:
        return True
    widths = (*packed.shape, _scale(packed).numel())
    return serves("fp8_weight_linear", x.device, (x.dtype, E4M3), widths)


class After(NamedTuple):
    """What one pass makes of a product: residual (M, N) + gate (B, N) * (product + low @ up')."""

    residual: Tensor
    gate: Tensor
    low: Tensor | None = None
    up: Tensor | None = None


def from_codes(
    made: Made, packed: Packed, x: Tensor, small: bool = False, after: After | None = None
) -> Tensor:
    """The product for activations that are codes already; shape and dtype follow x. `small`: codes
    and weight are such that sums fit into float16."""
    weight, scale = packed.parts["weight"], packed.parts.get("weight_scale")
    if small or after is not None:
        args = (*made, weight, _scale(packed), *(after or (None,) * 4))
        out = kernels.fp8_linear_fused(*args, small, x.dtype)
    elif packed.format == FP8:
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
    """Activations as codes (B L, h) with their scales; `like` has their shape and dtype. `small` as
    in `from_codes`."""

    made: Made
    like: Tensor
    small: bool = False


def applied(layer: Any, x: Tensor | Codes) -> Tensor:
    """layer(x), whichever x is."""
    return layer.from_codes(*x) if isinstance(x, Codes) else layer(x)


def modulated(layer: Any, mod: Modulation, x: Tensor) -> Tensor | Codes:
    """(1 + scale) LayerNorm(x) + shift, as `layer` takes it."""
    if not _plain(mod, x):
        return mod.modulate(x)
    if not takes_codes(layer, x, mod.shift):
        one = _fused("modulate", x.shape[-1:], x, mod.shift)
        return kernels.modulate(x, mod.shift, mod.scale) if one else mod.modulate(x)
    if layer.format == FP8:
        best = form(layer, x)
        made = kernels.modulate_quantize(x, mod.shift, mod.scale, best.maximum)
        return Codes(made, x, best.narrow)
    how = (layer.format, _whole(layer.held, x))
    return Codes(kernels.modulate_quantize_blocks(x, mod.shift, mod.scale, *how), x)


def added(
    layer: Any, first: Modulation, second: Modulation, x: Tensor, before: Any, y: Tensor
) -> tuple[Tensor, Tensor | Codes]:
    """x' = x + gate before(y) by the first set -> x', and `modulated` of it for `layer` by the
    second."""
    best = _one_pass(before, first, x, y)
    if best is not None:
        x = _after(before, best, first, x, y)
        return x, modulated(layer, second, x)
    y = before(y)
    plain, coded = _plain(first, x) and _plain(second, x), takes_codes(layer, x, y, second.shift)
    sides = first.gate, second.shift, second.scale
    if plain and coded and layer.format == FP8:
        best = form(layer, x)
        x, *made = kernels.gated_modulate_quantize(x, y, *sides, best.maximum)
        return x, Codes(tuple(made), x, best.narrow)
    if plain and not coded and _fused("gated_modulate", x.shape[-1:], x, y, second.shift):
        return kernels.gated_modulate(x, y, *sides)
    x = gated(first, x, y)
    return x, modulated(layer, second, x)


def gated(mod: Modulation, x: Tensor, y: Tensor) -> Tensor:
    """x + gate y."""
    one = _plain(mod, x) and _fused("gated_add", x.shape[-1:], x, y)
    return kernels.gated_add(x, y, mod.gate) if one else mod.add(x, y)


def activated(layer: Any, hidden: Tensor, attention: Tensor | None = None) -> Tensor:
    """layer([attention, SwiGLU(hidden)]); hidden (B, L, 2n), attention (B, L, m) or none."""
    if not takes_codes(layer, hidden, *(() if attention is None else (attention,))):
        return layer(_numbers(hidden, attention))
    rows, beside = hidden.flatten(0, 1), None if attention is None else attention.flatten(0, 1)
    if layer.format == FP8:
        best = form(layer, hidden)
        made = kernels.swiglu_quantize(rows, beside, best.maximum)
        return layer.from_codes(made, hidden, best.narrow)
    how = (layer.format, _whole(layer.held, hidden))
    return layer.from_codes(kernels.swiglu_quantize_blocks(rows, beside, *how), hidden)


def finished(
    layer: Any, mod: Modulation, x: Tensor, hidden: Tensor, attention: Tensor | None = None
) -> Tensor:
    """x + gate `activated`(layer, hidden, attention)."""
    best = _one_pass(layer, mod, x, hidden)
    if best is None:
        return gated(mod, x, activated(layer, hidden, attention))
    if layer.branches:
        return _after(layer, best, mod, x, _numbers(hidden, attention))
    beside = None if attention is None else attention.flatten(0, 1)
    made = kernels.swiglu_quantize(hidden.flatten(0, 1), beside, best.maximum)
    return layer.from_codes(made, x, best.narrow, After(x.flatten(0, 1), mod.gate[:, 0]))


def _numbers(hidden: Tensor, attention: Tensor | None) -> Tensor:
    """[attention, SwiGLU(hidden)]."""
    beside = hidden if attention is None else attention
    widths = hidden.shape[-1] // 2, 0 if attention is None else attention.shape[-1]
    if _fused("swiglu", widths, hidden, beside):
        rows = None if attention is None else attention.flatten(0, 1)
        return _shaped(kernels.swiglu(hidden.flatten(0, 1), rows), hidden)
    y = swiglu(hidden)
    return y if attention is None else torch.cat((attention, y), -1)


def _one_pass(layer: Any, mod: Modulation, x: Tensor, y: Tensor) -> Form | None:
    """How x + gate layer(y) is computed in one pass, with the layer's LoRAs; None where it is not."""
    if getattr(layer, "format", None) != FP8 or not _plain(mod, x) or x.dtype != y.dtype:
        return None
    watched = layer._forward_hooks or layer._forward_pre_hooks or differentiated(x, y, mod.gate)
    if watched or not layer.is_native(y) or not are_low_rank(layer.branches):
        return None
    low = any(change.strength for change in layer.branches)
    best = form(layer, y, True, low)
    return best if best.fused else None


def _after(layer: Any, best: Form, mod: Modulation, x: Tensor, y: Tensor) -> Tensor:
    """x + gate layer(y) in one pass."""
    rows = y.flatten(0, 1)
    more = low_rank(layer.branches, rows)
    made = kernels.quantize_rows(rows, best.maximum)
    after = After(x.flatten(0, 1), mod.gate[:, 0], *more)
    return layer.from_codes(made, x, best.narrow, after)


def takes_codes(layer: Any, x: Tensor, *others: Tensor) -> bool:
    """True where a layer takes what is made of these as codes."""
    asked = getattr(layer, "takes_codes", None)
    return asked is not None and asked(x) and not differentiated(*others)


def _fused(op: str, widths: tuple[int, ...], x: Tensor, *others: Tensor) -> bool:
    """True where a kernel serves a pass between numbers. torch.compile fuses such passes itself, and
    gradients need PyTorch's own."""
    if torch.compiler.is_compiling() or differentiated(x, *others):
        return False
    return serves(op, x.device, tuple(t.dtype for t in (x, *others)), widths)


def _plain(mod: Modulation, x: Tensor) -> bool:
    """One set for all rows, one for each picture."""
    return mod.tail is None and mod.shift.shape[0] == x.shape[0]
