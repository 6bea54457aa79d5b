"""What stands around the matrix products, in Triton: one read and one write of each activation.

The kernels are in `row_kernels`, a row to a program; here are their launches, where they may run,
and what the compile gate compiles. What each operation means is said in `reference` and, for codes
with a scale for each block, in `block_codes`.
"""

from typing import Any

import torch
from torch import Tensor

from .block_codes import FORMS, from_rows
from .jit import triton_missing
from .reference import E4M3, E4M3_MAX
from .row_kernels import (
    gated_add_kernel,
    modulate_quantize_kernel,
    qk_norm_rope_kernel,
    quantize_rows_kernel,
    requantize_kernel,
    swiglu_quantize_kernel,
)
from .table import Case, register

PRIORITY = 100
HEADS = 16  # heads of one token in one program of qk_norm_rope
SAME = "same"  # a form: numbers in the dtype of what comes in
FLAT = 1024  # elements in one program of requantize
WIDEST = 32768  # numbers in a row that registers hold
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


# ------------------------------------- launches, on the GPU that holds the tensors, current or not


def blocks(n: int) -> tuple[int, int]:
    """A and B, powers of two: A the largest below n, B the least that covers the rest."""
    a = 1 << max(n - 1, 1).bit_length() - 1
    return a, 1 << max(n - a - 1, 0).bit_length()


def row_warps(n: int) -> int:
    """Warps of a program, by the numbers of a row that it holds. Few are best where a row is summed
    up several times: 2, 4, 8 and 16 were timed on an H200 at FLUX.2's widths."""
    return 4 if n <= 6144 else 8 if n <= 16384 else 16


def norm_warps(n: int, form: str, gated: bool) -> int:
    return row_warps(n) if gated or form in FORMS else 2


