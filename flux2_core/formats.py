"""Quantised weights: codecs as pure functions between the numbers of a file and a matrix.

A quantised matrix (out, in) is a `Packed`: the name of its format and the tensors it is made of,
under the names that files give them. Products are taken in float32 and rounded once, to whatever
dtype is asked for. GGUF's blocks are in `formats_gguf`.
Source: the formats as ComfyUI's, Black Forest Labs' and NVIDIA's files hold them; OCP Microscaling
Formats 1.0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import formats_gguf as gguf
from .errors import Flux2Error

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FP8_MAX = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7; bit 3 is the sign
E2M1_MAX = 6.0
# Where a magnitude turns into the next code; halfway cases go to the even one.
_UP_AFTER, _UP_FROM = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)
NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
E8M0_BIAS = 127
CHUNK = 4096  # rows decoded at once


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix of shape (out, in) as a file stores it; `parts` are the file's own tensors."""

    format: str
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (out, in), made anew at every call, some rows at a time: what is decoded in float32
        never takes much more room than the result."""
        if self.shape[0] <= CHUNK:
            return FORMATS[self.format].decode(self).to(dtype)
        out = torch.empty(self.shape, dtype=dtype, device=self.parts["weight"].device)
        for start in range(0, self.shape[0], CHUNK):
            part = self.rows(start, min(start + CHUNK, self.shape[0]))
            out[start : start + part.shape[0]] = FORMATS[self.format].decode(part)
        return out

    def rows(self, start: int, stop: int) -> "Packed":
        """Rows of the matrix, `start` a multiple of 128; nothing is copied."""
        high = self.shape[0]

        def cut(part: Tensor) -> Tensor:
            if part.ndim == 0 or part.numel() == 1:
                return part
            # containers of block scales hold tiles of 128 rows; all others a line for each row
            return part[start : stop if part.shape[0] == high else -(-stop // 128) * 128]

        return Packed(
            self.format, (stop - start, self.shape[1]), {k: cut(v) for k, v in self.parts.items()}
        )

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def to(self, device, non_blocking: bool = False) -> "Packed":
        parts = {k: v.to(device, non_blocking=non_blocking) for k, v in self.parts.items()}
        return Packed(self.format, self.shape, parts)


class Format(NamedTuple):
    """How a format is read, written (None: it is not) and joined along rows."""

    decode: Callable[[Packed], Tensor]
    encode: Callable[[Tensor], Mapping[str, Tensor]] | None
    stack: Callable[[Sequence[Packed]], dict[str, Tensor]]


def encode(weight: Tensor, format: str) -> Packed:
    """(out, in), finite -> Packed. Raises Flux2Error for a format that is only read."""
    write = FORMATS[format].encode if format in FORMATS else None
    if write is None:
        known = ", ".join(name for name, f in FORMATS.items() if f.encode)
        raise Flux2Error("This format is not written here", format, f"Use one of {known}")
    return Packed(format, (weight.shape[0], weight.shape[1]), write(weight.float()))


def stack(pieces: Sequence[Packed]) -> Packed:
    """Matrices of one format and width, one below the other: split q, k, v become one. Exact."""
    kinds = {piece.format for piece in pieces}
    if len(kinds) > 1:
        raise Flux2Error(
            "One layer of the file is stored in several formats",
            ", ".join(sorted(kinds)),
            "Choose an unmodified file",
        )
    shape = (sum(piece.shape[0] for piece in pieces), pieces[0].shape[1])
    return Packed(pieces[0].format, shape, FORMATS[pieces[0].format].stack(pieces))


# ---------------------------------------------------------------------------- fp8, int8: one scale


def _scaled(packed: Packed) -> Tensor:
    """codes * scale; the scale for all, for each row, or absent (1)."""
    codes, scale = packed.parts["weight"].float(), packed.parts.get("weight_scale")
    if scale is None:
        return codes
    return codes * (scale.float() if scale.numel() == 1 else scale.float().reshape(-1, 1))


def _row_scales(pieces: Sequence[Packed]) -> dict[str, Tensor]:
    """A scale for each row holds what the pieces' own scales say."""
    scales = []
    for piece in pieces:
        scale = piece.parts.get("weight_scale")
        scale = torch.ones((), device=piece.parts["weight"].device) if scale is None else scale
        scales.append(scale.float().reshape(-1, 1).expand(piece.shape[0], 1))
    return {"weight": _joined(pieces, "weight"), "weight_scale": torch.cat(scales)}


def _joined(pieces: Sequence[Packed], part: str) -> Tensor:
    tensors = [piece.parts[part] for piece in pieces]
    if tensors[0].element_size() > 1:
        return torch.cat(tensors)
    kind = tensors[0].dtype  # not every backend joins fp8
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(kind)


def _write_fp8(name: str):
    def write(weight: Tensor) -> dict[str, Tensor]:
        """One scale for each row, amax / largest."""
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / FP8_MAX[name]
        return {"weight": (weight / scale).to(FP8[name]), "weight_scale": scale}

    return write


def _write_int8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return {"weight": (weight / scale).round().clamp(-127, 127).char(), "weight_scale": scale}


# --------------------------------------------------------------------------- nvfp4, mxfp8: blocks


