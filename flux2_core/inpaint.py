"""Redraw a part of a picture: the window worked on, the part held, and the way back.

`prepare` cuts the window around a mask, `held` keeps everything outside it at the run's noise level
in every step, `stitch` puts the result back: outside the mask the picture keeps its very bytes.
`extend` makes a larger canvas whose new part is the mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit_lock import blurred, fit_mask, grown, matched
from .errors import Flux2Error
from .guidance import Velocity
from .latents import PIXELS

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Place:
    """Where a window belongs: `originals` (N, H, W, 3), `masks` (N, H, W), the `box` in them, the
    `size` (width, height) it was scaled to, and `feather` in pixels of the original."""

    originals: Tensor
    masks: Tensor
    box: Box
    size: tuple[int, int]
    feather: float


@dataclass(frozen=True, eq=False)
class Work:
    """`pictures` (N, h, w, 3) and `masks` (N, h, w) of the window, sides multiples of 16."""

    pictures: Tensor
    masks: Tensor
    place: Place


def prepare(
    pictures: Tensor,
    masks: Tensor,
    *,
    context: float = 0.5,
    megapixels: float = 0.0,
    grow: int = 0,
    feather: float = 16.0,
    whole: bool = False,
) -> Work:
    """pictures (N, H, W, 3) in [0, 1], masks (N or 1, H, W) in [0, 1], soft edges allowed.

    The window is the masks' bounding box plus `context` times its longer side all around (`whole`:
    the picture); `megapixels` 0 leaves its scale. Raises Flux2Error where nothing is masked.
    """
    height, width = pictures.shape[1:3]
    fitted = [fit_mask(m, (height, width)) for m in masks]
    masks = torch.stack(fitted * (len(pictures) if len(fitted) == 1 else 1))
    if len(masks) != len(pictures):
        raise Flux2Error(
            "The masks do not belong to these pictures",
            f"{len(masks)} masks, {len(pictures)} pictures",
            "Give one mask for all, or one for each picture",
        )
    if not bool((masks > 0).any()):
        raise Flux2Error(
            "The mask is empty: there is nothing to redraw",
            f"a mask of {masks.shape[2]} x {masks.shape[1]} without a single painted pixel",
            "Paint the part to redraw (right click on the picture, Open in Mask Editor)",
        )
    if grow:
        masks = torch.stack([grown(m, grow) for m in masks])
    box = (0, 0, width, height) if whole else window(masks, context)
    left, top, right, bottom = box
    size = _scaled(right - left, bottom - top, megapixels)
    cut = pictures[:, top:bottom, left:right, :3].float()
    cut, inside = _resize(cut, size), masks[:, top:bottom, left:right, None]
    inside = _resize(inside, size, soft=False)
    place = Place(pictures[..., :3].float(), masks, box, size, feather)
    return Work(_whole_patches(cut), _whole_patches(inside)[..., 0], place)


def window(masks: Tensor, context: float) -> Box:
    """The bounding box of all masks with its surroundings; sides multiples of 16 where there is room."""
    height, width = masks.shape[1:]
    painted = (masks > 0).any(0)
    rows, columns = painted.any(1).nonzero()[:, 0], painted.any(0).nonzero()[:, 0]
    around = context * max(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 1
    left, right = _side(int(columns[0]), int(columns[-1]) + 1, around, width)
    top, bottom = _side(int(rows[0]), int(rows[-1]) + 1, around, height)
    return left, top, right, bottom


def _side(start: int, stop: int, around: float, most: int) -> tuple[int, int]:
    start, stop = max(0, int(start - around)), min(most, int(stop + around + 1))
    missing = -(stop - start) % PIXELS
    stop = min(most, stop + missing)
    return max(0, start - (-(stop - start) % PIXELS)), stop


def _scaled(width: int, height: int, megapixels: float) -> tuple[int, int]:
    if not megapixels:
        return width, height
    by = (megapixels * 1e6 / (width * height)) ** 0.5
    return tuple(max(PIXELS, round(side * by / PIXELS) * PIXELS) for side in (width, height))  # type: ignore


def _resize(x: Tensor, size: tuple[int, int], soft: bool = True) -> Tensor:
    """(N, H, W, C) -> size (width, height)."""
    if (x.shape[2], x.shape[1]) == size:
        return x
    planes, how = x.movedim(-1, 1), "bicubic" if soft else "bilinear"
    out = F.interpolate(planes, size[::-1], mode=how, antialias=True, align_corners=False)
    return out.clamp(0, 1).movedim(1, -1)


def _whole_patches(x: Tensor) -> Tensor:
    """(N, H, W, C) -> sides multiples of 16, the last rows and columns repeated."""
    right, below = -x.shape[2] % PIXELS, -x.shape[1] % PIXELS
    return F.pad(x.movedim(-1, 1), (0, right, 0, below), mode="replicate").movedim(1, -1)


def latent_mask(masks: Tensor) -> Tensor:
    """(N, H, W) -> (N, 1, H / 16, W / 16): a patch may change as much as its most masked pixel."""
    return F.max_pool2d(masks[:, None].float(), PIXELS)


def held(velocity: Velocity, latent: Tensor, noise: Tensor, mask: Tensor) -> Velocity:
    """The velocity that leads back to `latent` where `mask` (B, 1, h, w) is 0, the model's where it is
    1; the model sees the latent at the step's own noise level there: x = (1 - t) latent + t noise."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        at = t[:, None, None, None].to(x)
        known = torch.lerp(latent.to(x), noise.to(x), at)
        free = velocity(torch.lerp(known, x, mask.to(x)), t)
        return torch.lerp((noise - latent).to(free), free, mask.to(free))

    return field


