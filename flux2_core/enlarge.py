"""A draft carried to full size: enlarged, noised as much as may change, and finished there."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import schedule
from .errors import Flux2Error


def start_of(change: float, scale: float) -> float:
    """The sigma to begin with at `scale` times the draft's side, so that as much may change as the
    draft itself would at sigma `change`.

    A cell of the draft covers scale^2 cells, over which white noise averages out to 1 / scale of its
    strength: the same picture-to-noise ratio at the draft's own scale needs sigma' / (1 - sigma') =
    scale sigma / (1 - sigma). (The reference's mu grows with the size for the same reason; Esser et al.
    2024, section 5.3.2.)
    """
    if not 0 <= change <= 1:
        raise Flux2Error("Change is a share", f"{change:g}", "Set it between 0 and 1")
    if change == 1:
        return 1.0
    odds = max(scale, 1.0) * change / (1 - change)
    return odds / (1 + odds)


def sigmas(steps: int, start: float, *, width: int, height: int) -> Tensor:
    """float32 (steps + 1,) from `start` to 0: the reference's even steps in u under the full size's
    mu. Empty where nothing may change."""
    if start <= 0:
        return torch.zeros(0)
    whole = max(steps, round(steps / start))
    mu = schedule.mu((height // 16) * (width // 16), whole)
    e = torch.tensor(mu, dtype=torch.float64).exp()
    first = start / (start + e * (1 - start))  # the inverse of schedule.shift
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64) * first
    return schedule.shift(u, mu).float()


def steps_for(wanted: int, variant_steps: int) -> int:
    """Steps for the finish: a quarter of what the variant wants, at least two."""
    return wanted or max(2, round(variant_steps / 4))


def resize(pictures: Tensor, width: int, height: int) -> Tensor:
    """(N, H, W, 3) in [0, 1] -> (N, height, width, 3), bicubic."""
    planes = pictures.movedim(-1, 1).float()
    out = F.interpolate(
        planes, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return out.clamp(0, 1).movedim(1, -1)
