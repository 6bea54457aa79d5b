"""Activations as codes with a scale for each block: MXFP8 and NVFP4, as `formats` stores weights.

"mxfp8": e4m3 codes (R, K), a power of two (e8m0) for each 32 numbers. "nvfp4": e2m1 codes, two to a
byte with the even element in the high half (R, K / 2), an e4m3 scale for each 16 numbers and one
float32 for all, `whole`. The scales of the blocks lie in the order of tensor cores
(`formats.swizzle`), padded with zeros. Definitions, the same in parts, and the operations; bit for
bit the same in every implementation. A block with NaN or infinity has NaN for its scale.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import E2M1_MAX, e2m1_encode, swizzle
from . import eager, ops, reference
from .ops import BF16, INNER, H
from .reference import E4M3, E4M3_MAX, E4M3_NAN
from .table import operation, register

E8M0_NAN = 255


class Form(NamedTuple):
    """Numbers to a block, numbers to an element of the codes, dtypes of codes and scales."""

    block: int
    width: int
    codes: torch.dtype
    scales: torch.dtype


FORMS = {"mxfp8": Form(32, 1, E4M3, torch.uint8), "nvfp4": Form(16, 2, torch.uint8, E4M3)}


# --------------------------------------------------------------------------------- definitions


def encode(x: Tensor, form: str, whole: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, K) float32 -> codes, scales as they lie in the matrix (R, K / block).

    mxfp8: the smallest power of two, from 2^-108 on, that keeps the block within 448; x over it,
    to nearest even. nvfp4: scale = e4m3(amax / (6 whole)), at most 448; step = scale whole, at
    least 1e-30; x * (1 / step), the quotient as IEEE says, to the nearest code.
    """
    blocks = x.unflatten(1, (-1, FORMS[form].block))
    amax = blocks.abs().amax(-1, keepdim=True)
    number = amax.isfinite() & whole.isfinite()
    if form == "mxfp8":
        bits = amax.where(number, 0).clamp_min(2.0**-100).view(torch.int32)
        exponent = ((bits + 0x1FFFFF) >> 23) - 8  # 448 = 1.75 * 2^8: what exceeds 1.75 carries
        factor = ((254 - exponent) << 23).view(torch.float32)
        codes = (blocks * factor).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8)
        codes = codes.masked_fill(~number, E4M3_NAN).flatten(1).view(E4M3)
        return codes, exponent.masked_fill(~number, E8M0_NAN)[..., 0].to(torch.uint8)
    scales = (amax.where(number, 0) / (E2M1_MAX * whole)).clamp_max(E4M3_MAX).to(E4M3)
    step = (scales.float() * whole).clamp_min(1e-30)
    codes = e2m1_encode((blocks * (torch.ones_like(step) / step)).where(number, 0).flatten(1))
    return codes, scales.view(torch.uint8).masked_fill(~number, E4M3_NAN)[..., 0].view(E4M3)


def from_rows(
    scales: Callable[[], Tensor], form: str, whole: Tensor | None, like: Tensor
) -> Tensor:
    """`whole` () float32: what is given, else the largest of the rows' fp8 scales over 6, for NVFP4;
    MXFP8 has none, and 1 stands in."""
    if form == "mxfp8":
        return torch.ones((), device=like.device)
    if whole is not None:
        return whole.float().reshape(()).clone()
    found = scales()
    if not found.numel():
        return torch.ones((), device=like.device)
    return found.amax() / torch.full((), E2M1_MAX, device=like.device)


