"""The operations as PyTorch sees them: `torch.ops.flux2_kit.*`, opaque to torch.compile, with what
they make of fake tensors. What each one means is said in `reference`, which implementation serves
it in `table`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import Flux2Error
from . import reference
from .reference import E4M3, E4M3_MAX
from .table import Op, operation, register

NAMESPACE = "flux2_kit"
BF16 = torch.bfloat16

SCHEMAS = {
    "quantize_rows": "(Tensor x, float maximum=448.0) -> (Tensor, Tensor)",
    "modulate_quantize": "(Tensor x, Tensor shift, Tensor scale, float maximum=448.0)"
    " -> (Tensor, Tensor)",
    "gated_modulate_quantize": "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale,"
    " float maximum=448.0) -> (Tensor, Tensor, Tensor)",
    "swiglu_quantize": "(Tensor mlp, Tensor? attention=None, float maximum=448.0)"
    " -> (Tensor, Tensor)",
    "qk_norm_rope": "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " Tensor? text=None, Tensor? text_q_weight=None, Tensor? text_k_weight=None)"
    " -> (Tensor, Tensor, Tensor)",
    "requantize": "(Tensor weight, Tensor scale, int seed) -> Tensor",
    "fp8_linear": "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale,"
    " ScalarType dtype=bfloat16) -> Tensor",
    "fp8_weight_linear": "(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor",
}

# Per operation: dtypes, widths and rows of a typical call (FLUX.2 dev, one megapixel), and what
# the widths are.
H, INNER = 6144, 18432
QUANTIZE_ROWS = operation("quantize_rows", (BF16,), (H,), 4608)  # K
MODULATE = operation("modulate_quantize", (BF16, BF16), (H,), 4608)  # h
GATED_MODULATE = operation("gated_modulate_quantize", (BF16, BF16, BF16), (H,), 4608)  # h
SWIGLU = operation("swiglu_quantize", (BF16, BF16), (INNER, H), 4608)  # n, m
QK_NORM_ROPE = operation("qk_norm_rope", (BF16, BF16), (48, 128), 4608)  # H, D
REQUANTIZE = operation("requantize", (BF16,), (H,), INNER)  # K
FP8_LINEAR = operation("fp8_linear", (E4M3, E4M3, BF16), (INNER, H, 1), 4608)  # N, K, scales
FP8_WEIGHT_LINEAR = operation(
    "fp8_weight_linear", (BF16, E4M3), (INNER, H, 1), 4608
)  # N, K, scales


def _fit(ok: bool, op: Op, *tensors: Tensor | None) -> None:
    if not ok:
        seen = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors if t is not None)
        raise Flux2Error(
            f"{op.name} was given tensors that do not fit together",
            seen.replace("torch.", ""),
            "This is a fault of the program that calls it: see flux2_core/kernels/reference.py",
        )


def _modulation_fits(x: Tensor, *parts: Tensor) -> bool:
    size = (x.shape[0], 1, x.shape[-1])
    return x.ndim == 3 and all(part.shape == size for part in parts)


def _scale_fits(scale: Tensor, rows: int) -> bool:
    return scale.numel() == 1 or (scale.shape[0] == rows and scale.numel() == rows)


# ----------------------------------------------------------------- each: what is called, what is fake


def _codes(x: Tensor, rows, columns) -> tuple[Tensor, Tensor]:
    return x.new_empty((rows, columns), dtype=E4M3), x.new_empty((rows, 1), dtype=torch.float32)


def _quantize_rows(x, maximum=E4M3_MAX):
    _fit(x.ndim == 2, QUANTIZE_ROWS, x)
    return QUANTIZE_ROWS(x.device, (x.dtype,), (x.shape[1],), x.shape[0], x, maximum)


def _fake_quantize_rows(x, maximum=E4M3_MAX):
    _fit(x.ndim == 2, QUANTIZE_ROWS, x)
    return _codes(x, *x.shape)


def _modulate_quantize(x, shift, scale, maximum=E4M3_MAX):
    _fit(_modulation_fits(x, shift, scale), MODULATE, x, shift, scale)
    b, rows, h = x.shape
    dtypes = (x.dtype, shift.dtype)
    return MODULATE(x.device, dtypes, (h,), b * rows, x, shift, scale, maximum)


def _fake_modulate_quantize(x, shift, scale, maximum=E4M3_MAX):
    _fit(_modulation_fits(x, shift, scale), MODULATE, x, shift, scale)
    return _codes(x, x.shape[0] * x.shape[1], x.shape[2])


def _gated_modulate_quantize(x, y, gate, shift, scale, maximum=E4M3_MAX):
    ok = _modulation_fits(x, gate, shift, scale) and y.shape == x.shape
    _fit(ok, GATED_MODULATE, x, y, gate, shift, scale)
    b, rows, h = x.shape
    dtypes = (x.dtype, y.dtype, shift.dtype)
    args = (x, y, gate, shift, scale, maximum)
    return GATED_MODULATE(x.device, dtypes, (h,), b * rows, *args)


def _fake_gated_modulate_quantize(x, y, gate, shift, scale, maximum=E4M3_MAX):
    ok = _modulation_fits(x, gate, shift, scale) and y.shape == x.shape
    _fit(ok, GATED_MODULATE, x, y, gate, shift, scale)
    return x.new_empty(x.shape), *_codes(x, x.shape[0] * x.shape[1], x.shape[2])


def _swiglu_fits(mlp: Tensor, attention: Tensor | None) -> bool:
    beside = attention is None or (attention.ndim == 2 and attention.shape[0] == mlp.shape[0])
    return beside and mlp.ndim == 2 and mlp.shape[1] % 2 == 0


def _swiglu_quantize(mlp, attention=None, maximum=E4M3_MAX):
    _fit(_swiglu_fits(mlp, attention), SWIGLU, mlp, attention)
    rows, width = mlp.shape
    m, dtype = (0, mlp.dtype) if attention is None else (attention.shape[1], attention.dtype)
    widths = (width // 2, m)
    return SWIGLU(mlp.device, (mlp.dtype, dtype), widths, rows, mlp, attention, maximum)


def _fake_swiglu_quantize(mlp, attention=None, maximum=E4M3_MAX):
    _fit(_swiglu_fits(mlp, attention), SWIGLU, mlp, attention)
    return _codes(
        mlp, mlp.shape[0], mlp.shape[1] // 2 + (0 if attention is None else attention.shape[1])
    )


def _heads_fit(qkv, q_weight, k_weight, cos, sin, text, text_q_weight, text_k_weight) -> bool:
    dim = q_weight.shape[0]
    rows = qkv.shape[1] + (0 if text is None else text.shape[1])
    ok = qkv.ndim == 3 and dim % 2 == 0 and qkv.shape[2] % (3 * dim) == 0
    ok = ok and q_weight.shape == k_weight.shape == (dim,)
    ok = ok and cos.shape == sin.shape == (rows, dim // 2)
    if text is None:
        return ok
    if text_q_weight is None or text_k_weight is None:
        return False
    ok = ok and text_q_weight.shape == text_k_weight.shape == (dim,)
    return ok and text.ndim == 3 and text.shape[::2] == qkv.shape[::2] and text.dtype == qkv.dtype


def _qk_norm_rope(
    qkv, q_weight, k_weight, cos, sin, text=None, text_q_weight=None, text_k_weight=None
):
    args = (qkv, q_weight, k_weight, cos, sin, text, text_q_weight, text_k_weight)
    _fit(_heads_fit(*args), QK_NORM_ROPE, *args)
    (b, _, width), (dim,), rows = qkv.shape, q_weight.shape, cos.shape[0]
    widths = (width // (3 * dim), dim)
    return QK_NORM_ROPE(qkv.device, (qkv.dtype, q_weight.dtype), widths, b * rows, *args)


def _fake_qk_norm_rope(
    qkv, q_weight, k_weight, cos, sin, text=None, text_q_weight=None, text_k_weight=None
):
    args = (qkv, q_weight, k_weight, cos, sin, text, text_q_weight, text_k_weight)
    _fit(_heads_fit(*args), QK_NORM_ROPE, *args)
    dim = q_weight.shape[0]
    size = (qkv.shape[0], cos.shape[0], qkv.shape[2] // (3 * dim), dim)
    q, k, v = (qkv.new_empty(size).transpose(1, 2) for _ in range(3))
    return q, k, v


def _requantize(weight, scale, seed):
    _fit(weight.ndim == 2 and _scale_fits(scale, weight.shape[0]), REQUANTIZE, weight, scale)
    rows, width = weight.shape
    return REQUANTIZE(weight.device, (weight.dtype,), (width,), rows, weight, scale, seed)


def _fake_requantize(weight, scale, seed):
    _fit(weight.ndim == 2 and _scale_fits(scale, weight.shape[0]), REQUANTIZE, weight, scale)
    return weight.new_empty(weight.shape, dtype=E4M3)


def _product_fits(x: Tensor, weight: Tensor, weight_scale: Tensor) -> bool:
    ok = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1] and weight.dtype == E4M3
    return ok and _scale_fits(weight_scale, weight.shape[0])


def _fp8_fits(codes, scale, weight, weight_scale) -> bool:
    ok = codes.dtype == E4M3 and scale.shape == (codes.shape[0], 1)
    return ok and _product_fits(codes, weight, weight_scale)


def _fp8_linear(codes, scale, weight, weight_scale, dtype=BF16):
    args = (codes, scale, weight, weight_scale)
    if not codes.shape[0]:  # not every library takes empty tensors: none is asked
        return _fake_fp8_linear(*args, dtype)
    _fit(_fp8_fits(*args), FP8_LINEAR, *args)
    widths = (*weight.shape, weight_scale.numel())
    dtypes = (codes.dtype, weight.dtype, dtype)
    return FP8_LINEAR(codes.device, dtypes, widths, codes.shape[0], *args, dtype)


def _fake_fp8_linear(codes, scale, weight, weight_scale, dtype=BF16):
    args = (codes, scale, weight, weight_scale)
    _fit(_fp8_fits(*args), FP8_LINEAR, *args)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


def _fp8_weight_linear(x, weight, weight_scale):
    if not x.shape[0]:
        return _fake_fp8_weight_linear(x, weight, weight_scale)
    _fit(_product_fits(x, weight, weight_scale), FP8_WEIGHT_LINEAR, x, weight, weight_scale)
    widths = (*weight.shape, weight_scale.numel())
    dtypes = (x.dtype, weight.dtype)
    return FP8_WEIGHT_LINEAR(x.device, dtypes, widths, x.shape[0], x, weight, weight_scale)


def _fake_fp8_weight_linear(x, weight, weight_scale):
    _fit(_product_fits(x, weight, weight_scale), FP8_WEIGHT_LINEAR, x, weight, weight_scale)
    return x.new_empty((x.shape[0], weight.shape[0]))


# -------------------------------------------------------------------------------------- registering


def _namespace(names: Sequence[str]) -> str:
    """A free name: two copies of the pack in one process keep tables of their own."""
    for copy in range(1, 100):
        space = NAMESPACE if copy == 1 else f"{NAMESPACE}_{copy}"
        if not any(hasattr(getattr(torch.ops, space), name) for name in names):
            return space
    raise ImportError(f"PyTorch's namespaces {NAMESPACE}, {NAMESPACE}_2, ... are all taken")


def define(
    schemas: Mapping[str, str], module: Mapping[str, Any], space: str
) -> dict[str, Callable[..., Any]]:
    """Operations of a module: _name is what is called, _fake_name what fake tensors get."""
    made = {}
    for name, schema in schemas.items():
        _library(space).define(name + schema)
        _library(space).impl(name, module[f"_{name}"], "CompositeExplicitAutograd")
        fake = module[f"_fake_{name}"]
        torch.library.register_fake(f"{space}::{name}", fake, lib=_library(space))
        made[name] = getattr(getattr(torch.ops, space), name).default
    return made


_libraries: dict[str, torch.library.Library] = {}  # they undo their work when they are dropped


def _library(space: str) -> torch.library.Library:
    if space not in _libraries:
        _libraries[space] = torch.library.Library(space, "FRAGMENT")
    return _libraries[space]


_made = define(SCHEMAS, globals(), _namespace(tuple(SCHEMAS)))
for _op in SCHEMAS:
    register(_op, "reference", 0, getattr(reference, _op))
quantize_rows = _made["quantize_rows"]
modulate_quantize = _made["modulate_quantize"]
gated_modulate_quantize = _made["gated_modulate_quantize"]
swiglu_quantize = _made["swiglu_quantize"]
qk_norm_rope = _made["qk_norm_rope"]
requantize = _made["requantize"]
fp8_linear = _made["fp8_linear"]
fp8_weight_linear = _made["fp8_weight_linear"]
