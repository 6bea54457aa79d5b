"""Plain fp8 codes through the block-scaled product of sm_120, which runs at twice the rate there.

GeForce multiplies plain fp8 with float32 sums at half rate, MXFP8 at full rate. A row's scale is a
power of two times a number from 1 to 2: the power stands for the scale of each of the row's blocks,
the weight's blocks have 1, and what is left of the scales multiplies the result. Only `tune` switches
it on.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import E8M0_BIAS, MXFP8_BLOCK, swizzle
from . import blocks, scaled
from .table import Case, register

BF16 = torch.bfloat16
ARCHES = ("sm_120", "sm_121")
_able = blocks._refuses_torch("BlockWise1x32")


def powers(scale: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (M, 1) -> e8m0 exponents (M, 1), uint8, and what is left, from 1 to 2. NaN and
    infinity have 255, which is e8m0's NaN."""
    bits = scale.float().contiguous().view(torch.int32)
    rest = (bits & 0x7FFFFF) | (E8M0_BIAS << 23)
    return ((bits >> 23) & 0xFF).to(torch.uint8), rest.view(torch.float32)


def containers(exponents: Tensor, rows: int, depth: int) -> tuple[Tensor, Tensor]:
    """Block scales in the tensor cores' order, of activations (M, depth) and of a weight
    (rows, depth), the latter all 1."""
    width = depth // MXFP8_BLOCK
    ones = torch.full(
        (-(-rows // 128) * 128, -(-width // 4) * 4), E8M0_BIAS, dtype=torch.uint8,
        device=exponents.device,
    )  # fmt: skip
    return swizzle(exponents.expand(-1, width)), ones


def fp8_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = BF16,
    product: Callable[..., Tensor] = blocks.mxfp8_torch,
) -> Tensor:
    """As `reference.fp8_linear`; rounded to bfloat16 before the scales and after each of them."""
    exponents, rest = powers(scale)
    mine, theirs = containers(exponents, *weight.shape)
    weight = weight if weight.stride() == (weight.shape[1], 1) else weight.contiguous()
    y = product(codes, mine, weight, theirs, BF16)
    return y.mul_(weight_scale.reshape(1, -1)).mul_(rest).to(dtype)


def _refuses(case: Case) -> str | None:
    if case.arch not in ARCHES:
        return f"{case.arch} gains nothing by it"
    able = _able(case) or scaled.refuses_measured("fp8_linear", case)
    return able or scaled.other_form(case, own=False)


register("fp8_linear", "mxfp8", 50, fp8_linear, _refuses)
