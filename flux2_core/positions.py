"""Where each token stands: 4-axis ids (t, row, column, l) and their rotary tables.

Text lives on the last axis only, pictures on the first three. Reference i (from 0) has the time
coordinate 10 + 10 i and its own grid from (0, 0).
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]  # cos, sin

REFERENCE_T = 10  # time coordinate of the first reference, and the step to the next


def text_ids(length: int) -> Tensor:
    """-> (length, 4): (0, 0, 0, l)."""
    ids = torch.zeros(length, 4, dtype=torch.float64)
    ids[:, 3] = torch.arange(length)
    return ids


def picture_ids(height: int, width: int, t: float = 0, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """-> (height * width, 4): (t, row, column, 0), row by row, from `origin` on."""
    ids = torch.zeros(height, width, 4, dtype=torch.float64)
    ids[..., 0] = t
    ids[..., 1] = torch.arange(origin[0], origin[0] + height)[:, None]
    ids[..., 2] = torch.arange(origin[1], origin[1] + width)
    return ids.reshape(-1, 4)


def sequence_ids(
    text: int,
    picture: tuple[int, int],
    references: tuple[tuple[int, int], ...] = (),
    origin: tuple[int, int] = (0, 0),
) -> Tensor:
    """Ids of the whole sequence [text, picture, reference 0, reference 1, ...] -> (T, 4). `origin`:
    row and column of the picture's first token, for a window of a larger one."""
    parts = [text_ids(text), picture_ids(*picture, origin=origin)]
    parts += [picture_ids(h, w, REFERENCE_T * (i + 1)) for i, (h, w) in enumerate(references)]
    return torch.cat(parts)


def rope(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """(T, axes) -> cos, sin, each (T, sum(axes_dim) / 2), float32; angles in float64.

    Frequencies of axis a: theta^(-2i / axes_dim[a]); the axes lie one after the other.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequency = theta ** (
            -torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        )
        angles.append(ids[:, axis, None].double() * frequency)
    angle = torch.cat(angles, -1)
    return angle.cos().float(), angle.sin().float()


def kept(make: Callable[..., Table]) -> Any:
    """Remembers what a table was made of, between steps: one of 20,000 tokens is no small work. A
    compiled graph makes it anew: what is kept would tie it to one size."""
    remembered = lru_cache(maxsize=16)(make)

    @wraps(make)
    def table(*args: Any) -> Table:
        return (make if torch.compiler.is_compiling() else remembered)(*args)

    made: Any = table
    made.cache_clear = remembered.cache_clear
    return made


def near(ids: Tensor, device: torch.device) -> Tensor:
    """Where a table of these ids is made: on the CPU, but in a compiled graph on the GPU itself."""
    on_gpu = torch.compiler.is_compiling() and device.type == "cuda"
    return ids.to(device) if on_gpu else ids


@kept
def rope_table(
    text: int,
    picture: tuple[int, int],
    references: tuple[tuple[int, int], ...],
    axes_dim: tuple[int, ...],
    theta: float,
    device: torch.device,
    origin: tuple[int, int] = (0, 0),
) -> Table:
    """`rope` of a whole sequence."""
    with torch.inference_mode(False), torch.no_grad():
        ids = near(sequence_ids(text, picture, references, origin), device)
        cos, sin = rope(ids, axes_dim, theta)
    return cos.to(device), sin.to(device)


def rotate(x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Turn consecutive pairs (2i, 2i + 1) of x (..., T, D) by the table (T, D / 2), in float32.

    Without a table x stays as it is: a host turns it inside its own attention, after its patches.
    Pairs are complex numbers here: one pass, where sums of products take six. The result lies head
    by head in memory, as attention reads it fastest.
    """
    if cos is None or sin is None:
        return x
    if torch.compiler.is_compiling():  # it fuses sums of products, and no complex numbers
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        return turned.to(x.dtype)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    return turned.to(x.dtype, memory_format=torch.contiguous_format)
