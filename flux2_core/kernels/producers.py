"""What stands around the matrix products, in Triton: one read and one write of each activation.

A program holds a whole row in registers. A row of n numbers is covered by two blocks of A + B, the
largest power of two below n and what is left: FLUX.2's widths (3072, 4096, 6144 and three times
that) leave no lane idle, and only block B needs a mask. Arithmetic is in float32. What each
operation means is said in `reference`; where these kernels run, in `_refuses`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .jit import kernel
from .reference import E4M3
from .table import Case, register

if TYPE_CHECKING:
    import triton.language as tl

PRIORITY = 100
HEADS = 8  # heads of one token in one program of qk_norm_rope
FLAT = 1024  # elements in one program of requantize
WIDEST = 32768  # numbers in a row that registers hold
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# ----------------------------------------------------------------------------------------- kernels


@kernel
def _quantize(u, v, mask, codes, scales, row, n, A: tl.constexpr, B: tl.constexpr):
    """A row in two blocks -> its codes and scale, stored. u and v float32, v 0 where masked."""
    # as whole numbers NaN and infinity exceed all numbers, so that the maximum keeps them
    u_bits = u.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    v_bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.maximum(tl.max(u_bits, 0), tl.max(v_bits, 0))
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), 1e-12)
    amax = tl.where(bits < 0x7F800000, amax, float("nan"))
    inverse = tl.div_rn(448.0, amax)
    # nothing exceeds 448 by more than rounding does, and the cast saturates: no clamp
    out = codes + row * n
    tl.store(out + tl.arange(0, A), (u * inverse).to(tl.float8e4nv))
    tl.store(out + A + tl.arange(0, B), (v * inverse).to(tl.float8e4nv), mask=mask)
    tl.store(scales + row, amax * 0.002232142857142857)


@kernel
def quantize_rows_kernel(x, codes, scales, n, x_row, A: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mask = A + tl.arange(0, B) < n
    line = x + row * x_row
    u = tl.load(line + tl.arange(0, A)).to(tl.float32)
    v = tl.load(line + A + tl.arange(0, B), mask=mask, other=0.0).to(tl.float32)
    _quantize(u, v, mask, codes, scales, row, n, A, B)


@kernel
def modulate_quantize_kernel(
    x, y, gate, shift, scale, x_new, codes, scales, rows, n, inverse_n,
    x_batch, x_row, y_batch, y_row, gate_batch, shift_batch, scale_batch,
    GATED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
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
        u += tl.load(gate + i).to(tl.float32) * tl.load(y + i).to(tl.float32)
        g = tl.load(gate + j, mask=mask, other=0.0).to(tl.float32)
        v += g * tl.load(y + j, mask=mask, other=0.0).to(tl.float32)
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
    _quantize(u, v, mask, codes, scales, row, n, A, B)


@kernel
def _swiglu(mlp, i, n, mask):
    a = tl.load(mlp + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(mlp + n + i, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(1.0 + tl.exp(-a))  # its square is the sigmoid, without a division
    return a * r * r * b


@kernel
def swiglu_quantize_kernel(
    mlp, attention, codes, scales, n, m, mlp_row, attention_row,
    BESIDE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[attention (m, blocks C + D)], silu(mlp's first n) * second n (blocks A + B), quantised."""
    row = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, A), A + tl.arange(0, B)
    mlp += row * mlp_row
    u = _swiglu(mlp, i, n, i < n)
    v = _swiglu(mlp, j, n, j < n)
    u_bits = u.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    v_bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.maximum(tl.max(u_bits, 0), tl.max(v_bits, 0))
    if BESIDE:
        k, o = tl.arange(0, C), C + tl.arange(0, D)
        attention += row * attention_row
        w = tl.load(attention + k)
        z = tl.load(attention + o, mask=o < m, other=0.0)
        w_bits = w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        z_bits = z.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bits = tl.maximum(bits, tl.maximum(tl.max(w_bits, 0), tl.max(z_bits, 0)))
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), 1e-12)
    amax = tl.where(bits < 0x7F800000, amax, float("nan"))
    inverse = tl.div_rn(448.0, amax)
    codes += row * (m + n)
    if BESIDE:
        tl.store(codes + k, (w.to(tl.float32) * inverse).to(tl.float8e4nv))
        tl.store(codes + o, (z.to(tl.float32) * inverse).to(tl.float8e4nv), mask=o < m)
    tl.store(codes + m + i, (u * inverse).to(tl.float8e4nv))
    tl.store(codes + m + j, (v * inverse).to(tl.float8e4nv), mask=j < n)
    tl.store(scales + row, amax * 0.002232142857142857)


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
    """`rows` rows of q | k | v -> rows start, start + 1, ... of q, k, v (B, heads, total, D)."""
    token = tl.program_id(0).to(tl.int64)
    b, line = token // rows, token % rows
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d, half = tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :]
    mask = head[:, None] < heads
    source = qkv + b * qkv_batch + line * qkv_row + head[:, None] * D + d
    place = ((b * heads + head[:, None]) * total + start + line) * D + d
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


