"""Our own fp8 matrix product in Triton: full rate on GeForce, and an epilogue that libraries lack.

    out = residual + gate * ((a @ b') * scale_a * scale_b + low @ up')

a (M, K) and b (N, K) are e4m3 codes with a float32 scale for each row; `low` (M, r) and `up` (N, r)
are an unmerged LoRA, `low` being x @ down'. Where residual, gate or LoRA are absent their terms are.

GeForce runs fp8 with float32 accumulation at half rate. Two forms avoid that (see tiles.TILES):
"fp16" accumulates in float16 within one slice of K, with codes so small that no sum can overflow
(ACTIVATION_MAX, WEIGHT_MAX, `rebase`); "block" uses sm_120's block-scaled instruction with all
block scales 1. "weight" has bfloat16 activations and decodes e4m3 by integer operations, for
cards without fp8 instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .jit import kernel
from .tiles import Tile

if TYPE_CHECKING:
    import triton.language as tl

# e4m3 weights, divided by 16, reach 448 / 16. With activations up to these no partial sum of a
# slice can leave float16: 32 * 28 * 64 = 16 * 28 * 128 = 57,344 < 65,504.
REBASE = 16
WEIGHT_MAX = 448 // REBASE
ACTIVATION_MAX = {64: 32.0, 128: 16.0}
LOW_RANK_BLOCK = 32
GROUP = 8


# ---------------------------------------------------------------------------------------- kernels


@kernel
def _place(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """This program's block of the result: groups of GROUP block rows share the columns' loads."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP * columns)
    high = min(rows - group * GROUP, GROUP)
    inside = pid % (GROUP * columns)
    row = (group * GROUP + inside % high) * BM + tl.arange(0, BM)
    column = (inside // high) * BN + tl.arange(0, BN)
    return row, column


@kernel
def _finish(
    acc, row, column, M, N,
    out_ptr, gate_ptr, residual_ptr, low_ptr, up_ptr,
    rank, stride_out, stride_residual, stride_low, stride_up,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The epilogue; `acc` holds the product in real units. Offsets in 64 bits: a result may have
    more than 2^31 elements."""
    inside = (row[:, None] < M) & (column[None, :] < N)
    wide = row.to(tl.int64)
    if RANK > 0:
        for start in tl.range(0, rank, RANK, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            r = start + tl.arange(0, RANK)
            low = tl.load(
                low_ptr + wide[:, None] * stride_low + r[None, :],
                mask=(row[:, None] < M) & (r[None, :] < rank),
                other=0.0,
            )
            up = tl.load(
                up_ptr + column[None, :].to(tl.int64) * stride_up + r[:, None],
                mask=(column[None, :] < N) & (r[:, None] < rank),
                other=0.0,
            )
            acc = tl.dot(low, up, acc)
    if GATED:
        gate = tl.load(gate_ptr + column, mask=column < N, other=0.0)
        acc = acc * gate.to(tl.float32)[None, :]
    if RESIDUAL:
        residual = tl.load(
            residual_ptr + wide[:, None] * stride_residual + column[None, :],
            mask=inside,
            other=0.0,
        )
        acc = residual.to(tl.float32) + acc
    tl.store(
        out_ptr + wide[:, None] * stride_out + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@kernel(do_not_specialize=["M", "rank"])
def fp8_gemm(
    a_ptr, b_ptr, out_ptr, scale_a_ptr, scale_b_ptr, gate_ptr, residual_ptr, low_ptr, up_ptr,
    M, N, K, rank,
    stride_a, stride_b, stride_out, stride_scale_b, stride_residual, stride_low, stride_up,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row, column = _place(M, N, BM, BN, GROUP)
    k = tl.arange(0, BK)
    # Rows beyond the end wrap around: what they give is never stored, and needs no mask.
    a = a_ptr + (row % M).to(tl.int64)[:, None] * stride_a + k[None, :]
    b = b_ptr + (column % N).to(tl.int64)[None, :] * stride_b + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    if ACCUMULATE == "block":
        ones_a = tl.full((BM, BK // 32), 127, tl.uint8)  # e8m0: 2^(127 - 127)
        ones_b = tl.full((BN, BK // 32), 127, tl.uint8)
    for start in range(0, K, BK):
        if EVEN_K:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=k[None, :] < K - start, other=0.0)
            right = tl.load(b, mask=k[:, None] < K - start, other=0.0)
        if ACCUMULATE == "fp16":
            acc += tl.dot(left, right, out_dtype=tl.float16).to(tl.float32)
        elif ACCUMULATE == "block":
            acc = tl.dot_scaled(left, ones_a, "e4m3", right, ones_b, "e4m3", acc)
        else:
            # Hopper's own sums have 14 bits: what one slice adds up to goes into float32
            acc = tl.dot(left, right, acc, max_num_imprecise_acc=BK)
        a += BK
        b += BK
    scale_a = tl.load(scale_a_ptr + row, mask=row < M, other=0.0)
    scale_b = tl.load(scale_b_ptr + column * stride_scale_b, mask=column < N, other=0.0)
    acc = acc * scale_a[:, None] * scale_b[None, :]
    _finish(
        acc, row, column, M, N, out_ptr, gate_ptr, residual_ptr, low_ptr, up_ptr,
        rank, stride_out, stride_residual, stride_low, stride_up,
        GATED, RESIDUAL, RANK,
    )  # fmt: skip


@kernel(do_not_specialize=["M", "rank"])
def weight_gemm(
    a_ptr, b_ptr, out_ptr, scale_b_ptr, gate_ptr, residual_ptr, low_ptr, up_ptr,
    M, N, K, rank,
    stride_a, stride_b, stride_out, stride_scale_b, stride_residual, stride_low, stride_up,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """a is bfloat16, b the e4m3 codes as bytes."""
    row, column = _place(M, N, BM, BN, GROUP)
    k = tl.arange(0, BK)
    a = a_ptr + (row % M).to(tl.int64)[:, None] * stride_a + k[None, :]
    b = b_ptr + (column % N).to(tl.int64)[None, :] * stride_b + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            left, codes = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=k[None, :] < K - start, other=0.0)
            codes = tl.load(b, mask=k[:, None] < K - start, other=0)
        # sEEEEMMM under float32's sign and exponent is the value times 2^-120, subnormals too.
        # Scaled up here and not in the epilogue: sums near 2^-120 would lose bits for small rows.
        wide = codes.to(tl.uint32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        right = (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(tl.bfloat16)
        acc = tl.dot(left, right, acc)
        a += BK
        b += BK
    scale_b = tl.load(scale_b_ptr + column * stride_scale_b, mask=column < N, other=0.0)
    acc = acc * scale_b[None, :]
    _finish(
        acc, row, column, M, N, out_ptr, gate_ptr, residual_ptr, low_ptr, up_ptr,
        rank, stride_out, stride_residual, stride_low, stride_up,
        GATED, RESIDUAL, RANK,
    )  # fmt: skip


# --------------------------------------------------------------------------------------- launching


class Epilogue(NamedTuple):
    """What is made of a product (M, N): `residual` (M, N) is added, `gate` (N,) multiplies, an
    unmerged LoRA is `low` (M, r) = x @ down' and `up` (N, r), both in one 16-bit dtype. All rows
    lie in one piece; between rows there may be gaps."""

    residual: Tensor | None = None
    gate: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None


NONE = Epilogue()


def fp8(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile: Tile,
    accumulate: str,
    dtype: torch.dtype = torch.bfloat16,
    epilogue: Epilogue = NONE,
    out: Tensor | None = None,
) -> Tensor:
    """e4m3 codes (M, K), weight (N, K), a scale for each row of either -> (M, N) in `dtype`, or in
    `out`, which has it.

    With "fp16" the codes must keep to ACTIVATION_MAX[tile.k] and WEIGHT_MAX: nothing checks it.
    """
    if out is None:
        out = codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)
    grid, arguments, constants = _launch(codes, weight, weight_scale, tile, out, epilogue)
    pointers = (codes, weight, out, scale, *arguments)
    with torch.cuda.device_of(codes):
        fp8_gemm[grid](*pointers, **constants, ACCUMULATE=accumulate)
    return out


def weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    tile: Tile,
    epilogue: Epilogue = NONE,
) -> Tensor:
    """bfloat16 (M, K) by e4m3 codes (N, K) -> bfloat16 (M, N)."""
    out = x.new_empty((x.shape[0], weight.shape[0]))
    codes = weight.view(torch.uint8)
    grid, arguments, constants = _launch(x, codes, weight_scale, tile, out, epilogue)
    with torch.cuda.device_of(x):
        weight_gemm[grid](x, codes, out, *arguments, **constants)
    return out


def _launch(a: Tensor, b: Tensor, scale_b: Tensor, tile: Tile, out: Tensor, epilogue: Epilogue):
    """-> grid, the arguments from scale_b on, keyword arguments. Absent tensors are stood in for by
    `out`, which the kernel then does not read."""
    (rows, depth), columns = a.shape, b.shape[0]
    residual, gate, low, up = epilogue
    rank = 0 if low is None else low.shape[1]
    arguments = [scale_b, *(out if t is None else t for t in (gate, residual, low, up))]
    arguments += [rows, columns, depth, rank]
    arguments += [a.stride(0), b.stride(0), out.stride(0), int(scale_b.numel() > 1)]
    arguments += [0 if t is None else t.stride(0) for t in (residual, low, up)]
    constants = {
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP": GROUP,
        "EVEN_K": depth % tile.k == 0,
        "GATED": gate is not None,
        "RESIDUAL": residual is not None,
        "RANK": min(LOW_RANK_BLOCK, max(16, 1 << (rank - 1).bit_length())) if rank else 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    grid = (-(-rows // tile.m) * -(-columns // tile.n),)
    return grid, arguments, constants


# ------------------------------------------------------------------------------ re-based weights


class Rebased(NamedTuple):
    """What `rebase` cannot tell from the codes alone: where they lost bits, and what stood there."""

    places: Tensor  # int64, into the flat codes
    codes: Tensor  # uint8, the original ones


def rebase(codes: Tensor) -> Rebased:
    """e4m3 weight codes / 16, in place; their scale is to be multiplied by 16. Exact but for codes
    below 2^-2 (of a row whose largest is 448), which round to e4m3's finest step, 2^-9.

    Returns what `restore` needs to undo it bit for bit: under 1 % of a usual weight.
    """
    places, lost = [], []
    flat, step = codes.view(-1), 1 << 24
    for start in range(0, flat.numel(), step):
        old = flat[start : start + step]
        new = (old.float() / REBASE).to(old.dtype)
        differs = (_times(new).view(torch.uint8) != old.view(torch.uint8)).nonzero()[:, 0]
        places.append(differs + start)
        lost.append(old.view(torch.uint8)[differs])
        flat[start : start + step] = new
    return Rebased(torch.cat(places), torch.cat(lost))


def restore(codes: Tensor, rebased: Rebased) -> None:
    """Undo `rebase`, in place; the scale is to be divided by 16."""
    flat, step = codes.view(-1), 1 << 24
    for start in range(0, flat.numel(), step):
        flat[start : start + step] = _times(flat[start : start + step])
    flat.view(torch.uint8)[rebased.places] = rebased.codes


def _times(codes: Tensor) -> Tensor:
    return (codes.float() * REBASE).clamp(-448, 448).to(codes.dtype)
