"""fp8 linears: PyTorch's scaled product where the card has fp8 instructions, bfloat16 elsewhere,
and our own kernels where `tune` found them faster on this card.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tune
from .eager import shifted
from .jit import triton_missing
from .table import Case, register

BF16 = torch.bfloat16
SCALED_MM = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
CHUNK = 1 << 20  # elements that a pass over a matrix holds at once: they stay in the cache

# Hopper can add fp8 products with about 14 bits, 1.08 x as fast as with 23 (8192^3 on an H200). The
# longer the sum the more is lost: of the result 0.0024 at 6144, 0.0043 at 24576, where 0.0017 is
# bfloat16's own rounding. Longer sums are added precisely. Other cards take no notice.
fast_accumulate = os.environ.get("FLUX2_FP8_FAST_ACCUMULATE", "1") != "0"
FAST_DEPTH = 18432


# ------------------------------------------------------------------------- PyTorch's scaled product


def scaled_mm(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = BF16,
) -> Tensor:
    """codes (M, K) by weight (N, K), as `reference.fp8_linear`. On CUDA K and N are multiples of
    16; rows are padded to such a multiple here."""
    rows = codes.shape[0]
    a, scale_a = padded(codes, -rows % 16), padded(scale.float(), -rows % 16)
    b = weight if weight.stride() == (weight.shape[1], 1) else weight.contiguous()
    scale_b = row_scales(weight_scale, weight.shape[0]).reshape(1, -1)
    return _product(a, b.T, scale_a, scale_b, dtype)[:rows]


def row_scales(scale: Tensor, rows: int) -> Tensor:
    """scale (rows, 1) or () -> float32 (rows, 1), in one piece. Worth doing once, at load: PyTorch
    takes no mixture of a scale for each row on one side and one for all on the other."""
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def padded(x: Tensor, more: int) -> Tensor:
    """x (R, C) in one piece, with `more` rows of zeros."""
    if not more:
        return x.contiguous()
    out = torch.zeros((x.shape[0] + more, x.shape[1]), dtype=x.dtype, device=x.device)
    out[: x.shape[0]] = x
    return out


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """The public function where PyTorch has it (2.10), else the older one it stands for."""
    public, fast = getattr(F, "scaled_mm", None), fast_accumulate and a.shape[1] <= FAST_DEPTH
    if public is None:
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast
        )
    row_wise = F.ScalingType.RowWise
    return public(
        a, b, scale_a, row_wise, scale_b, row_wise,
        output_dtype=dtype, use_fast_accum=fast,
    )  # fmt: skip


def _refuses_scaled_mm(case: Case) -> str | None:
    columns, depth, _ = case.widths
    if case.device.type == "cpu":
        return "bfloat16 is faster on a CPU"
    if case.arch not in SCALED_MM:
        return f"{case.arch} has no fp8 instructions that PyTorch uses"
    if not hasattr(torch, "_scaled_mm"):
        return "this PyTorch has no scaled product"
    if depth % 16 or columns % 16:
        return f"{columns} x {depth} is not in multiples of 16"
    return None if case.dtypes[-1] == BF16 else "it gives bfloat16 alone"


# --------------------------------------------------------------------------------- by bfloat16


def decoded_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = BF16,
) -> Tensor:
    """As `reference.fp8_linear`, the product in bfloat16: rounded twice, before the scales and
    after them."""
    y = F.linear(decoded(codes), decoded(weight))
    return _scaled(y, scale, weight_scale, dtype)


def decoded_weight_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """As `reference.fp8_weight_linear`, the product in x's dtype, rounded before and after the
    scale. In float16 a sum that leaves its range is lost, so there the weight is scaled instead."""
    if x.dtype == torch.float16:
        scale = weight_scale.reshape(-1, 1)
        return F.linear(x, (decoded(weight).float() * scale).to(x.dtype))
    y = F.linear(x, decoded(weight).to(x.dtype))
    return _scaled(y, None, weight_scale, x.dtype)


def decoded(codes: Tensor) -> Tensor:
    """e4m3 codes (R, C) -> bfloat16, exact but for NaN, which a CPU decodes to 480."""
    if codes.device.type != "cpu":
        return codes.to(BF16)
    out = torch.empty(codes.shape, dtype=BF16)
    for part, some in _chunks(out, codes):
        shifted(some, part.view(torch.int16))
    return out


def _scaled(y: Tensor, scale: Tensor | None, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y (M, N), which is ours to overwrite, times the scales of its rows and columns, in float32.
    Never the whole of it in float32 at once where the weight alone has scales."""
    columns = weight_scale.reshape(1, -1)
    out = y if y.dtype == dtype else torch.empty(y.shape, dtype=dtype, device=y.device)
    if y.device.type != "cpu":
        if scale is None:
            return y.mul_(columns).to(dtype)  # each product in float32, rounded once
        return (y * scale * columns).to(dtype)
    for part, result, *rows in _chunks(y, out, *([] if scale is None else [scale])):
        wide = part.float().mul_(columns)
        result.copy_(wide.mul_(rows[0]) if rows else wide)
    return out


