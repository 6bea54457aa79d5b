"""The operations in plain PyTorch, some rows at a time: what is wide stays in the processor's cache
and never takes much memory. Codes are those of `reference`, bit for bit.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import E4M3, E4M3_MAX, E4M3_NAN, EPS, SMALLEST_AMAX
from .table import Case, register

PRIORITY = 10
CPU_CHUNK, CHUNK = 1 << 18, 1 << 24  # elements at a time: what fits the cache, what fills a GPU
WEIGHT_CHUNK = 1 << 21  # elements of a weight decoded at a time


def _chunks(rows: int, width: int, device: torch.device, least: int = 1) -> Iterator[slice]:
    """Rows in groups of about a chunk, each a multiple of `least` long, but for the last."""
    elements = CPU_CHUNK if device.type == "cpu" else CHUNK
    step = max(1, elements // (width * least or 1)) * least
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _made(x: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((rows, width), dtype=E4M3, device=x.device),
        torch.empty((rows, 1), dtype=torch.float32, device=x.device),
    )


def _quantize(x: Tensor, codes: Tensor, scale: Tensor, maximum: float) -> None:
    """Rows of float32, which are used up, into codes and scale."""
    amax = x.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST_AMAX)
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    x.mul_(torch.full_like(amax, maximum) / amax).clamp_(-maximum, maximum)
    codes.copy_(x)
    codes.view(torch.uint8).masked_fill_(amax.isnan(), E4M3_NAN)
    torch.mul(amax, torch.full_like(amax, 1 / maximum), out=scale)


def _own(x: Tensor) -> Tensor:
    """float32, never x itself."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def quantize_rows(x: Tensor, maximum: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    codes, scale = _made(x, x.shape[0], x.shape[1])
    for part in _chunks(x.shape[0], x.shape[1], x.device):
        _quantize(_own(x[part]), codes[part], scale[part], maximum)
    return codes, scale


def _modulated(
    x: Tensor, shift: Tensor, scale: Tensor, maximum: float, codes: Tensor, scales: Tensor
) -> None:
    """x (l, h), shift and 1 + scale (1, h) in float32."""
    normal = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    _quantize(normal.mul_(scale).add_(shift), codes, scales, maximum)


def modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, maximum: float = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    batch, rows, width = x.shape
    codes, scales = _made(x, batch * rows, width)
    places = [t.unflatten(0, (batch, rows)) for t in (codes, scales)]
    for b in range(batch):
        sides = shift[b].float(), 1 + scale[b].float(), maximum
        for part in _chunks(rows, width, x.device):
            _modulated(x[b, part], *sides, *(place[b, part] for place in places))
    return codes, scales


def gated_modulate_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    maximum: float = E4M3_MAX,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, width = x.shape
    new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes, scales = _made(x, batch * rows, width)
    places = [t.unflatten(0, (batch, rows)) for t in (codes, scales)]
    for b in range(batch):
        sides, g = (shift[b].float(), 1 + scale[b].float(), maximum), gate[b].float()
        for part in _chunks(rows, width, x.device):
            new[b, part] = x[b, part].float().add(_own(y[b, part]).mul_(g))
            _modulated(new[b, part], *sides, *(place[b, part] for place in places))
    return new, codes, scales


