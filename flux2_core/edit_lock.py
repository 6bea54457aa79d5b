"""Keep an edit to its place: the rest of the picture is the original's, pixel for pixel.

An edited picture comes back a little moved, a little off in colour, and reworked where nobody asked.
`lock` measures that on the area that was to stay, undoes it inside the mask, and puts the original
back outside.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import delta_e
from .errors import Flux2Error
from .registration import Motion, measure, undo

COLOR = ("affine", "mean", "off")
VISIBLE = 8.0  # CIEDE2000 from which a pixel counts as changed, where no mask says it
_MOST = 200_000  # pixels that a colour fit reads


@dataclass(frozen=True, eq=False)
class Locked:
    """`image` (H, W, 3); `alpha` (H, W): 0 where it is the original; `map` (H, W): CIEDE2000 between
    original and edit as it came. `drift` and `left`: mean CIEDE2000 on the unchanged area before and
    after; `aligned`: whether the motion was undone."""

    image: Tensor
    alpha: Tensor
    map: Tensor
    motion: Motion
    aligned: bool
    drift: float
    left: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        moved = f"moved {self.motion}" if self.motion.measurable else "shift: too plain to measure"
        kept = 100 * float((self.alpha == 0).float().mean())
        lines = [
            moved + (", undone" if self.aligned else ""),
            f"colour difference where nothing was to change: {self.drift:.2f}, matched {self.left:.2f}",
            f"{kept:.1f} % of the pixels are the original's",
            *self.notes,
        ]
        return "\n".join(lines)


def lock(
    original: Tensor,
    edited: Tensor,
    mask: Tensor | None = None,
    *,
    align: bool = True,
    limit: float = 16.0,
    color: str = "affine",
    feather: float = 8.0,
    restore: bool = True,
) -> Locked:
    """Pictures (H, W, 3) in [0, 1]; mask (H, W) in [0, 1], 1 where the edit was wanted, None: found.

    A motion of up to `limit` pixels (and 5 % in size) is undone, a larger one only reported. `color`:
    "affine" fits all channels together, "mean" level and contrast of each, "off" nothing. The seam
    lies within the mask, `feather` pixels wide. With `restore` False only motion and colour are
    corrected. An edit of another size is scaled to the original's.
    """
    if color not in COLOR:
        raise Flux2Error("Unknown way to match colours", color, f"One of {', '.join(COLOR)}")
    original, edited, notes = original.float(), edited.float(), []
    if edited.shape != original.shape:
        notes.append(f"the edit was scaled from {edited.shape[1]} x {edited.shape[0]}")
        edited = _resized(edited, original.shape[:2])
    wanted = None if mask is None else fit_mask(mask, original.shape[:2])
    raw = delta_e(edited, original)
    motion = measure(edited, original, None if wanted is None else wanted == 0)
    near = motion.measurable and motion.shift <= limit and abs(motion.scale - 1) <= 0.05
    aligned = align and near and (motion.shift > 0.02 or abs(motion.scale - 1) > 1e-4)
    if motion.measurable and align and not near:
        notes.append(f"that is more than {limit:g} px or 5 %: not undone, look at the picture")
    if aligned:
        edited = undo(edited, motion).clamp(0, 1)
    if wanted is None:
        fitted = matched(edited, original, torch.ones_like(raw), color)
        wanted = changed_area(original, fitted, feather)
    still = wanted == 0
    if not bool(still.any()):
        notes.append("the mask covers everything: colours cannot be matched")
    fitted = matched(edited, original, still.float(), color)
    drift, left = (_mean(d, still) for d in (raw, delta_e(fitted, original)))
    alpha = seam(wanted, feather) if restore else torch.ones_like(wanted)
    mixed = original.lerp(fitted, alpha[..., None])
    image = torch.where(alpha[..., None] == 0, original, mixed) if restore else fitted
    return Locked(image, alpha, raw, motion, aligned, drift, left, tuple(notes))


def seam(mask: Tensor, feather: float) -> Tensor:
    """mask (H, W) in [0, 1] -> how much of the edit shows: 0 outside, 1 from `feather` pixels inside
    on, smooth between, and never more than the mask."""
    if feather <= 0:
        return mask
    inside = (blurred((mask > 0).float(), feather) * 2 - 1).clamp(0, 1)
    return mask * (inside * inside * (3 - 2 * inside))


def changed_area(original: Tensor, edited: Tensor, feather: float = 0.0) -> Tensor:
    """Where two pictures differ visibly: (H, W), 0 or 1, small specks left out, with a margin that
    leaves room for a seam of `feather` pixels."""
    apart = delta_e(edited, original)
    smooth = blurred(apart, max(1.0, 0.004 * max(apart.shape)))
    margin = max(2, round(0.012 * max(apart.shape))) + round(feather)
    return grown((smooth > VISIBLE).float(), margin)


def matched(edited: Tensor, original: Tensor, still: Tensor, how: str) -> Tensor:
    """The edit with its colours fitted to the original's where `still` (H, W) is above 0.

    Least squares, pixels that fit badly count less and less; pulled towards no change where the area
    has too few colours to tell.
    """
    where = (still > 0).flatten().nonzero()[:, 0]
    if how == "off" or len(where) < 16:
        return edited
    where = where[:: max(1, len(where) // _MOST)]
    x, y = (p.reshape(-1, 3)[where].double() for p in (edited, original))
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    weight = torch.ones_like(ones)
    fit = torch.cat((torch.eye(3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)))
    for _ in range(8):
        fit = _fit(x, y, weight) if how == "affine" else _level(x, y, weight)
        error = (torch.cat((x, ones), 1) @ fit - y).norm(dim=1, keepdim=True)
        spread = (1.4826 * error.median()).clamp_min(4e-3)
        weight = 1 / (1 + (error / (2 * spread)) ** 2) ** 2
    out = edited.reshape(-1, 3).double() @ fit[:3] + fit[3]
    return out.reshape(edited.shape).float().clamp(0, 1)


def _fit(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """(4, 3): three channels and a constant -> three channels; ridge towards no change."""
    rows = torch.cat((x, torch.ones_like(weight)), 1)
    start = torch.cat((torch.eye(3), torch.zeros(1, 3))).double()
    pull = 1e-4 * weight.sum() * torch.diag(torch.tensor([1, 1, 1, 1e-2], dtype=torch.float64))
    normal = rows.T @ (weight * rows) + pull
    return start + torch.linalg.solve(normal, rows.T @ (weight * (y - rows @ start)))


def _level(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """(4, 3): a factor and a constant for each channel."""
    total = weight.sum()
    mx, my = (weight * x).sum(0) / total, (weight * y).sum(0) / total
    dx, dy = x - mx, y - my
    pull = 1e-4
    gain = ((weight * dx * dy).sum(0) / total + pull) / ((weight * dx * dx).sum(0) / total + pull)
    return torch.cat((torch.diag(gain), (my - gain * mx)[None]))


def _mean(values: Tensor, where: Tensor) -> float:
    return float(values[where].mean()) if bool(where.any()) else 0.0


def _resized(picture: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    planes = picture.movedim(-1, 0)[None]
    out = F.interpolate(planes, tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return out[0].movedim(0, -1).clamp(0, 1)


def fit_mask(mask: Tensor, size) -> Tensor:
    """(h, w) or (1, h, w) in [0, 1] -> (H, W); soft edges stay soft."""
    if mask.ndim == 3:
        mask = mask[0]
    if tuple(mask.shape) == tuple(size):
        return mask.float().clamp(0, 1)
    scaled = F.interpolate(mask[None, None].float(), tuple(size), mode="bilinear", antialias=True)
    return torch.where(scaled < 1e-3, 0, scaled)[0, 0].clamp(0, 1)


def blurred(x: Tensor, radius: float) -> Tensor:
    """Two box blurs of `radius` pixels in all."""
    size = max(1, round(radius / 2)) * 2 + 1
    planes = x[None, None]
    for _ in range(2):
        pads = (size // 2,) * 4
        planes = F.avg_pool2d(F.pad(planes, pads, mode="replicate"), size, 1)
    return planes[0, 0]


def grown(mask: Tensor, by: int) -> Tensor:
    return F.max_pool2d(mask[None, None], 2 * by + 1, 1, by)[0, 0]
