"""A product of codes with what comes after it: gate, residual and an unmerged LoRA, in one pass
where our own kernel serves, one after the other elsewhere.
"""

import torch
from torch import Tensor

from . import reference, scaled, tune
from .ops import _fit, _library, fp8_linear
from .reference import E4M3, wide
from .table import Case, operation, register

BF16 = torch.bfloat16
NAME = "fp8_linear_fused"
# N, K, weight scales, rank, 1 where the codes are narrow
FUSED = operation(NAME, (E4M3, BF16), (6144, 24576, 1, 16, 0), 4608)


def fp8_linear_fused_reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    narrow: bool = False,
    dtype: torch.dtype = BF16,
) -> Tensor:
    """residual + gate (codes @ weight' + low @ up') -> (M, N), rounded once.

    The product as `reference.fp8_linear`; residual (M, N); gate (N,), one for all rows; low (M, r)
    is x @ down' of a LoRA and up (N, r). `narrow` promises codes within gemm.ACTIVATION_MAX[64] and
    weights within gemm.WEIGHT_MAX (`gemm.rebase`), whose sums fit into float16.
    """
    y = reference.fp8_linear(codes, scale, weight, weight_scale, torch.float32)
    if low is not None and up is not None:
        y = y + wide(low) @ wide(up).T
    if gate is not None:
        y = y * wide(gate)
    return (y if residual is None else wide(residual) + y).to(dtype)


def fp8_linear_fused_eager(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    narrow: bool = False,
    dtype: torch.dtype = BF16,
) -> Tensor:
    """By whatever serves `fp8_linear`; rounded after each step."""
    y = fp8_linear(codes, scale, weight, weight_scale, dtype)
    if low is not None and up is not None:
        y = y.addmm_(low.to(dtype), up.to(dtype).T)
    if gate is not None:
        gate = gate.to(dtype)
        return y.mul_(gate) if residual is None else torch.addcmul(residual.to(dtype), gate, y)
    return y if residual is None else y.add_(residual)


def fp8_linear_fused_own(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    narrow: bool = False,
    dtype: torch.dtype = BF16,
) -> Tensor:
    """Our kernel, with the tile that tuning found."""
    from . import gemm

    found = tune.found(_measured(narrow), codes.device, codes.shape[0], *weight.shape)
    assert found is not None  # else it refuses
    residual, low, up = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (residual, low, up)
    )
    gate = None if gate is None else gate.contiguous()
    parts = gemm.Epilogue(residual, gate, low, up)
    scales = scale.float().contiguous(), weight_scale.float().contiguous()
    return gemm.fp8(codes, scales[0], weight, scales[1], found.tile, found.accumulate, dtype, parts)


def _measured(narrow: bool) -> str:
    return "fp8_linear_narrow" if narrow else NAME


def _refuses(case: Case) -> str | None:
    return scaled.refuses_own(_measured(bool(case.widths[4])), case)


register(NAME, "reference", 0, fp8_linear_fused_reference)
register(NAME, "eager", 10, fp8_linear_fused_eager)
register(NAME, "triton", 60, fp8_linear_fused_own, _refuses)


# ------------------------------------------------------------------------- as PyTorch sees it


def _fp8_linear_fused(
    codes, scale, weight, weight_scale, residual=None, gate=None, low=None, up=None,
    narrow=False, dtype=BF16,
):  # fmt: skip
    tensors = (codes, scale, weight, weight_scale, residual, gate, low, up)
    _fit(_fits(*tensors), FUSED, *tensors)
    rank = 0 if low is None else low.shape[1]
    widths = (*weight.shape, weight_scale.numel(), rank, int(narrow))
    return FUSED(
        codes.device, (codes.dtype, dtype), widths, codes.shape[0], *tensors, narrow, dtype
    )


def _fake_fp8_linear_fused(
    codes, scale, weight, weight_scale, residual=None, gate=None, low=None, up=None,
    narrow=False, dtype=BF16,
):  # fmt: skip
    tensors = (codes, scale, weight, weight_scale, residual, gate, low, up)
    _fit(_fits(*tensors), FUSED, *tensors)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


def _fits(codes, scale, weight, weight_scale, residual, gate, low, up) -> bool:
    ok = codes.ndim == weight.ndim == 2 and codes.shape[1] == weight.shape[1]
    ok = ok and codes.dtype == weight.dtype == E4M3 and scale.shape == (codes.shape[0], 1)
    ok = ok and weight_scale.numel() in (1, weight.shape[0])
    rows, columns = codes.shape[0], weight.shape[0]
    ok = ok and (residual is None or residual.shape == (rows, columns))
    ok = ok and (gate is None or gate.shape == (columns,)) and (low is None) == (up is None)
    if low is None or not ok:
        return ok
    sizes = low.shape[:1] == (rows,) and up.shape[:1] == (columns,)
    return (
        sizes and low.ndim == up.ndim == 2 and low.shape[1] == up.shape[1] and low.dtype == up.dtype
    )


_library(fp8_linear.namespace).define(
    f"{NAME}(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? residual=None,"
    " Tensor? gate=None, Tensor? low=None, Tensor? up=None, bool narrow=False,"
    " ScalarType dtype=bfloat16) -> Tensor"
)
_library(fp8_linear.namespace).impl(NAME, _fp8_linear_fused, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{fp8_linear.namespace}::{NAME}",
    _fake_fp8_linear_fused,
    lib=_library(fp8_linear.namespace),
)
fp8_linear_fused = getattr(torch.ops, fp8_linear.namespace).fp8_linear_fused.default