def _coded(
    values: Callable[[int, int], Tensor], rows: int, n: int, form: str, whole: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """values(start, stop) -> float32 (stop - start, n), asked for `step` rows at a time."""
    block, width, kind, scale_kind = FORMS[form]
    device = whole.device
    codes = torch.empty((rows, n // width), dtype=kind, device=device)
    size = (-(-rows // 128) * 128, -(-n // block // 4) * 4)
    scales = torch.zeros(size, dtype=torch.uint8, device=device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        codes[start:stop], made = encode(values(start, stop), form, whole)
        tiles = swizzle(made.view(torch.uint8))
        scales[start : start + len(tiles)] = tiles
    return codes, scales.view(scale_kind)


def _step(n: int, device: torch.device) -> int:
    """Rows at a time, whole tiles of scales."""
    elements = eager.CPU_CHUNK if device.type == "cpu" else eager.CHUNK
    return max(1, elements // n // 128) * 128


def _quantize(x, form, whole=None, many=True):
    """`many`: some rows at a time; else all at once, which is the definition."""
    whole = from_rows(lambda: eager.quantize_rows(x)[1], form, whole, x)
    rows, n = x.shape
    step = _step(n, x.device) if many else max(rows, 1)
    return *_coded(lambda a, b: x[a:b].float(), rows, n, form, whole, step), whole


def _modulate(x, shift, scale, form, whole=None, many=True):
    whole = from_rows(lambda: eager.modulate_quantize(x, shift, scale)[1], form, whole, x)
    return *_modulated(x, shift, scale, form, whole, many), whole


def _swiglu(mlp, attention, form, whole=None, many=True):
    whole = from_rows(lambda: eager.swiglu_quantize(mlp, attention)[1], form, whole, mlp)
    rows, n = mlp.shape[0], mlp.shape[1] // 2
    n += 0 if attention is None else attention.shape[1]
    step = _step(n, mlp.device) if many else max(rows, 1)

    def values(a, b):
        return reference.activated(mlp[a:b], None if attention is None else attention[a:b])

    return *_coded(values, rows, n, form, whole, step), whole


def _modulated(x, shift, scale, form, whole, many: bool) -> tuple[Tensor, Tensor]:
    batch, rows, n = x.shape
    step = _step(n, x.device) if many else max(batch * rows, 1)

    def values(a, b):
        parts = []
        for i in range(a // rows, -(-b // rows)):
            part = slice(max(a - i * rows, 0), min(b - i * rows, rows))
            one = slice(i, i + 1)
            parts.append(reference.modulated(x[one, part], shift[one], scale[one])[0])
        return torch.cat(parts)

    return _coded(values, batch * rows, n, form, whole, step)


# ------------------------------------------------------------------------- as PyTorch sees them

# The last width is the size of a block.
QUANTIZE = operation("quantize_blocks", (BF16,), (H, 16), 4608)  # K
MODULATE = operation("modulate_quantize_blocks", (BF16, BF16), (H, 16), 4608)  # h
SWIGLU = operation("swiglu_quantize_blocks", (BF16, BF16), (INNER, H, 16), 4608)  # n, m


def _form_fits(form: str, *widths: int) -> bool:
    return form in FORMS and all(n % 32 == 0 for n in widths)


def _whole_fits(whole: Tensor | None) -> bool:
    return whole is None or whole.numel() == 1


def _quantize_fits(x, form, whole) -> None:
    ok = x.ndim == 2 and _form_fits(form, x.shape[1]) and _whole_fits(whole)
    ops._fit(ok, QUANTIZE, x, whole)


def _quantize_blocks(x, form, whole=None):
    _quantize_fits(x, form, whole)
    widths = (x.shape[1], FORMS[form].block)
    return QUANTIZE(x.device, (x.dtype,), widths, x.shape[0], x, form, whole)


def _fake_quantize_blocks(x, form, whole=None):
    _quantize_fits(x, form, whole)
    return _fake(x, x.shape[0], x.shape[1], form)


def _modulate_fits(x, shift, scale, form, whole) -> None:
    ok = ops._modulation_fits(x, shift, scale) and _form_fits(form, x.shape[2])
    ops._fit(ok and _whole_fits(whole), MODULATE, x, shift, scale, whole)


def _modulate_quantize_blocks(x, shift, scale, form, whole=None):
    _modulate_fits(x, shift, scale, form, whole)
    widths, rows = (x.shape[2], FORMS[form].block), x.shape[0] * x.shape[1]
    arguments = (x, shift, scale, form, whole)
    return MODULATE(x.device, (x.dtype, shift.dtype), widths, rows, *arguments)


def _fake_modulate_quantize_blocks(x, shift, scale, form, whole=None):
    _modulate_fits(x, shift, scale, form, whole)
    return _fake(x, x.shape[0] * x.shape[1], x.shape[2], form)


def _swiglu_fits(mlp, attention, form, whole) -> None:
    ok = ops._swiglu_fits(mlp, attention) and _form_fits(form, mlp.shape[1] // 2)
    ok = ok and _form_fits(form, 0 if attention is None else attention.shape[1])
    ops._fit(ok and _whole_fits(whole), SWIGLU, mlp, attention, whole)


def _swiglu_quantize_blocks(mlp, attention, form, whole=None):
    _swiglu_fits(mlp, attention, form, whole)
    m, dtype = (0, mlp.dtype) if attention is None else (attention.shape[1], attention.dtype)
    widths = (mlp.shape[1] // 2, m, FORMS[form].block)
    arguments = (mlp, attention, form, whole)
    return SWIGLU(mlp.device, (mlp.dtype, dtype), widths, mlp.shape[0], *arguments)


def _fake_swiglu_quantize_blocks(mlp, attention, form, whole=None):
    _swiglu_fits(mlp, attention, form, whole)
    m = 0 if attention is None else attention.shape[1]
    return _fake(mlp, mlp.shape[0], m + mlp.shape[1] // 2, form)


def _fake(x: Tensor, rows, n, form: str) -> tuple[Tensor, Tensor, Tensor]:
    block, width, kind, scale_kind = FORMS[form]
    size = ((rows + 127) // 128 * 128, (n // block + 3) // 4 * 4)
    return (
        x.new_empty((rows, n // width), dtype=kind),
        x.new_empty(size, dtype=scale_kind),
        x.new_empty((), dtype=torch.float32),
    )


_OUT = "str form, Tensor? whole=None) -> (Tensor, Tensor, Tensor)"
_SCHEMAS = {
    "quantize_blocks": f"(Tensor x, {_OUT}",
    "modulate_quantize_blocks": f"(Tensor x, Tensor shift, Tensor scale, {_OUT}",
    "swiglu_quantize_blocks": f"(Tensor mlp, Tensor? attention, {_OUT}",
}


_PLAIN = {
    "quantize_blocks": _quantize,
    "modulate_quantize_blocks": _modulate,
    "swiglu_quantize_blocks": _swiglu,
}


for _name, _plain in _PLAIN.items():
    register(_name, "reference", 0, partial(_plain, many=False))
    register(_name, "eager", eager.PRIORITY, _plain)

_made = ops.define(_SCHEMAS, globals(), ops.fp8_linear.namespace)
quantize_blocks, modulate_quantize_blocks, swiglu_quantize_blocks = (_made[n] for n in _SCHEMAS)
