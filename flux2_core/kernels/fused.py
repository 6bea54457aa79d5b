"""A product of codes with what comes after it: gate, residual and an unmerged LoRA, in one pass
where our own kernel serves, one after the other elsewhere.
"""

import torch
from torch import Tensor

from . import reference, scaled, tune
from .ops import _fit, define, fp8_linear
from .reference import E4M3, wide
from .table import Case, operation, register

BF16 = torch.bfloat16
NAME = "fp8_linear_fused"
# N, K, weight scales, rank, 1 where the codes are narrow, 1 where something is added; rows are those
# of one picture
FUSED = operation(NAME, (E4M3, BF16), (6144, 24576, 1, 0, 0, 1), 4608)


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

    The product as `reference.fp8_linear`; residual (M, N); gate (N,), one for all rows, or (B, N),
    one for each of B pictures of M / B rows; low (M, r) is x @ down' of a LoRA and up (N, r).
    `narrow` promises codes within gemm.ACTIVATION_MAX of the tile that tuning found, and weights
    within gemm.WEIGHT_MAX (`gemm.rebase`), whose sums fit into float16.
    """
    y = reference.fp8_linear(codes, scale, weight, weight_scale, torch.float32)
    if low is not None and up is not None:
        y = y + wide(low) @ wide(up).T
    if gate is not None:
        y = _per_picture(y, gate).mul(wide(gate).reshape(-1, 1, y.shape[1])).flatten(0, 1)
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
        factor, pictures = gate.to(dtype).reshape(-1, 1, y.shape[1]), _per_picture(y, gate)
        if residual is None:
            return pictures.mul_(factor).flatten(0, 1)
        before = _per_picture(residual.to(dtype), gate)
        return torch.addcmul(before, factor, pictures).flatten(0, 1)
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

    pictures = 1 if gate is None or gate.ndim == 1 else gate.shape[0]
    rows = codes.shape[0] // pictures
    op = measured(low is not None, residual is not None or gate is not None, narrow)
    found = tune.found(op, codes.device, rows, *weight.shape)
    assert found is not None and found.tile is not None  # else it refuses
    residual, low, up = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (residual, low, up)
    )
    gate = None if gate is None else gate.reshape(pictures, -1).contiguous()
    scale, weight_scale = scale.float().contiguous(), weight_scale.float().contiguous()
    out = codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)
    for i in range(pictures if rows else 0):
        part = slice(i * rows, (i + 1) * rows)
        parts = gemm.Epilogue(
            None if residual is None else residual[part],
            None if gate is None else gate[i],
            None if low is None else low[part],
            up,
        )
        gemm.fp8(
            codes[part], scale[part], weight, weight_scale, found.tile, found.accumulate, dtype,
            parts, out[part],
        )  # fmt: skip
    return out


def _per_picture(y: Tensor, gate: Tensor) -> Tensor:
    """y (M, N) -> (B, M / B, N) for a gate (B, N), (1, M, N) for one (N,)."""
    return y.unflatten(0, (1 if gate.ndim == 1 else gate.shape[0], -1))


def measured(low: bool, add: bool, narrow: bool) -> str:
    """What `tune` calls this form of the product."""
    name = "fp8_linear_lora" if low else NAME if add else "fp8_linear"
    return name + "_narrow" * narrow


def _refuses(case: Case) -> str | None:
    if case.dtypes[1] == torch.float32:
        return "it gives 16 bits alone"
    *_, rank, narrow, add = case.widths
    return scaled.refuses_own(measured(rank > 0, bool(add), bool(narrow)), case)


register(NAME, "reference", 0, fp8_linear_fused_reference)
register(NAME, "eager", 10, fp8_linear_fused_eager)
register(NAME, "triton", 60, fp8_linear_fused_own, _refuses)


# ------------------------------------------------------------------------- as PyTorch sees it


def _fp8_linear_fused(
    codes, scale, weight, weight_scale, residual=None, gate=None, low=None, up=None,
    narrow=False, dtype=BF16,
):  # fmt: skip
    tensors = (codes, scale, weight, weight_scale, residual, gate, low, up)
    if not codes.shape[0]:
        return _fake_fp8_linear_fused(*tensors, narrow, dtype)
    _fit(_fits(*tensors), FUSED, *tensors)
    rank, add = 0 if low is None else low.shape[1], residual is not None or gate is not None
    widths = (*weight.shape, weight_scale.numel(), rank, int(narrow), int(add))
    rows = codes.shape[0] // (1 if gate is None or gate.ndim == 1 else gate.shape[0])
    return FUSED(codes.device, (codes.dtype, dtype), widths, rows, *tensors, narrow, dtype)


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
    ok = ok and (gate is None or _gate_fits(gate, rows, columns)) and (low is None) == (up is None)
    if low is None or not ok:
        return ok
    sizes = low.shape[:1] == (rows,) and up.shape[:1] == (columns,)
    return (
        sizes and low.ndim == up.ndim == 2 and low.shape[1] == up.shape[1] and low.dtype == up.dtype
    )


def _gate_fits(gate: Tensor, rows: int, columns: int) -> bool:
    if gate.ndim == 1:
        return gate.shape[0] == columns
    return gate.ndim == 2 and gate.shape[1] == columns and rows % max(1, gate.shape[0]) == 0


_SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? residual=None,"
    " Tensor? gate=None, Tensor? low=None, Tensor? up=None, bool narrow=False,"
    " ScalarType dtype=bfloat16) -> Tensor"
)
fp8_linear_fused = define({NAME: _SCHEMA}, globals(), fp8_linear.namespace)[NAME]
