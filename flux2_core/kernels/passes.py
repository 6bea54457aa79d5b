"""Passes of the transformer that give numbers, not codes: norm and modulation, gate and residual,
SwiGLU, each in one read and one write. Definitions as in `reference`, rounded once to the dtype.
"""

import torch
from torch import Tensor

from . import reference
from .ops import _fit, _modulation_fits, _swiglu_fits, define, fp8_linear
from .table import operation, register

BF16 = torch.bfloat16
H, INNER, ROWS = 6144, 18432, 4608  # of FLUX.2 dev, one megapixel
SCHEMAS = {
    "modulate": "(Tensor x, Tensor shift, Tensor scale) -> Tensor",
    "gated_modulate": "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale)"
    " -> (Tensor, Tensor)",
    "gated_add": "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    "swiglu": "(Tensor mlp, Tensor? attention=None) -> Tensor",
}
MODULATE = operation("modulate", (BF16, BF16), (H,), ROWS)  # h
GATED_MODULATE = operation("gated_modulate", (BF16, BF16, BF16), (H,), ROWS)  # h
GATED_ADD = operation("gated_add", (BF16, BF16), (H,), ROWS)  # h
SWIGLU = operation("swiglu", (BF16, BF16), (INNER, H), ROWS)  # n, m


# --------------------------------------------------------------------------------- definitions


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, h), shift and scale (B, 1, h) -> LayerNorm(x) (1 + scale) + shift in x's dtype."""
    return reference.modulated(x, shift, scale).to(x.dtype)


def gated_modulate_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """-> x + gate y, and `modulate` of that."""
    x = reference.gated(x, y, gate)
    return x, modulate_reference(x, shift, scale)


def swiglu_reference(mlp: Tensor, attention: Tensor | None = None) -> Tensor:
    """mlp (R, 2n), attention (R, m) or none -> [attention, silu(first n) * second n], (R, m + n)."""
    return reference.activated(mlp, attention).to(mlp.dtype)


register("modulate", "reference", 0, modulate_reference)
register("gated_modulate", "reference", 0, gated_modulate_reference)
register("gated_add", "reference", 0, reference.gated)
register("swiglu", "reference", 0, swiglu_reference)


# ------------------------------------------------------------------------------ as PyTorch sees them


def _modulate(x, shift, scale):
    _fit(_modulation_fits(x, shift, scale), MODULATE, x, shift, scale)
    rows, h = x.shape[0] * x.shape[1], x.shape[2]
    return MODULATE(x.device, (x.dtype, shift.dtype), (h,), rows, x, shift, scale)


def _fake_modulate(x, shift, scale):
    _fit(_modulation_fits(x, shift, scale), MODULATE, x, shift, scale)
    return x.new_empty(x.shape)


def _gated_modulate(x, y, gate, shift, scale):
    ok = _modulation_fits(x, gate, shift, scale) and y.shape == x.shape
    _fit(ok, GATED_MODULATE, x, y, gate, shift, scale)
    rows, h, dtypes = x.shape[0] * x.shape[1], x.shape[2], (x.dtype, y.dtype, shift.dtype)
    return GATED_MODULATE(x.device, dtypes, (h,), rows, x, y, gate, shift, scale)


def _fake_gated_modulate(x, y, gate, shift, scale):
    ok = _modulation_fits(x, gate, shift, scale) and y.shape == x.shape
    _fit(ok, GATED_MODULATE, x, y, gate, shift, scale)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _gated_add(x, y, gate):
    _fit(_modulation_fits(x, gate) and y.shape == x.shape, GATED_ADD, x, y, gate)
    rows, h = x.shape[0] * x.shape[1], x.shape[2]
    return GATED_ADD(x.device, (x.dtype, y.dtype), (h,), rows, x, y, gate)


def _fake_gated_add(x, y, gate):
    _fit(_modulation_fits(x, gate) and y.shape == x.shape, GATED_ADD, x, y, gate)
    return x.new_empty(x.shape)


def _swiglu(mlp, attention=None):
    _fit(_swiglu_fits(mlp, attention), SWIGLU, mlp, attention)
    rows, width = mlp.shape
    m, dtype = (0, mlp.dtype) if attention is None else (attention.shape[1], attention.dtype)
    return SWIGLU(mlp.device, (mlp.dtype, dtype), (width // 2, m), rows, mlp, attention)


def _fake_swiglu(mlp, attention=None):
    _fit(_swiglu_fits(mlp, attention), SWIGLU, mlp, attention)
    m = 0 if attention is None else attention.shape[1]
    return mlp.new_empty((mlp.shape[0], mlp.shape[1] // 2 + m))


_made = define(SCHEMAS, globals(), fp8_linear.namespace)
modulate = _made["modulate"]
gated_modulate = _made["gated_modulate"]
gated_add = _made["gated_add"]
swiglu = _made["swiglu"]
