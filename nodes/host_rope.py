"""Where pictures and references stand, in all the ways that the host's nodes can ask for."""

import torch
from torch import Tensor

from ..flux2_core.positions import kept, near, rope, text_ids

Grid = tuple[int, int, float, int, int]  # height, width, time, row and column of the first token


def places(
    size: tuple[int, int],
    references: tuple,
    method: str,
    step: float,
    origin: tuple[int, int] = (0, 0),
) -> tuple[Grid, ...]:
    """The picture's grid, from `origin` on, and each reference's.

    `index`, FLUX.2's own way, sets references apart in time, `step` apart; `uxo` puts them on the
    diagonal after the picture; `offset` beside each other at time 1.
    """
    grids: list[Grid] = [(*size, 0, *origin)]
    height = width = 0
    for i, (h, w) in enumerate(references):
        if method in ("index", "index_timestep_zero"):
            grids.append((h, w, step * (i + 1), 0, 0))
        elif method == "uxo":
            grids.append((h, w, 0, size[0] + height, size[1] + width))
            height, width = height + h, width + w
        else:
            row, column = (0, width) if h + height > w + width else (height, 0)
            grids.append((h, w, 1, row, column))
            height, width = max(height, h + row), max(width, w + column)
    return tuple(grids)


def ids(text: int, grids: tuple[Grid, ...], bend: tuple) -> tuple[Tensor, Tensor]:
    """-> ids of the text (text, 4) and of the grids (L, 4), (t, row, column, l), on the CPU.

    `bend` holds the host's rope options as sorted pairs: scales and shifts of the grids.
    """
    options = dict(bend)
    parts = []
    for h, w, t, row, column in grids:
        y, x = row + options.get("shift_y", 0.0), column + options.get("shift_x", 0.0)
        grid = torch.zeros(h, w, 4)
        grid[..., 0] = t + options.get("shift_t", 0.0)
        grid[..., 1] = torch.linspace(y, y + (h - 1) * options.get("scale_y", 1.0), h)[:, None]
        grid[..., 2] = torch.linspace(x, x + (w - 1) * options.get("scale_x", 1.0), w)
        parts.append(grid.reshape(-1, 4))
    return text_ids(text).float(), torch.cat(parts)


def angles(points: Tensor, axes_dim: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """ids (..., 4) -> cos, sin, each (..., D / 2)."""
    cos, sin = rope(points.reshape(-1, points.shape[-1]), axes_dim, theta)
    shape = (*points.shape[:-1], -1)
    return cos.reshape(shape), sin.reshape(shape)


@kept
def table(text: int, grids: tuple[Grid, ...], bend: tuple, axes_dim, theta, device):
    """cos, sin of [text, grids], each (T, D / 2)."""
    with torch.inference_mode(False), torch.no_grad():
        points = near(torch.cat(ids(text, grids, bend)), device)
        cos, sin = angles(points, axes_dim, theta)
    return cos.to(device), sin.to(device)
