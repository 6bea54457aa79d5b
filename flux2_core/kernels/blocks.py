"""Linears of block-scaled formats and INT8: through PyTorch's or comfy-kitchen's product where the
card has the instructions, decoded to bfloat16 elsewhere.

Codes and scales are those of `formats`: scales of blocks in the tensor cores' order (`swizzle`),
NVFP4 with the even element in the high half of a byte. The library counts halves the other way
round; as both factors do, the sum is over the same products.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Packed
from .ops import _fit, define, fp8_linear
from .scaled import padded
from .table import Case, operation, register

BF16 = torch.bfloat16
BLACKWELL = ("sm_100", "sm_103", "sm_120", "sm_121")

MXFP8 = operation("mxfp8_linear", (torch.float8_e4m3fn, BF16), (18432, 6144), 4608)  # N, K
NVFP4 = operation("nvfp4_linear", (torch.uint8, BF16), (18432, 6144, 1), 4608)  # N, K, scales
INT8 = operation("int8_linear", (BF16, torch.int8), (18432, 6144, 1), 4608)  # N, K, scales


# ------------------------------------------------------------------------------- definitions


def mxfp8_reference(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = BF16
) -> Tensor:
    """codes (M, K) and weight (N, K), e4m3, each with a power of two for 32 numbers -> (M, N)."""
    x, w = _mxfp8(codes, scale), _mxfp8(weight, weight_scale)
    return (x.decode() @ w.decode().T).to(dtype)


def nvfp4_reference(
    codes: Tensor,
    scale: Tensor,
    whole: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_whole: Tensor,
    dtype: torch.dtype = BF16,
) -> Tensor:
    """codes (M, K / 2) and weight (N, K / 2), e2m1, each with an e4m3 scale for 16 numbers and a
    float32 one for all, the weight's also for each row (N, 1) -> (M, N)."""
    x, w = _nvfp4(codes, scale, whole), _nvfp4(weight, weight_scale, weight_whole)
    return (x.decode() @ w.decode().T).to(dtype)