def _chunks(*matrices: Tensor):
    """The same rows of each, about CHUNK elements of the first at a time."""
    rows = max(1, CHUNK // max(1, matrices[0].shape[1]))
    return zip(*(m.split(rows) for m in matrices), strict=True)


# --------------------------------------------------------------------------------- our own kernels


def refuses_own(op: str, case: Case) -> str | None:
    """Why a kernel of ours does not serve a case of an operation that `tune` measures, or None."""
    if not case.arch.startswith("sm_"):
        return "our kernels are for NVIDIA cards"
    return triton_missing() or refuses_measured(op, case)


def refuses_measured(op: str, case: Case) -> str | None:
    """Why what `tune` may switch on is not, or None."""
    columns, depth = case.widths[:2]
    found = tune.found(op, case.device, case.rows, columns, depth)
    if found is None:
        return "not measured on this card: run python3 dev.py bench tune"
    if found.speedup < tune.WORTH:
        return f"{found.speedup:.2f} x the speed of the next best, used from {tune.WORTH} x on"
    return None


def _own_fp8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = BF16
) -> Tensor:
    from . import gemm

    found = tune.found("fp8_linear", codes.device, codes.shape[0], *weight.shape)
    assert found is not None and found.tile is not None  # else it refuses
    weight_scale = weight_scale.float()
    return gemm.fp8(codes, scale, weight, weight_scale, found.tile, found.accumulate, dtype)


def _own_weight_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    from . import gemm

    found = tune.found("fp8_weight_linear", x.device, x.shape[0], *weight.shape)
    assert found is not None and found.tile is not None
    return gemm.weight_only(x, weight, weight_scale.float(), found.tile)


def _refuses_own_fp8(case: Case) -> str | None:
    return refuses_own("fp8_linear", case) or other_form(case, own=True)


def other_form(case: Case, own: bool) -> str | None:
    """Why a product that `tune` found worth it is not ours, or not PyTorch's with blocks."""
    found = tune.found("fp8_linear", case.device, case.rows, *case.widths[:2])
    if found is None or (found.tile is not None) == own:
        return None
    return "another form was found faster on this card"


def _refuses_own_weight(case: Case) -> str | None:
    wrong = "it takes bfloat16 alone" if case.dtypes[0] != BF16 else None
    return wrong or refuses_own("fp8_weight_linear", case)


register("fp8_linear", "triton", 60, _own_fp8_linear, _refuses_own_fp8)
register("fp8_linear", "torch", 40, scaled_mm, _refuses_scaled_mm)
register("fp8_linear", "eager", 10, decoded_linear)
register("fp8_weight_linear", "triton", 60, _own_weight_linear, _refuses_own_weight)
register("fp8_weight_linear", "eager", 10, decoded_weight_linear)