def swiglu_quantize(
    mlp: Tensor, attention: Tensor | None = None, maximum: float = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    rows, n = mlp.shape[0], mlp.shape[1] // 2
    m = 0 if attention is None else attention.shape[1]
    codes, scale = _made(mlp, rows, m + n)
    for part in _chunks(rows, m + 2 * n, mlp.device):
        size = part.stop - part.start
        wide = torch.empty((size, m + n), dtype=torch.float32, device=mlp.device)
        if attention is not None:
            wide[:, :m] = attention[part]
        first, second = mlp[part].float().chunk(2, -1)
        torch.mul(F.silu(first), second, out=wide[:, m:])
        _quantize(wide, codes[part], scale[part], maximum)
    return codes, scale


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
    (batch, _, width), dim = qkv.shape, q_weight.shape[0]
    size = (batch, cos.shape[0], width // (3 * dim), dim)
    like = {"dtype": qkv.dtype, "device": qkv.device}
    out = [torch.empty(size, **like).transpose(1, 2) for _ in range(3)]
    start, parts = 0, [(qkv, q_weight, k_weight)]
    if text is not None and text_q_weight is not None and text_k_weight is not None:
        parts.insert(0, (text, text_q_weight, text_k_weight))
    for packed, q_scale, k_scale in parts:
        for part in _chunks(packed.shape[1], batch * width, qkv.device):
            to = slice(start + part.start, start + part.stop)
            made = reference.qk_norm_rope(packed[:, part], q_scale, k_scale, cos[to], sin[to])
            for place, x in zip(out, made, strict=True):
                place[:, :, to] = x
        start += packed.shape[1]
    return out[0], out[1], out[2]


def requantize(weight: Tensor, scale: Tensor, seed: int) -> Tensor:
    codes = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    scale = scale.reshape(-1, 1).expand(weight.shape[0], 1)
    rows, width = weight.shape
    for part in _chunks(rows, width, weight.device, least=4):
        start = part.start * width
        codes[part] = reference.requantize(weight[part], scale[part], seed, start)
    return codes


# ------------------------------------------------------------------------- weights of fp8 on a CPU


def cpu_weight_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """As `reference.fp8_weight_linear` for bfloat16: rounded before and after the scale. A slice of
    the weight is decoded, multiplied and forgotten while it is in the cache."""
    (columns, depth), size = weight.shape, x.shape[0]
    step = max(64, WEIGHT_CHUNK // depth // 64 * 64)
    scale = weight_scale.float().reshape(-1, 1).expand(columns, 1)
    bits = torch.empty((min(step, columns), depth), dtype=torch.int16)
    out = torch.empty((size, columns), dtype=x.dtype)
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        slice_, factor = decode(weight[part], bits[: part.stop - start], scale[part])
        y = F.linear(x, slice_)
        if size == 1:
            out[:, part] = y.float() * factor.T
            continue
        for rows in _chunks(size, y.shape[1], x.device):
            out[rows, part] = y[rows].float().mul_(factor.T)
    return out


def decode(codes: Tensor, bits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """codes (R, K), memory int16 (R, K), scale (R, 1) -> bfloat16 (R, K) in that memory, exact, and
    the scale, NaN for rows with a NaN code."""
    broken = (codes.view(torch.uint8) & 0x7F).amax(1, keepdim=True) == E4M3_NAN
    return shifted(codes, bits), scale.masked_fill(broken, torch.nan)


def shifted(codes: Tensor, bits: Tensor) -> Tensor:
    """e4m3 codes, int16 memory of their shape -> bfloat16 in that memory, exact but for NaN: 480.

    A CPU has no instruction for it, and PyTorch's own conversion takes six times as long. Sign and the
    other seven bits, moved to their places in bfloat16, make the number times 2^-120; so small that
    matrix instructions take it for zero, which is why the factor is not left to the scale.
    """
    bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000)
    return bits.view(torch.bfloat16).mul_(2.0**120)


def _cpu_refuses(case: Case) -> str | None:
    if case.device.type != "cpu":
        return "it is made for a CPU"
    return None if case.dtypes[0] == torch.bfloat16 else "it takes bfloat16 alone"


for _name in (
    "quantize_rows",
    "modulate_quantize",
    "gated_modulate_quantize",
    "swiglu_quantize",
    "qk_norm_rope",
    "requantize",
):
    register(_name, "eager", PRIORITY, globals()[_name])
register("fp8_weight_linear", "cpu", 2 * PRIORITY, cpu_weight_linear, _cpu_refuses)
