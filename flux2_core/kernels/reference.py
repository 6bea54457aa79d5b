"""What each operation means, in plain PyTorch: the specification, and what any device can run.

Everything is computed in float32 (float64 where an input is float64: so tests check the formulas)
and rounded once, to the result's dtype. Codes are float8_e4m3fn, a scale for each row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
SMALLEST_AMAX = 1e-12  # a row of zeros has this for its largest magnitude
EPS = 1e-6


def wide(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic is done in."""
    return x if x.dtype == torch.float64 else x.float()


# -------------------------------------------------------------------------------------- quantising


def quantize_rows(x: Tensor, maximum: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    """x (R, K) -> codes (R, K), scale float32 (R, 1), x about codes * scale. Bit for bit the same
    in every implementation:

    amax = the row's largest magnitude, at least 1e-12; codes = x * (maximum / amax), the quotient
    rounded as IEEE says, clamped to +-maximum (casts of PyTorch before 2.12 turn more than 448 into
    NaN), rounded to nearest, ties to even; scale = amax * (1 / maximum). A row that holds NaN or
    infinity has NaN for its scale and for all codes, so that it shows in whatever is made of it.
    `maximum`, itself a code, is less than e4m3's own 448 where sums of products must stay small.
    """
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX)
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    top = torch.full_like(amax, maximum)
    codes = (x * (top / amax)).clamp(-maximum, maximum).to(E4M3)
    # the sign of a NaN differs between processors
    codes = codes.view(torch.uint8).masked_fill_(amax.isnan(), E4M3_NAN).view(E4M3)
    return codes, amax * torch.full_like(amax, 1 / maximum)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, h), shift and scale (B, 1, h) -> LayerNorm(x) (1 + scale) + shift, (B, L, h)."""
    normal = F.layer_norm(wide(x), x.shape[-1:], eps=EPS)
    return normal * (1 + wide(scale)) + wide(shift)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y (B, L, h), gate (B, 1, h) -> x + gate y, rounded to x's dtype."""
    return (wide(x) + wide(gate) * wide(y)).to(x.dtype)


def activated(mlp: Tensor, attention: Tensor | None = None) -> Tensor:
    """mlp (R, 2n), attention (R, m) -> [attention, silu(mlp's first half) * second half]."""
    first, second = wide(mlp).chunk(2, -1)
    y = F.silu(first) * second
    return y if attention is None else torch.cat((wide(attention), y), -1)


def modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, maximum: float = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    """x (B, L, h), shift and scale (B, 1, h) -> codes (B L, h), scale (B L, 1)."""
    return quantize_rows(modulated(x, shift, scale).flatten(0, 1), maximum)


def gated_modulate_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    maximum: float = E4M3_MAX,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y (B, L, h) and gate, shift, scale (B, 1, h) -> x + gate y (B, L, h) in x's dtype, and
    what `modulate_quantize` makes of that: codes (B L, h), scale (B L, 1)."""
    x = gated(x, y, gate)
    return x, *modulate_quantize(x, shift, scale, maximum)


def swiglu_quantize(
    mlp: Tensor, attention: Tensor | None = None, maximum: float = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    """mlp (R, 2n), attention (R, m) or none -> codes (R, m + n), scale (R, 1), one for both."""
    return quantize_rows(activated(mlp, attention), maximum)


# ------------------------------------------------------------------------------------ heads


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
    """qkv (B, L, 3 H D), rows q | k | v, each head-major; weights (D,); cos, sin (T + L, D / 2) as
    `positions.rope` makes them -> q, k, v (B, H, T + L, D) in qkv's dtype, a token's heads beside
    each other in memory: attention's result then lies as the next layer reads it.

    q and k are divided by their root mean square (eps 1e-6), weighted and turned. `text`
    (B, T, 3 H D), if given, comes first, with weights of its own.
    """
    q, k, v = _heads(qkv, q_weight, k_weight)
    if text is not None and text_q_weight is not None and text_k_weight is not None:
        pairs = zip(_heads(text, text_q_weight, text_k_weight), (q, k, v), strict=True)
        q, k, v = (torch.cat(pair, 2) for pair in pairs)
    q, k, v = (x.to(qkv.dtype) for x in (turned(q, cos, sin), turned(k, cos, sin), v))
    return by_token(q), by_token(k), by_token(v)


def by_token(x: Tensor) -> Tensor:
    """x (B, H, L, D) -> the same numbers, laid out as (B, L, H, D), never x itself."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> q, k, v (B, H, L, D), q and k normalised."""
    dim = q_weight.shape[0]
    q, k, v = wide(qkv).unflatten(-1, (3, -1, dim)).permute(2, 0, 3, 1, 4)
    return rms_norm(q, q_weight), rms_norm(k, k_weight), v


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., D) / sqrt(mean of squares + 1e-6) * weight (D,)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * wide(weight)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of x (..., L, D) turned by the angles of cos, sin (L, D / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)


# -------------------------------------------------------------------- products of codes and weights


def fp8_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """codes (M, K) with scale (M, 1), weight (N, K) codes with scale (N, 1) or () -> (M, N)."""
    y = codes.float() @ weight.float().T
    return (y * scale * weight_scale.reshape(1, -1)).to(dtype)


def fp8_weight_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x (M, K), weight (N, K) codes with scale (N, 1) or () -> (M, N) in x's dtype."""
    y = wide(x) @ weight.to(wide(x).dtype).T
    return (y * weight_scale.reshape(1, -1)).to(x.dtype)


# --------------------------------------------------------------------------- stochastic rounding


def requantize(weight: Tensor, scale: Tensor, seed: int, start: int = 0) -> Tensor:
    """weight (N, K), scale (N, 1) or () -> codes (N, K) of weight / scale, rounded at random to
    one of the two codes around it, on average to the number itself. `start`, a multiple of 4: the
    number of weight's first element in a larger matrix.

    The same codes on every device: the random bits are Philox 4x32-10, key `seed`, counter i // 4,
    word i % 4 for the element i, row by row. v = weight * (1 / scale), clamped to +-448; the 20
    bits that a code has no room for carry up when a random number of 20 bits is added.
    """
    v = weight.float() * (1 / scale.float().reshape(-1, 1))
    nan = v.isnan()
    size = v.abs().clamp_max(E4M3_MAX)
    random = random_bits(weight.numel(), seed, weight.device, start).view(weight.shape) & 0xFFFFF
    # float32 minus e4m3: 20 bits of mantissa, 120 of the exponent's bias
    normal = ((size.view(torch.int32) + random) >> 20) - (120 << 3)
    # below 2^-6 the codes are multiples of 2^-9
    tiny = ((size.clamp_max(2.0**-6) * 2.0**29).to(torch.int32) + random) >> 20
    code = torch.where(size < 2.0**-6, tiny, normal).clamp_max(0x7E)
    code = torch.where(v.signbit(), code | 0x80, code)
    return torch.where(nan, E4M3_NAN, code).to(torch.uint8).view(E4M3)


def random_bits(count: int, seed: int, device: torch.device, start: int = 0) -> Tensor:
    """-> int32 (count,): 32 random bits for each element start, start + 1, ...; start % 4 = 0.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    low = 0xFFFFFFFF
    c0 = torch.arange(start // 4, (start + count + 3) // 4, device=device)
    c1, c2, c3 = c0 >> 32, torch.zeros_like(c0), torch.zeros_like(c0)
    c0 = c0 & low
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits, of which the upper half is unsigned
        c0, c1 = ((p2 >> 32) & low) ^ c1 ^ k0, p2 & low
        c2, c3 = ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), -1).to(torch.int32).flatten()[:count]
