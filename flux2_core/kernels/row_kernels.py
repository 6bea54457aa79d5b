"""Kernels in Triton's language: what stands around the matrix products, a row to a program.

A row of n numbers is held in registers, in two blocks of A + B: the largest power of two below n
and what is left. FLUX.2's widths (3072, 4096, 6144 and three times that) leave no lane idle, and
only block B needs a mask. Arithmetic is in float32. FORM says what becomes of a row: "fp8" (codes
with one scale), "mxfp8" or "nvfp4" (codes with a scale for each block, in the tensor cores' order),
"same" (numbers, in the dtype of `codes`). What each operation means is said in `reference` and
`block_codes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .jit import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel
def _inverse(bits, top):
    """The largest magnitude as bits -> it, not too small, and top / it; both NaN where it is none."""
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), 1e-12)
    amax = tl.where(bits < 0x7F800000, amax, float("nan"))
    return amax, tl.div_rn(top, amax)


@kernel
def _largest(u, v):
    """As whole numbers NaN and infinity exceed all numbers: the maximum keeps them."""
    u_bits = u.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    v_bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(tl.max(u_bits, 0), tl.max(v_bits, 0))


@kernel
def _mxfp8(x, codes, scales, first, end, row, n, wide, SIZE: tl.constexpr):
    """SIZE numbers, columns first, ... below `end` of a row -> codes, a power of two for each 32."""
    block, lane = tl.arange(0, SIZE // 32), tl.arange(0, 32)
    x = tl.reshape(x, (SIZE // 32, 32))
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    number = bits < 0x7F800000
    bits = tl.maximum(tl.where(number, bits, 0), 0x0D800000)  # 2^-100
    exponent = ((bits + 0x1FFFFF) >> 23) - 8  # 448 = 1.75 * 2^8: what exceeds 1.75 carries
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    factor = tl.where(number, factor, float("nan"))
    place = first + block[:, None] * 32 + lane[None, :]
    tl.store(codes + row * n + place, (x * factor[:, None]).to(tl.float8e4nv), mask=place < end)
    exponent = tl.where(number, exponent, 255).to(tl.uint8)
    column = first // 32 + block
    tl.store(scales + _swizzled(row, column, wide), exponent, mask=column * 32 < end)


@kernel
def _nvfp4(x, codes, scales, whole, first, end, row, n, wide, SIZE: tl.constexpr):
    """SIZE numbers of a row -> two codes to a byte, and an e4m3 scale for each 16."""
    block = tl.arange(0, SIZE // 16)
    x = tl.reshape(x, (SIZE // 16, 16))
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    number = (bits < 0x7F800000) & (tl.abs(whole) < float("inf"))
    scale = tl.minimum(tl.div_rn(bits.to(tl.float32, bitcast=True), 6.0 * whole), 448.0)
    scale = tl.where(number, scale, float("nan")).to(tl.float8e4nv)
    column = first // 16 + block
    tl.store(scales + _swizzled(row, column, wide), scale, mask=column * 16 < end)
    inverse = tl.div_rn(1.0, tl.maximum(scale.to(tl.float32) * whole, 1e-30))
    x = x * tl.where(number, inverse, float("nan"))[:, None]
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32) + 8 * (x < 0).to(tl.int32)
    even, odd = tl.split(tl.reshape(code, (SIZE // 2, 2)))
    place = first // 2 + tl.arange(0, SIZE // 2)
    tl.store(codes + row * (n // 2) + place, (even << 4 | odd).to(tl.uint8), mask=place * 2 < end)


@kernel
def _swizzled(row, column, wide):
    """Where a block's scale stands: tiles of 128 x 4, `wide` beside each other (formats.swizzle)."""
    tile = (row // 128) * wide + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4


@kernel
def _blocks(
    x, codes, scales, whole, first, end, row, n, wide, SIZE: tl.constexpr, FORM: tl.constexpr
):
    if FORM == "mxfp8":
        _mxfp8(x, codes, scales, first, end, row, n, wide, SIZE)
    else:
        _nvfp4(x, codes, scales, tl.load(whole), first, end, row, n, wide, SIZE)


@kernel
def _quantize(
    u, v, mask, codes, scales, whole, top, unit, row, n, wide,
    FORM: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A row in two blocks, float32, v 0 where masked -> its codes and scales, stored. `top` is the
    largest fp8 code, `unit` 1 / top."""
    if FORM == "same":
        out = codes + row * n
        tl.store(out + tl.arange(0, A), u.to(codes.dtype.element_ty))
        tl.store(out + A + tl.arange(0, B), v.to(codes.dtype.element_ty), mask=mask)
    elif FORM == "fp8":
        amax, inverse = _inverse(_largest(u, v), top)
        # nothing exceeds top, itself a code, by more than rounding does: no clamp
        out = codes + row * n
        tl.store(out + tl.arange(0, A), (u * inverse).to(tl.float8e4nv))
        tl.store(out + A + tl.arange(0, B), (v * inverse).to(tl.float8e4nv), mask=mask)
        tl.store(scales + row, amax * unit)
    else:
        _blocks(u, codes, scales, whole, 0, n, row, n, wide, A, FORM)
        _blocks(v, codes, scales, whole, A, n, row, n, wide, B, FORM)


@kernel
def quantize_rows_kernel(
    x, codes, scales, whole, top, unit, n, wide, x_row,
    FORM: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mask = A + tl.arange(0, B) < n
    line = x + row * x_row
    u = tl.load(line + tl.arange(0, A)).to(tl.float32)
    v = tl.load(line + A + tl.arange(0, B), mask=mask, other=0.0).to(tl.float32)
    _quantize(u, v, mask, codes, scales, whole, top, unit, row, n, wide, FORM, A, B)


@kernel
def _with_gated(u, v, y, gate, i, j, mask):
    """A row in two blocks, u and v + gate y, in float32."""
    u += tl.load(gate + i).to(tl.float32) * tl.load(y + i).to(tl.float32)
    g = tl.load(gate + j, mask=mask, other=0.0).to(tl.float32)
    v += g * tl.load(y + j, mask=mask, other=0.0).to(tl.float32)
    return u, v


@kernel
def modulate_quantize_kernel(
    x, y, gate, shift, scale, x_new, codes, scales, whole, top, unit, rows, n, wide, inverse_n,
    x_batch, x_row, y_batch, y_row, gate_batch, shift_batch, scale_batch,
    FORM: tl.constexpr, GATED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """x [+ gate y, stored in x_new] -> LayerNorm, (1 + scale), shift, quantised."""
    row = tl.program_id(0).to(tl.int64)
    b, line = row // rows, row % rows
    i, j = tl.arange(0, A), A + tl.arange(0, B)
    mask = j < n
    x += b * x_batch + line * x_row
    u = tl.load(x + i).to(tl.float32)
    v = tl.load(x + j, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        y += b * y_batch + line * y_row
        gate += b * gate_batch
        u, v = _with_gated(u, v, y, gate, i, j, mask)
        # the norm is of what is stored
        u_new, v_new = u.to(x_new.dtype.element_ty), v.to(x_new.dtype.element_ty)
        tl.store(x_new + row * n + i, u_new)
        tl.store(x_new + row * n + j, v_new, mask=mask)
        u, v = u_new.to(tl.float32), v_new.to(tl.float32)
    mean = (tl.sum(u, 0) + tl.sum(v, 0)) * inverse_n
    u -= mean
    v = tl.where(mask, v - mean, 0.0)
    r = tl.rsqrt((tl.sum(u * u, 0) + tl.sum(v * v, 0)) * inverse_n + 1e-6)
    shift += b * shift_batch
    scale += b * scale_batch
    u = u * r * (1.0 + tl.load(scale + i).to(tl.float32)) + tl.load(shift + i).to(tl.float32)
    s = tl.load(scale + j, mask=mask, other=0.0).to(tl.float32)
    v = v * r * (1.0 + s) + tl.load(shift + j, mask=mask, other=0.0).to(tl.float32)
    _quantize(u, v, mask, codes, scales, whole, top, unit, row, n, wide, FORM, A, B)


@kernel
def gated_add_kernel(
    x, y, gate, out, rows, n, x_batch, x_row, y_batch, y_row, gate_batch,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """x + gate y."""
    row = tl.program_id(0).to(tl.int64)
    b, line = row // rows, row % rows
    i, j = tl.arange(0, A), A + tl.arange(0, B)
    mask = j < n
    x += b * x_batch + line * x_row
    y += b * y_batch + line * y_row
    gate += b * gate_batch
    u = tl.load(x + i).to(tl.float32)
    v = tl.load(x + j, mask=mask, other=0.0).to(tl.float32)
    u, v = _with_gated(u, v, y, gate, i, j, mask)
    tl.store(out + row * n + i, u.to(out.dtype.element_ty))
    tl.store(out + row * n + j, v.to(out.dtype.element_ty), mask=mask)


@kernel
def _swiglu(mlp, i, n, mask):
    a = tl.load(mlp + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(mlp + n + i, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(1.0 + tl.exp(-a))  # its square is the sigmoid, without a division
    return a * r * r * b


@kernel
def swiglu_quantize_kernel(
    mlp, attention, codes, scales, whole, top, unit, n, m, wide, mlp_row, attention_row,
    FORM: tl.constexpr, BESIDE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[attention (m, blocks C + D)], silu(mlp's first n) * second n (blocks A + B), quantised."""
    row = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, A), A + tl.arange(0, B)
    mlp += row * mlp_row
    u = _swiglu(mlp, i, n, i < n)
    v = _swiglu(mlp, j, n, j < n)
    if BESIDE:
        k, o = tl.arange(0, C), C + tl.arange(0, D)
        attention += row * attention_row
        w = tl.load(attention + k)
        z = tl.load(attention + o, mask=o < m, other=0.0)
    if FORM == "same":
        codes += row * (m + n)
        if BESIDE:
            tl.store(codes + k, w)
            tl.store(codes + o, z, mask=o < m)
        tl.store(codes + m + i, u.to(codes.dtype.element_ty))
        tl.store(codes + m + j, v.to(codes.dtype.element_ty), mask=j < n)
    elif FORM == "fp8":
        bits = _largest(u, v)
        if BESIDE:
            bits = tl.maximum(bits, _largest(w.to(tl.float32), z.to(tl.float32)))
        amax, inverse = _inverse(bits, top)
        codes += row * (m + n)
        if BESIDE:
            tl.store(codes + k, (w.to(tl.float32) * inverse).to(tl.float8e4nv))
            tl.store(codes + o, (z.to(tl.float32) * inverse).to(tl.float8e4nv), mask=o < m)
        tl.store(codes + m + i, (u * inverse).to(tl.float8e4nv))
        tl.store(codes + m + j, (v * inverse).to(tl.float8e4nv), mask=j < n)
        tl.store(scales + row, amax * unit)
    else:
        if BESIDE:
            _blocks(w.to(tl.float32), codes, scales, whole, 0, m, row, m + n, wide, C, FORM)
            _blocks(z.to(tl.float32), codes, scales, whole, C, m, row, m + n, wide, D, FORM)
        _blocks(u, codes, scales, whole, m, m + n, row, m + n, wide, A, FORM)
        _blocks(v, codes, scales, whole, m + A, m + n, row, m + n, wide, B, FORM)


@kernel
def _normed_turned(x, weight, c, s, HEADS: tl.constexpr, D: tl.constexpr):
    """x (HEADS, D) float32 -> RMSNorm with weight (1, D), pairs turned by c, s (1, D / 2)."""
    x = x * tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + 1e-6)[:, None] * weight
    a, b = tl.split(tl.reshape(x, (HEADS, D // 2, 2)))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), (HEADS, D))


@kernel
def qk_norm_rope_kernel(
    qkv, q_weight, k_weight, cos, sin, q, k, v, rows, heads, start, total, qkv_batch, qkv_row,
    HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """`rows` rows of q | k | v -> rows start, start + 1, ... of q, k, v (B, total, heads, D)."""
    token = tl.program_id(0).to(tl.int64)
    b, line = token // rows, token % rows
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d, half = tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :]
    mask = head[:, None] < heads
    source = qkv + b * qkv_batch + line * qkv_row + head[:, None] * D + d
    place = ((b * total + start + line) * heads + head[:, None]) * D + d
    c = tl.load(cos + (start + line) * (D // 2) + half)
    s = tl.load(sin + (start + line) * (D // 2) + half)
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + heads * D, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(source + 2 * heads * D, mask=mask, other=0.0)
    x = _normed_turned(x, tl.load(q_weight + d).to(tl.float32), c, s, HEADS, D)
    y = _normed_turned(y, tl.load(k_weight + d).to(tl.float32), c, s, HEADS, D)
    tl.store(q + place, x.to(q.dtype.element_ty), mask=mask)
    tl.store(k + place, y.to(k.dtype.element_ty), mask=mask)
    tl.store(v + place, z, mask=mask)


@kernel(do_not_specialize=["seed"])
def requantize_kernel(weight, scale, codes, n, scale_row, seed, BLOCK: tl.constexpr):
    """BLOCK elements of one row; n is a multiple of 4, so that no row starts within a counter."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    mask = i < n
    counter = (row * n + first) // 4 + tl.arange(0, BLOCK // 4)
    r0, r1, r2, r3 = tl.randint4x(seed, counter)  # pyright: ignore
    random = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    random = random.to(tl.int32, bitcast=True) & 0xFFFFF
    x = tl.load(weight + row * n + i, mask=mask, other=0.0).to(tl.float32)
    v = x * tl.div_rn(1.0, tl.load(scale + row * scale_row))
    size = tl.minimum(tl.abs(v), 448.0)
    normal = ((size.to(tl.int32, bitcast=True) + random) >> 20) - 960
    tiny = ((tl.minimum(size, 0.015625) * 536870912.0).to(tl.int32) + random) >> 20
    code = tl.minimum(tl.where(size < 0.015625, tiny, normal), 0x7E)
    code = tl.where(v.to(tl.int32, bitcast=True) < 0, code | 0x80, code)
    code = tl.where(v == v, code, 0x7F)
    tl.store(codes + row * n + i, code.to(tl.uint8), mask=mask)
