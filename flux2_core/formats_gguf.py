"""GGUF's blocks -> float32. A matrix is uint8 (out, bytes of a row); a row is a run of blocks.

Blocks of 32 hold one float16 scale. The K types hold 256 weights in sub-blocks whose own scales
are small integers. Source: the ggml project's description of its types (MIT).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Type(NamedTuple):
    """`weights` in a block of `bytes`; decode: uint8 (n, bytes) -> float32 (n, weights)."""

    weights: int
    bytes: int
    decode: Callable[[Tensor], Tensor]


def decode(rows: Tensor, name: str) -> Tensor:
    """uint8 (out, bytes) of type `name` -> float32 (out, in)."""
    kind = TYPES[name]
    blocks = rows.reshape(-1, kind.bytes)
    return kind.decode(blocks).reshape(rows.shape[0], -1)


def _half(blocks: Tensor, start: int) -> Tensor:
    """A float16 number at byte `start` of each block -> float32 (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(..., n) -> (..., 2, n): the low halves, then the high ones."""
    return torch.stack((packed & 15, packed >> 4), -2)


def _bits(packed: Tensor, count: int, width: int = 1) -> Tensor:
    """(..., n) -> (..., count, n): `count` fields of `width` bits, the lowest first."""
    shifts = torch.arange(count, device=packed.device, dtype=torch.uint8)[:, None] * width
    return packed[..., None, :] >> shifts & (1 << width) - 1


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).flatten(1).float() - 8)


def _q5_0(b: Tensor) -> Tensor:
    """The fifth bits stand apart, that of weight i in bit i."""
    fifth = _bits(b[:, 2:6], 8).transpose(1, 2).flatten(1)
    return _half(b, 0) * ((_nibbles(b[:, 6:]).flatten(1) | fifth << 4).float() - 16)


def _scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, each float32 (n, 8).

    Four of each stand whole in the first eight bytes; their spare top bits complete the nibbles of
    the last four.
    """
    first, second, last = packed.split(4, 1)
    scale = torch.cat((first & 63, last & 15 | first >> 6 << 4), 1)
    least = torch.cat((second & 63, last >> 4 | second >> 6 << 4), 1)
    return scale.float(), least.float()


def _affine(b: Tensor, codes: Tensor) -> Tensor:
    """codes (n, 8, 32) -> d * scale * code - dmin * minimum, sub-block by sub-block."""
    scale, least = _scales(b[:, 4:16])
    step, shift = _half(b, 0) * scale, _half(b, 2) * least
    return (step[..., None] * codes.float() - shift[..., None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _affine(b, _nibbles(b[:, 16:].unflatten(1, (4, 32))).flatten(1, 2))


def _q5_k(b: Tensor) -> Tensor:
    fifth = _bits(b[:, 16:48], 8)  # bit j belongs to sub-block j
    return _affine(b, _nibbles(b[:, 48:].unflatten(1, (4, 32))).flatten(1, 2) | fifth << 4)


def _q6_k(b: Tensor) -> Tensor:
    """Two halves of 128: low four bits, high two bits; a signed scale for each 16 weights."""
    low = _nibbles(b[:, :128].unflatten(1, (2, 64))).unflatten(3, (2, 32)).flatten(2, 3)
    high = _bits(b[:, 128:192].unflatten(1, (2, 32)), 4, 2)
    codes = (low | high << 4).flatten(1).float() - 32
    scale = b[:, 192:208].contiguous().view(torch.int8).float() * _half(b, 208)
    return (codes.unflatten(1, (16, 16)) * scale[..., None]).flatten(1)


def _bf16(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.bfloat16).float()


TYPES = {
    "Q8_0": Type(32, 34, _q8_0),
    "Q5_0": Type(32, 22, _q5_0),
    "Q4_0": Type(32, 18, _q4_0),
    "Q6_K": Type(256, 210, _q6_k),
    "Q5_K": Type(256, 176, _q5_k),
    "Q4_K": Type(256, 144, _q4_k),
    "BF16": Type(1, 2, _bf16),
}