def swizzle(scales: Tensor) -> Tensor:
    """(rows, columns) of block scales -> the order of tensor cores, padded to 128 rows and 4
    columns: tiles of 128 x 4, in each of which row r stands at (r % 32, r // 32)."""
    rows, columns = scales.shape
    high, wide = math.ceil(rows / 128), math.ceil(columns / 4)
    padded = torch.zeros(high * 128, wide * 4, dtype=torch.uint8, device=scales.device)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.reshape(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4).view(scales.dtype)


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle`; the container's own shape says nothing."""
    high, wide = math.ceil(rows / 128), math.ceil(columns / 4)
    tiles = scales.view(torch.uint8).reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4)[:rows, :columns].contiguous().view(scales.dtype)


def e2m1_decode(codes: Tensor) -> Tensor:
    """uint8 (out, in / 2), the even element in the high half -> float32 (out, in)."""
    pairs = torch.stack((codes >> 4, codes & 15), -1).flatten(-2)
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=codes.device)
    return table[pairs.long()]


def e2m1_encode(x: Tensor) -> Tensor:
    """(out, in) -> uint8 (out, in / 2): the nearest code, halfway to the even one, the largest for
    whatever lies beyond."""
    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for limit in _UP_AFTER:
        code += size > limit
    for limit in _UP_FROM:
        code += size >= limit
    code += 8 * (x < 0)
    return code[..., 0::2] << 4 | code[..., 1::2]


def _blocks(packed: Packed, size: int) -> Tensor:
    """The scales of the blocks as they lie in the matrix."""
    rows, columns = packed.shape
    return unswizzle(packed.parts["weight_scale"], rows, columns // size)


def _nvfp4(packed: Packed) -> Tensor:
    scales = _blocks(packed, NVFP4_BLOCK).float() * packed.parts["weight_scale_2"].float()
    values = e2m1_decode(packed.parts["weight"]).unflatten(1, (-1, NVFP4_BLOCK))
    return (values * scales[..., None]).flatten(1)


def _write_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.unflatten(1, (-1, NVFP4_BLOCK))
    whole = weight.abs().amax().clamp_min(1e-12) / (FP8_MAX["float8_e4m3fn"] * E2M1_MAX)
    scales = (blocks.abs().amax(-1) / (E2M1_MAX * whole)).to(torch.float8_e4m3fn)
    step = scales.float() * whole
    codes = e2m1_encode((blocks / step.clamp_min(1e-30)[..., None]).flatten(1))
    return {"weight": codes, "weight_scale": swizzle(scales), "weight_scale_2": whole}


def _stack_nvfp4(pieces: Sequence[Packed]) -> dict[str, Tensor]:
    """Each piece has a scale of its own over its blocks: one for each row holds them all."""
    whole = [p.parts["weight_scale_2"].float().reshape(-1, 1).expand(p.shape[0], 1) for p in pieces]
    return _stack_blocks(pieces, NVFP4_BLOCK) | {"weight_scale_2": torch.cat(whole)}


def _mxfp8(packed: Packed) -> Tensor:
    exponents = _blocks(packed, MXFP8_BLOCK).view(torch.uint8).float() - E8M0_BIAS
    values = packed.parts["weight"].float().unflatten(1, (-1, MXFP8_BLOCK))
    return (values * torch.exp2(exponents)[..., None]).flatten(1)


def _write_mxfp8(weight: Tensor) -> dict[str, Tensor]:
    """The exponent is that of the smallest power of two that keeps the block within range."""
    blocks = weight.unflatten(1, (-1, MXFP8_BLOCK))
    most = blocks.abs().amax(-1).clamp_min(2.0**-100) / FP8_MAX["float8_e4m3fn"]
    exponents = torch.ceil(torch.log2(most))
    codes = (blocks / torch.exp2(exponents)[..., None]).flatten(1).to(torch.float8_e4m3fn)
    scales = (exponents + E8M0_BIAS).clamp(0, 254).to(torch.uint8)
    return {"weight": codes, "weight_scale": swizzle(scales)}


def _stack_blocks(pieces: Sequence[Packed], size: int) -> dict[str, Tensor]:
    scales = [_blocks(piece, size).view(torch.uint8) for piece in pieces]
    kind = pieces[0].parts["weight_scale"].dtype
    return {
        "weight": _joined(pieces, "weight"),
        "weight_scale": swizzle(torch.cat(scales)).view(kind),
    }


# -------------------------------------------------------------------------------------------- all


def _gguf(packed: Packed) -> Tensor:
    return gguf.decode(packed.parts["weight"], packed.format.removeprefix("gguf "))


FORMATS: dict[str, Format] = {
    **{name: Format(_scaled, _write_fp8(name), _row_scales) for name in FP8},
    "int8_tensorwise": Format(_scaled, _write_int8, _row_scales),
    "nvfp4": Format(_nvfp4, _write_nvfp4, _stack_nvfp4),
    "mxfp8": Format(_mxfp8, _write_mxfp8, lambda pieces: _stack_blocks(pieces, MXFP8_BLOCK)),
    **{
        f"gguf {name}": Format(_gguf, None, lambda pieces: {"weight": _joined(pieces, "weight")})
        for name in gguf.TYPES
    },
}