def int8_reference(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x (M, K), weight (N, K) int8 with scale (N, 1) or () -> (M, N) in x's dtype. Others may
    round x to int8, with a scale for each row."""
    y = x.float() @ weight.float().T
    return (y * weight_scale.float().reshape(1, -1)).to(x.dtype)


def _mxfp8(codes: Tensor, scale: Tensor) -> Packed:
    return Packed("mxfp8", (codes.shape[0], codes.shape[1]), _parts(codes, scale))


def _nvfp4(codes: Tensor, scale: Tensor, whole: Tensor) -> Packed:
    whole = whole if whole.numel() == 1 else whole.reshape(-1, 1)
    parts = _parts(codes, scale) | {"weight_scale_2": whole}
    return Packed("nvfp4", (codes.shape[0], codes.shape[1] * 2), parts)


def _parts(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The container of scales as a matrix of whole tiles: files also have it flat."""
    return {"weight": codes, "weight_scale": scale.reshape(-(-codes.shape[0] // 128) * 128, -1)}


# --------------------------------------------------------------------------------- eager


def mxfp8_eager(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = BF16
) -> Tensor:
    """Decoded to bfloat16: exact, for e4m3 times a power of two."""
    x, w = _mxfp8(codes, scale), _mxfp8(weight, weight_scale)
    return F.linear(x.decode(BF16), w.decode(BF16)).to(dtype)


def nvfp4_eager(
    codes: Tensor,
    scale: Tensor,
    whole: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_whole: Tensor,
    dtype: torch.dtype = BF16,
) -> Tensor:
    x, w = _nvfp4(codes, scale, whole), _nvfp4(weight, weight_scale, weight_whole)
    return F.linear(x.decode(BF16), w.decode(BF16)).to(dtype)


def int8_eager(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    packed = Packed("int8_tensorwise", shape, {"weight": weight, "weight_scale": weight_scale})
    return F.linear(x, packed.decode(x.dtype))


# ------------------------------------------------------------------------------- PyTorch's


def mxfp8_torch(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = BF16
) -> Tensor:
    recipe, order = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    y = F.scaled_mm(
        _rows(codes), weight.T, _e8m0(scale), recipe, _e8m0(weight_scale), recipe,
        order, order, output_dtype=dtype,
    )  # fmt: skip
    return y[: codes.shape[0]]


def nvfp4_torch(
    codes: Tensor,
    scale: Tensor,
    whole: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_whole: Tensor,
    dtype: torch.dtype = BF16,
) -> Tensor:
    """The product takes one scale for all; a weight's scales for each row come afterwards."""
    each = weight_whole.numel() > 1
    one = torch.ones_like(whole) if each else weight_whole.float().reshape(whole.shape)
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    y = F.scaled_mm(
        _e2m1(_rows(codes)), _e2m1(weight).T,
        [scale.flatten(), whole.float()], recipe, [weight_scale.flatten(), one], recipe,
        order, order, output_dtype=dtype,
    )[: codes.shape[0]]  # fmt: skip
    return (y * weight_whole.reshape(1, -1)).to(dtype) if each else y


def _rows(codes: Tensor) -> Tensor:
    """Rows in multiples of 16: their scales' container has room for 128 anyway."""
    return padded(codes, -codes.shape[0] % 16)


def _e8m0(scale: Tensor) -> Tensor:
    return scale.flatten().view(torch.float8_e8m0fnu)


def _e2m1(codes: Tensor) -> Tensor:
    return codes.view(torch.float4_e2m1fn_x2)


# -------------------------------------------------------------------------- comfy-kitchen's


@cache
def kitchen() -> ModuleType | None:
    try:
        import comfy_kitchen
    except Exception:  # built for another PyTorch or CUDA, it fails in ways of its own
        return None
    return comfy_kitchen


def mxfp8_kitchen(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = BF16
) -> Tensor:
    product = _kitchen("scaled_mm_mxfp8")
    containers = (_parts(codes, scale), _parts(weight, weight_scale))
    scales = (parts["weight_scale"].view(torch.float8_e8m0fnu) for parts in containers)
    return product(_rows(codes), weight, *scales, out_dtype=dtype)[: codes.shape[0]]


def nvfp4_kitchen(
    codes: Tensor,
    scale: Tensor,
    whole: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_whole: Tensor,
    dtype: torch.dtype = BF16,
) -> Tensor:
    each = weight_whole.numel() > 1
    one = torch.ones_like(whole) if each else weight_whole.float().reshape(whole.shape)
    scales = (p["weight_scale"] for p in (_parts(codes, scale), _parts(weight, weight_scale)))
    product = _kitchen("scaled_mm_nvfp4")
    y = product(_rows(codes), weight, whole.float(), one, *scales, out_dtype=dtype)
    y = y[: codes.shape[0]]
    return (y * weight_whole.reshape(1, -1)).to(dtype) if each else y


def int8_kitchen(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x rounded to int8, a scale for each row."""
    return _kitchen("int8_linear")(x, weight, weight_scale.float(), out_dtype=x.dtype)


def _kitchen(name: str) -> Callable[..., Tensor]:
    return getattr(kitchen(), name)


# ------------------------------------------------------------------------------ who serves what


def _refuses_torch(kind: str) -> Callable[[Case], str | None]:
    def refuses(case: Case) -> str | None:
        if case.arch not in BLACKWELL:
            return f"{case.arch} has no instructions for block scales"
        known = hasattr(F, "scaled_mm") and hasattr(getattr(F, "ScalingType", None), kind)
        return _shape(case) if known else f"this PyTorch has no scaled product with {kind}"

    return refuses


def _refuses_kitchen(name: str, arches: Callable[[str], bool]) -> Callable[[Case], str | None]:
    def refuses(case: Case) -> str | None:
        if not arches(case.arch):
            return f"{case.arch} has no instructions for it"
        if kitchen() is None:
            return "comfy-kitchen is not installed, or does not load"
        known = hasattr(kitchen(), name)
        return _shape(case) if known else f"this comfy-kitchen has no {name}"

    return refuses


def _shape(case: Case) -> str | None:
    columns, depth = case.widths[:2]
    return (
        None
        if columns % 16 == depth % 32 == 0
        else f"{columns} x {depth} is not in multiples of 16 x 32"
    )


def _blackwell(arch: str) -> bool:
    return arch in BLACKWELL


def _int8(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch[3:]) >= 75


register("mxfp8_linear", "reference", 0, mxfp8_reference)
register("mxfp8_linear", "eager", 10, mxfp8_eager)
register("mxfp8_linear", "torch", 40, mxfp8_torch, _refuses_torch("BlockWise1x32"))
register(
    "mxfp8_linear", "comfy-kitchen", 30, mxfp8_kitchen,
    _refuses_kitchen("scaled_mm_mxfp8", _blackwell),
)  # fmt: skip
register("nvfp4_linear", "reference", 0, nvfp4_reference)
register("nvfp4_linear", "eager", 10, nvfp4_eager)
register("nvfp4_linear", "torch", 40, nvfp4_torch, _refuses_torch("BlockWise1x16"))
register(
    "nvfp4_linear", "comfy-kitchen", 30, nvfp4_kitchen,
    _refuses_kitchen("scaled_mm_nvfp4", _blackwell),
)  # fmt: skip
register("int8_linear", "reference", 0, int8_reference)
register("int8_linear", "eager", 10, int8_eager)
register(
    "int8_linear", "comfy-kitchen", 30, int8_kitchen, _refuses_kitchen("int8_linear", _int8)
)  # fmt: skip


# ------------------------------------------------------------------------- as PyTorch sees them


def _scales_fit(scale: Tensor, codes: Tensor, block: int) -> bool:
    """A container of tiles of 128 x 4, for blocks of so many bytes."""
    rows, columns = codes.shape[0], codes.shape[1] // block
    return scale.numel() == -(-rows // 128) * 128 * (-(-columns // 4) * 4)


def _mxfp8_linear(codes, scale, weight, weight_scale, dtype=BF16):
    args = (codes, scale, weight, weight_scale)
    if not codes.shape[0]:
        return _fake_mxfp8_linear(*args, dtype)
    _mxfp8_fits(*args)
    return MXFP8(codes.device, (codes.dtype, dtype), weight.shape, codes.shape[0], *args, dtype)


def _fake_mxfp8_linear(codes, scale, weight, weight_scale, dtype=BF16):
    _mxfp8_fits(codes, scale, weight, weight_scale)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


def _mxfp8_fits(codes, scale, weight, weight_scale) -> None:
    ok = codes.ndim == weight.ndim == 2 and codes.shape[1] == weight.shape[1]
    ok = ok and _scales_fit(scale, codes, 32) and _scales_fit(weight_scale, weight, 32)
    _fit(ok and codes.shape[1] % 32 == 0, MXFP8, codes, scale, weight, weight_scale)


def _nvfp4_linear(codes, scale, whole, weight, weight_scale, weight_whole, dtype=BF16):
    args = (codes, scale, whole, weight, weight_scale, weight_whole)
    if not codes.shape[0]:
        return _fake_nvfp4_linear(*args, dtype)
    _nvfp4_fits(*args)
    widths = (weight.shape[0], weight.shape[1] * 2, weight_whole.numel())
    return NVFP4(codes.device, (codes.dtype, dtype), widths, codes.shape[0], *args, dtype)


def _fake_nvfp4_linear(codes, scale, whole, weight, weight_scale, weight_whole, dtype=BF16):
    _nvfp4_fits(codes, scale, whole, weight, weight_scale, weight_whole)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


def _nvfp4_fits(codes, scale, whole, weight, weight_scale, weight_whole) -> None:
    ok = codes.ndim == weight.ndim == 2 and codes.shape[1] == weight.shape[1]
    ok = ok and _scales_fit(scale, codes, 8) and _scales_fit(weight_scale, weight, 8)
    ok = ok and whole.numel() == 1 and weight_whole.numel() in (1, weight.shape[0])
    ok = ok and codes.shape[1] % 8 == 0 and codes.dtype == weight.dtype == torch.uint8
    _fit(ok, NVFP4, codes, scale, whole, weight, weight_scale, weight_whole)


def _int8_linear(x, weight, weight_scale):
    if not x.shape[0]:
        return _fake_int8_linear(x, weight, weight_scale)
    _int8_fits(x, weight, weight_scale)
    widths = (*weight.shape, weight_scale.numel())
    return INT8(x.device, (x.dtype, weight.dtype), widths, x.shape[0], x, weight, weight_scale)


def _fake_int8_linear(x, weight, weight_scale):
    _int8_fits(x, weight, weight_scale)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _int8_fits(x, weight, weight_scale) -> None:
    ok = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1]
    ok = ok and weight.dtype == torch.int8 and weight_scale.numel() in (1, weight.shape[0])
    _fit(ok, INT8, x, weight, weight_scale)


_SCHEMAS = {
    "mxfp8_linear": "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale,"
    " ScalarType dtype=bfloat16) -> Tensor",
    "nvfp4_linear": "(Tensor codes, Tensor scale, Tensor whole, Tensor weight, Tensor weight_scale,"
    " Tensor weight_whole, ScalarType dtype=bfloat16) -> Tensor",
    "int8_linear": "(Tensor x, Tensor weight, Tensor weight_scale) -> Tensor",
}


_made = define(_SCHEMAS, globals(), fp8_linear.namespace)
mxfp8_linear, nvfp4_linear, int8_linear = (_made[name] for name in _SCHEMAS)