def _lines(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _made(x: Tensor, rows: int, n: int, form: str) -> tuple[Tensor, Any, int]:
    """Memory for codes and scales, and how many tiles of scales lie beside each other."""
    if form == SAME:
        return torch.empty((rows, n), dtype=x.dtype, device=x.device), None, 0
    if form == "fp8":
        codes = torch.empty((rows, n), dtype=E4M3, device=x.device)
        return codes, torch.empty((rows, 1), dtype=torch.float32, device=x.device), 0
    block, width, kind, scale_kind = FORMS[form]
    wide = -(-n // block // 4)
    codes = torch.empty((rows, n // width), dtype=kind, device=x.device)
    size = (-(-rows // 128) * 128, wide * 4)
    return codes, torch.zeros(size, dtype=torch.uint8, device=x.device).view(scale_kind), wide


def _quantize(
    x: Tensor, form: str, whole: Tensor | None, top: float = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    x = _lines(x)
    (rows, n), (a, b) = x.shape, blocks(x.shape[1])
    codes, scale, wide = _made(x, rows, n, form)
    if rows:
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(rows,)](
                x, codes, scale, whole, top, 1 / top, n, wide, x.stride(0), FORM=form, A=a, B=b,
                num_warps=row_warps(n),
            )  # fmt: skip
    return codes, scale


def _modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    form: str,
    whole: Tensor | None,
    top: float = E4M3_MAX,
) -> tuple[Tensor, Tensor, Tensor]:
    x, shift, scale = _lines(x), _lines(shift), _lines(scale)
    new, y_strides, gate_batch = x, (0, 0), 0
    if y is not None and gate is not None:
        y, gate = _lines(y), _lines(gate)
        new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y_strides, gate_batch = y.stride()[:2], gate.stride(0)
    (batch, rows, n), (a, b) = x.shape, blocks(x.shape[2])
    codes, scales, wide = _made(x, batch * rows, n, form)
    if batch * rows:
        with torch.cuda.device_of(x):
            modulate_quantize_kernel[(batch * rows,)](
                x, y, gate, shift, scale, None if y is None else new, codes, scales, whole,
                top, 1 / top, rows, n, wide, 1 / n, *x.stride()[:2], *y_strides, gate_batch,
                shift.stride(0), scale.stride(0), FORM=form, GATED=y is not None, A=a, B=b,
                num_warps=norm_warps(n, form, y is not None),
            )  # fmt: skip
    return new, codes, scales


def _swiglu(
    mlp: Tensor,
    attention: Tensor | None,
    form: str,
    whole: Tensor | None,
    top: float = E4M3_MAX,
) -> tuple[Tensor, Tensor]:
    mlp = _lines(mlp)
    rows, n = mlp.shape[0], mlp.shape[1] // 2
    m, attention_row = 0, 0
    if attention is not None:
        attention = _lines(attention)
        m, attention_row = attention.shape[1], attention.stride(0)
    (a, b), (c, d) = blocks(n), blocks(m)
    codes, scales, wide = _made(mlp, rows, m + n, form)
    if rows:
        with torch.cuda.device_of(mlp):
            swiglu_quantize_kernel[(rows,)](
                mlp, attention, codes, scales, whole, top, 1 / top, n, m, wide, mlp.stride(0),
                attention_row, FORM=form, BESIDE=m > 0, A=a, B=b, C=c, D=d, num_warps=row_warps(n),
            )  # fmt: skip
    return codes, scales


def quantize_rows(x: Tensor, maximum: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    return _quantize(x, "fp8", None, maximum)


def modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, maximum: float = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    return _modulate(x, None, None, shift, scale, "fp8", None, maximum)[1:]


def gated_modulate_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    maximum: float = E4M3_MAX,
) -> tuple[Tensor, Tensor, Tensor]:
    return _modulate(x, y, gate, shift, scale, "fp8", None, maximum)


def swiglu_quantize(
    mlp: Tensor, attention: Tensor | None = None, maximum: float = E4M3_MAX
) -> tuple[Tensor, Tensor]:
    return _swiglu(mlp, attention, "fp8", None, maximum)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return _modulate(x, None, None, shift, scale, SAME, None)[1].view(x.shape)


def gated_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    new, out, _ = _modulate(x, y, gate, shift, scale, SAME, None)
    return new, out.view(x.shape)


def swiglu(mlp: Tensor, attention: Tensor | None = None) -> Tensor:
    return _swiglu(mlp, attention, SAME, None)[0]


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    x, y, gate = _lines(x), _lines(y), _lines(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (batch, rows, n), (a, b) = x.shape, blocks(x.shape[2])
    if batch * rows:
        with torch.cuda.device_of(x):
            gated_add_kernel[(batch * rows,)](
                x, y, gate, out, rows, n, *x.stride()[:2], *y.stride()[:2], gate.stride(0),
                A=a, B=b, num_warps=4,
            )  # fmt: skip
    return out


def quantize_blocks(
    x: Tensor, form: str, whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    whole = from_rows(lambda: quantize_rows(x)[1], form, whole, x)
    return *_quantize(x, form, whole), whole


def modulate_quantize_blocks(
    x: Tensor, shift: Tensor, scale: Tensor, form: str, whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    whole = from_rows(lambda: modulate_quantize(x, shift, scale)[1], form, whole, x)
    return *_modulate(x, None, None, shift, scale, form, whole)[1:], whole


def swiglu_quantize_blocks(
    mlp: Tensor, attention: Tensor | None, form: str, whole: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    whole = from_rows(lambda: swiglu_quantize(mlp, attention)[1], form, whole, mlp)
    return *_swiglu(mlp, attention, form, whole), whole


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
    size = (batch, total, heads, dim)
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
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


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


def _same_refuses(case: Case) -> str | None:
    return _refuses(case, 80, sum(case.widths), fp8=False)


def _heads_refuses(case: Case) -> str | None:
    dim = case.widths[1]
    if dim & (dim - 1) or dim < 16:
        return f"heads of {dim} are not a power of two from 16 on"
    return _refuses(case, 80, dim, fp8=False)


def _blocks_refuse(case: Case) -> str | None:
    odd = [n for n in case.widths[:-1] if n and min(blocks(n)) < 32]
    reason = f"rows of {odd[0]} are too narrow" if odd else None
    return reason or _refuses(case, 100, sum(case.widths[:-1]))


def _requantize_refuses(case: Case) -> str | None:
    if case.widths[0] % 4:
        return f"rows of {case.widths[0]} are not a multiple of 4"
    return _refuses(case, 80, 0, fp8=False)


for _op, _call, _refusal in (
    ("quantize_rows", quantize_rows, _row_refuses),
    ("modulate_quantize", modulate_quantize, _row_refuses),
    ("gated_modulate_quantize", gated_modulate_quantize, _row_refuses),
    ("swiglu_quantize", swiglu_quantize, _row_refuses),
    ("modulate", modulate, _same_refuses),
    ("gated_modulate", gated_modulate, _same_refuses),
    ("gated_add", gated_add, _same_refuses),
    ("swiglu", swiglu, _same_refuses),
    ("qk_norm_rope", qk_norm_rope, _heads_refuses),
    ("requantize", requantize, _requantize_refuses),
    ("quantize_blocks", quantize_blocks, _blocks_refuse),
    ("modulate_quantize_blocks", modulate_quantize_blocks, _blocks_refuse),
    ("swiglu_quantize_blocks", swiglu_quantize_blocks, _blocks_refuse),
):
    register(_op, "triton", PRIORITY, _call, _refusal)


def _gate():
    """What the compile gate compiles: (kernel, argument types, constants, warps, stages, sm_...)."""
    old, new = (80, 86, 89, 90, 100, 120), (89, 90, 100, 120)
    limits = {"top": "fp32", "unit": "fp32"}
    rows = {"x": "*bf16", "n": "i32", "wide": "i32", "x_row": "i32"} | limits
    norm = dict.fromkeys(("shift", "scale"), "*bf16") | {"inverse_n": "fp32", "rows": "i32"}
    norm |= {f"{t}_batch": "i32" for t in ("x", "y", "gate", "shift", "scale")} | {"y_row": "i32"}
    mlp = dict.fromkeys(("mlp", "attention"), "*bf16") | limits
    mlp |= dict.fromkeys(("n", "m", "wide", "mlp_row", "attention_row"), "i32")
    gated = dict.fromkeys(("y", "gate", "x_new"), "*bf16")
    outs = {
        "fp8": ({"codes": "*fp8e4nv", "scales": "*fp32"}, {"whole": None}, new),
        SAME: ({"codes": "*bf16"}, {"whole": None, "scales": None}, old),
        "mxfp8": ({"codes": "*fp8e4nv", "scales": "*u8"}, {"whole": None}, (100, 120)),
        "nvfp4": ({"codes": "*u8", "scales": "*fp8e4nv", "whole": "*fp32"}, {}, (100, 120)),
    }
    for form, (out, none, arches) in outs.items():
        for h in (3072, 4096, 6144):
            one = {"FORM": form, **dict(zip("AB", blocks(h), strict=True)), **none}
            if form != SAME:
                yield quantize_rows_kernel, rows | out, one, row_warps(h), 1, arches
            alone = one | dict.fromkeys(gated) | {"GATED": False}
            warps = norm_warps(h, form, gated=False)
            yield modulate_quantize_kernel, rows | norm | out, alone, warps, 1, arches
            both = one | dict(zip("ABCD", blocks(3 * h) + blocks(h), strict=True))
            both |= {"BESIDE": True}
            yield swiglu_quantize_kernel, mlp | out, both, row_warps(3 * h), 1, arches
            if form in ("fp8", SAME):
                types = rows | norm | gated | out
                yield (
                    modulate_quantize_kernel,
                    types,
                    one | {"GATED": True},
                    row_warps(h),
                    1,
                    arches,
                )
            if form == SAME:
                types = dict.fromkeys(("x", "y", "gate", "out"), "*bf16")
                types |= dict.fromkeys(("rows", "n", "x_batch", "x_row"), "i32")
                types |= dict.fromkeys(("y_batch", "y_row", "gate_batch"), "i32")
                widths = {"A": one["A"], "B": one["B"]}
                yield gated_add_kernel, types, widths, 4, 1, arches
    heads = dict.fromkeys(("qkv", "q_weight", "k_weight", "q", "k", "v"), "*bf16")
    heads |= {"cos": "*fp32", "sin": "*fp32"}
    heads |= dict.fromkeys(("rows", "heads", "start", "total", "qkv_batch", "qkv_row"), "i32")
    yield qk_norm_rope_kernel, heads, {"HEADS": HEADS, "D": 128}, 4, 1, old
    weight = {"weight": "*fp32", "scale": "*fp32", "codes": "*u8", "n": "i32", "seed": "i64"}
    yield requantize_kernel, weight | {"scale_row": "i32"}, {"BLOCK": FLAT}, 4, 1, old


GATE = tuple(_gate())
