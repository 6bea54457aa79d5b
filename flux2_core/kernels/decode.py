"""Products of fp8 weights in bf16 or fp16 on cards that do not multiply fp8, or where it is not wanted:
the weight is decoded and scaled in one pass, and the product is PyTorch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import kernel
from .producers import _refuses
from .table import Case, register

if TYPE_CHECKING:
    import triton.language as tl

BLOCK, WARPS = 2048, 4  # elements, and warps, of a program


@kernel
def decode_kernel(codes, scale, out, n, scale_row, BLOCK: tl.constexpr):
    """BLOCK elements of one row: e4m3 codes as bytes, times the row's scale."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    code = tl.load(codes + row * n + i, mask=mask, other=0).to(tl.int32)
    # sEEEEMMM under float32's sign and exponent is the value times 2^-120, subnormals too
    x = ((code & 0x80) << 24 | (code & 0x7F) << 20).to(tl.float32, bitcast=True)
    x = tl.where((code & 0x7F) == 0x7F, float("nan"), x * 1.329227995784916e36)
    x = x * tl.load(scale + row * scale_row)
    tl.store(out + row * n + i, x.to(out.dtype.element_ty), mask=mask)


def decoded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 codes (N, K), scale (N, 1) or () -> numbers (N, K), rounded once."""
    weight, scale = weight.contiguous(), scale.float().reshape(-1)
    rows, n = weight.shape
    out = torch.empty((rows, n), dtype=dtype, device=weight.device)
    if rows and n:
        with torch.cuda.device_of(weight):
            decode_kernel[(rows, -(-n // BLOCK))](
                weight.view(torch.uint8), scale, out, n, int(scale.numel() > 1), BLOCK=BLOCK,
                num_warps=WARPS,
            )  # fmt: skip
    return out


def weight_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """As `reference.fp8_weight_linear`, the weight rounded to x's dtype: what a layer that was
    decoded at load computes, bit for bit."""
    return F.linear(x, decoded(weight, weight_scale, x.dtype))


def _needs(case: Case) -> str | None:
    return _refuses(case._replace(dtypes=case.dtypes[:1]), 80, 0, fp8=False)


register("fp8_weight_linear", "decoded", 30, weight_linear, _needs)

_types = {"codes": "*u8", "scale": "*fp32", "out": "*bf16", "n": "i32", "scale_row": "i32"}
GATE = ((decode_kernel, _types, {"BLOCK": BLOCK}, WARPS, 1, (80, 86, 89, 90, 100, 120)),)