def stitch(results: Tensor, place: Place, color: str = "affine") -> Tensor:
    """What was drawn in the window, (B, h, w, 3) in [0, 1] -> (B, H, W, 3).

    Where the mask is 0 the original's values, untouched. Colours are matched on the part of the
    window that was to stay; what difference is left at its edge fades out over `feather` pixels.
    """
    left, top, right, bottom = place.box
    out = []
    for i, drawn in enumerate(results.float()):
        original = place.originals[min(i, len(place.originals) - 1)].to(drawn)
        mask = place.masks[min(i, len(place.masks) - 1)].to(drawn)
        drawn = drawn[: place.size[1], : place.size[0]]
        drawn = _resize(drawn[None], (right - left, bottom - top))[0]
        known, inside = original[top:bottom, left:right], mask[top:bottom, left:right]
        drawn = matched(drawn, known, (inside == 0).float(), color)
        drawn = settled(drawn, known, inside, place.feather)
        whole = original.clone()
        mixed = known.lerp(drawn, inside[..., None])
        whole[top:bottom, left:right] = torch.where(inside[..., None] == 0, known, mixed)
        out.append(whole)
    return torch.stack(out)


def settled(drawn: Tensor, known: Tensor, mask: Tensor, feather: float) -> Tensor:
    """`drawn` plus the difference to `known` outside the mask, carried `feather` pixels into it."""
    still = (mask == 0).float()
    if feather <= 0 or not bool(still.any()):
        return drawn
    near = blurred(still, feather)
    planes = [blurred((known - drawn)[..., c] * still, feather) for c in range(3)]
    carried = torch.stack(planes, -1) / near.clamp_min(1e-4)[..., None]
    return (drawn + carried * (2 * near).clamp(0, 1)[..., None]).clamp(0, 1)


def extend(
    pictures: Tensor, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Tensor, Tensor]:
    """pictures (N, H, W, 3), pixels to add -> the canvas, its new part filled from the edges, and the
    mask (1, H', W') of the new part. Raises Flux2Error where nothing is added."""
    if min(left, top, right, bottom) < 0 or not left + top + right + bottom:
        raise Flux2Error(
            "Outpainting needs at least one side to grow",
            f"left {left}, top {top}, right {right}, bottom {bottom} pixels",
            "Set one or more of them above 0",
        )
    height, width = pictures.shape[1:3]
    planes = pictures[..., :3].float().movedim(-1, 1)
    canvas = F.pad(planes, (left, right, top, bottom), mode="replicate").movedim(1, -1)
    mask = torch.ones(1, *canvas.shape[1:3])
    mask[:, top : top + height, left : left + width] = 0
    return canvas, mask