# ------------------------------------- launches, on the GPU that holds the tensors, current or not


def blocks(n: int) -> tuple[int, int]:
    """A and B, powers of two: A the largest below n, B the least that covers the rest."""
    a = 1 << max(n - 1, 1).bit_length() - 1
    return a, 1 << max(n - a - 1, 0).bit_length()


def row_warps(n: int) -> int:
    return 4 if n <= 4096 else 8


def _lines(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _made(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty((rows, columns), dtype=E4M3, device=x.device)
    return codes, torch.empty((rows, 1), dtype=torch.float32, device=x.device)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _lines(x)
    (rows, n), (a, b) = x.shape, blocks(x.shape[1])
    codes, scale = _made(x, rows, n)
    if rows:
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(rows,)](
                x, codes, scale, n, x.stride(0), A=a, B=b, num_warps=row_warps(n)
            )
    return codes, scale


def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _modulate(x, None, None, shift, scale)[1:]


def gated_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _modulate(x, y, gate, shift, scale)


def _modulate(x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor):
    x, shift, scale = _lines(x), _lines(shift), _lines(scale)
    new, y_strides, gate_batch = x, (0, 0), 0
    if y is not None and gate is not None:
        y, gate = _lines(y), _lines(gate)
        new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y_strides, gate_batch = y.stride()[:2], gate.stride(0)
    (batch, rows, n), (a, b) = x.shape, blocks(x.shape[2])
    codes, scales = _made(x, batch * rows, n)
    if batch * rows:
        with torch.cuda.device_of(x):
            modulate_quantize_kernel[(batch * rows,)](
                x, y, gate, shift, scale, None if y is None else new, codes, scales,
                rows, n, 1 / n, *x.stride()[:2], *y_strides, gate_batch, shift.stride(0),
                scale.stride(0), GATED=y is not None, A=a, B=b, num_warps=row_warps(n),
            )  # fmt: skip
    return new, codes, scales


def swiglu_quantize(mlp: Tensor, attention: Tensor | None = None) -> tuple[Tensor, Tensor]:
    mlp = _lines(mlp)
    rows, n = mlp.shape[0], mlp.shape[1] // 2
    m, attention_row = 0, 0
    if attention is not None:
        attention = _lines(attention)
        m, attention_row = attention.shape[1], attention.stride(0)
    (a, b), (c, d) = blocks(n), blocks(m)
    codes, scales = _made(mlp, rows, m + n)
    if rows:
        with torch.cuda.device_of(mlp):
            swiglu_quantize_kernel[(rows,)](
                mlp, attention, codes, scales, n, m, mlp.stride(0), attention_row,
                BESIDE=m > 0, A=a, B=b, C=c, D=d, num_warps=row_warps(n),
            )  # fmt: skip
    return codes, scales


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    text: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, _, width), dim, total = qkv.shape, q_weight.shape[0], cos.shape[0]
    heads = width // (3 * dim)
    size = (batch, heads, total, dim)
    q, k, v = (torch.empty(size, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    start, parts = 0, [(qkv, q_weight, k_weight)]
    if text is not None and text_q_weight is not None and text_k_weight is not None:
        parts.insert(0, (text, text_q_weight, text_k_weight))
    with torch.cuda.device_of(qkv):
        for packed, weight, other in parts:
            packed = _lines(packed)
            rows = packed.shape[1]
            if batch * rows:
                qk_norm_rope_kernel[(batch * rows, -(-heads // HEADS))](
                    packed, weight.contiguous(), other.contiguous(), cos, sin, q, k, v,
                    rows, heads, start, total, *packed.stride()[:2],
                    HEADS=HEADS, D=dim, num_warps=4,
                )  # fmt: skip
            start += rows
    return q, k, v


def requantize(weight: Tensor, scale: Tensor, seed: int) -> Tensor:
    weight, scale = weight.contiguous(), scale.float().reshape(-1)
    rows, n = weight.shape
    codes = torch.empty((rows, n), dtype=torch.uint8, device=weight.device)
    if rows and n:
        with torch.cuda.device_of(weight):
            requantize_kernel[(rows, -(-n // FLAT))](
                weight, scale, codes, n, int(scale.numel() > 1), seed, BLOCK=FLAT, num_warps=4
            )
    return codes.view(E4M3)


# ------------------------------------------------------------------------------- where they may run


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    """Why Triton cannot be used here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton: {error}"
    except Exception as error:
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


def _refuses(case: Case, oldest: int, width: int, fp8: bool = True) -> str | None:
    if case.device.type != "cuda" or not case.arch.startswith("sm_"):
        return "it needs an NVIDIA GPU"
    if int(case.arch[3:]) < oldest:
        return f"it needs {'fp8 instructions' if fp8 else 'a newer GPU'}: sm_{oldest} or newer"
    if strange := [str(d) for d in case.dtypes if d not in FLOATS]:
        return f"it does not read {strange[0].removeprefix('torch.')}"
    if width > WIDEST:
        return f"rows of {width} are wider than {WIDEST}"
    return triton_missing()


def _row_refuses(case: Case) -> str | None:
    return _refuses(case, 89, sum(case.widths))


def _heads_refuses(case: Case) -> str | None:
    dim = case.widths[1]
    if dim & (dim - 1) or dim < 16:
        return f"heads of {dim} are not a power of two from 16 on"
    return _refuses(case, 80, dim, fp8=False)


def _requantize_refuses(case: Case) -> str | None:
    if case.widths[0] % 4:
        return f"rows of {case.widths[0]} are not a multiple of 4"
    return _refuses(case, 80, 0, fp8=False)


for _op, _call, _refusal in (
    ("quantize_rows", quantize_rows, _row_refuses),
    ("modulate_quantize", modulate_quantize, _row_refuses),
    ("gated_modulate_quantize", gated_modulate_quantize, _row_refuses),
    ("swiglu_quantize", swiglu_quantize, _row_refuses),
    ("qk_norm_rope", qk_norm_rope, _heads_refuses),
    ("requantize", requantize, _requantize_refuses),
):
    register(_op, "triton", PRIORITY, _call, _refusal)


def _gate():
    """What the compile gate compiles: (kernel, argument types, constants, warps, stages, sm_...)."""
    rows = {"x": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "n": "i32", "x_row": "i32"}
    sides = dict.fromkeys(("y", "gate", "x_new"), "*bf16")
    norm = dict.fromkeys(("shift", "scale"), "*bf16") | {"inverse_n": "fp32", "rows": "i32"}
    norm |= {f"{t}_batch": "i32" for t in ("x", "y", "gate", "shift", "scale")} | {"y_row": "i32"}
    mlp = dict.fromkeys(("n", "m", "mlp_row", "attention_row"), "i32")
    mlp |= {"mlp": "*bf16", "attention": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32"}
    old, new = (80, 86, 89, 90, 100, 120), (89, 90, 100, 120)
    for h in (3072, 4096, 6144):
        one, warps = dict(zip("AB", blocks(h), strict=True)), row_warps(h)
        yield quantize_rows_kernel, rows, one, warps, 1, new
        yield modulate_quantize_kernel, rows | norm | sides, {"GATED": True, **one}, warps, 1, new
        alone = dict.fromkeys(sides) | {"GATED": False, **one}
        yield modulate_quantize_kernel, rows | norm, alone, warps, 1, new
        both = dict(zip("ABCD", blocks(3 * h) + blocks(h), strict=True))
        yield swiglu_quantize_kernel, mlp, {"BESIDE": True, **both}, row_warps(3 * h), 1, new
    heads = dict.fromkeys(("qkv", "q_weight", "k_weight", "q", "k", "v"), "*bf16")
    heads |= {"cos": "*fp32", "sin": "*fp32"}
    heads |= dict.fromkeys(("rows", "heads", "start", "total", "qkv_batch", "qkv_row"), "i32")
    yield qk_norm_rope_kernel, heads, {"HEADS": HEADS, "D": 128}, 4, 1, old
    weight = {"weight": "*fp32", "scale": "*fp32", "codes": "*u8", "n": "i32", "seed": "i64"}
    yield requantize_kernel, weight | {"scale_row": "i32"}, {"BLOCK": FLAT}, 4, 1, old


GATE = tuple(_gate())
