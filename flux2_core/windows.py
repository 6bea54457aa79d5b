"""A large picture through overlapping windows: each at its own place, all of them one picture.

In every step the model looks at one window after the other; positions are those of the whole
picture, velocities are blended where windows overlap (MultiDiffusion, Bar-Tal et al. 2023). Memory and
attention are those of one window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import Flux2Error
from .stream import STOCK, Controls


@dataclass(frozen=True)
class Window:
    """Rows and columns of one window in latent cells of 16 pixels, within a grid of `size` (h, w)."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    @property
    def origin(self) -> tuple[int, int]:
        return self.top, self.left

    def cut(self, x: Tensor) -> Tensor:
        """(..., h, w) -> the window's part."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def windows(height: int, width: int, side: int, overlap: int) -> list[Window]:
    """Windows of at most `side` cells that cover (height, width), sharing at least `overlap` cells
    with their neighbours, evenly spread. Raises Flux2Error where the overlap leaves no window."""
    if side < 1 or not 0 <= overlap < side:
        raise Flux2Error(
            "Windows must be larger than their overlap",
            f"windows of {16 * side} pixels that overlap by {16 * overlap}",
            "Make the window larger or the overlap smaller",
        )
    rows, columns = _spans(height, side, overlap), _spans(width, side, overlap)
    tall, wide = min(side, height), min(side, width)
    return [Window(top, left, tall, wide, (height, width)) for top in rows for left in columns]


def _spans(length: int, side: int, overlap: int) -> list[int]:
    """Where windows begin along one side."""
    if length <= side:
        return [0]
    count = -(-(length - overlap) // (side - overlap))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def weight(window: Window, overlap: int) -> Tensor:
    """(h, w) of a window: 1 inside, falling towards edges that have a neighbour."""
    size = window.size
    rows = _ramp(window.height, window.top > 0, window.top + window.height < size[0], overlap)
    columns = _ramp(window.width, window.left > 0, window.left + window.width < size[1], overlap)
    return rows[:, None] * columns


def _ramp(length: int, before: bool, after: bool, overlap: int) -> Tensor:
    at = torch.arange(length, dtype=torch.float32)
    rise = ((at + 1) / (overlap + 1)).clamp(max=1)
    out = torch.ones(length)
    if before:
        out = out * rise
    if after:
        out = out * rise.flip(0)
    return out


def blend(
    x: Tensor, every: Sequence[Window], overlap: int, look: Callable[[Window], Tensor]
) -> Tensor:
    """look(window) (B, C, h, w) of each window -> the whole, (B, C, H, W) like x, in float32."""
    if len(every) == 1:
        return look(every[0])
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    sum_ = torch.zeros(x.shape[-2:], dtype=torch.float32, device=x.device)
    for window in every:
        share = weight(window, overlap).to(x.device)
        window.cut(total).add_(look(window).float() * share)
        window.cut(sum_).add_(share)
    return (total / sum_).to(x.dtype)


def seen_from(window: Window, controls: Controls) -> Controls:
    """What bends the pass through one window: maps over the picture are cut with it."""
    return replace(
        controls,
        origin=window.origin,
        call=(controls.call, window.origin),
        references=tuple(
            replace(c, region=None if c.region is None else window.cut(c.region))
            for c in controls.references
        ),
        regions=tuple(replace(r, region=window.cut(r.region)) for r in controls.regions),
    )


class Windowed:
    """A Flux2Transformer that looks at large pictures through windows; called like one.

    `side` and `overlap` in latent cells. A picture that fits one window is the model's own result.
    """

    def __init__(self, model, side: int = 64, overlap: int = 16):
        windows(side, side, side, overlap)  # raises for impossible values
        self.model, self.side, self.overlap = model, side, overlap
        self.config, self.variant = model.config, getattr(model, "variant", None)

    def parameters(self):
        return self.model.parameters()

    def __call__(
        self, x, timestep, context, guidance=None, references=(), controls: Controls | None = None
    ) -> Tensor:
        every = windows(x.shape[-2], x.shape[-1], self.side, self.overlap)
        if len(every) == 1:
            return self.model(x, timestep, context, guidance, references, controls)

        def look(window: Window) -> Tensor:
            bent = seen_from(window, controls or STOCK)
            return self.model(window.cut(x), timestep, context, guidance, references, bent)

        return blend(x, every, self.overlap, look)
