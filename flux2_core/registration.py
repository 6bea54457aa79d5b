"""Where a picture has moved: shift and scale between two pictures, to a fraction of a pixel.

Phase correlation finds the shift in whole pixels (Kuglin and Hines 1975), Gauss-Newton steps on the
brightness refine it together with the scale (Lucas and Kanade 1981), each pixel weighed by how well
it fits so far, so that what an edit changed does not pull.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.2126, 0.7152, 0.0722)
_COARSE = 256  # longer side at which the shift is first looked for
_FLAT = 2e-3  # root mean square of the brightness gradient below which nothing can be measured


@dataclass(frozen=True)
class Motion:
    """What a picture shows at `scale` times the distance from its centre, (dx, dy) pixels further
    right and down. `measurable` False: too little is drawn there to tell."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    measurable: bool = True

    @property
    def shift(self) -> float:
        """Pixels."""
        return (self.dx**2 + self.dy**2) ** 0.5

    def __str__(self) -> str:
        if not self.measurable:
            return "too plain to measure"
        return f"{self.dx:+.2f} px right, {self.dy:+.2f} px down, {100 * (self.scale - 1):+.2f} % larger"


def measure(moved: Tensor, original: Tensor, trusted: Tensor | None = None) -> Motion:
    """Pictures (H, W, 3) in [0, 1] of one size; `trusted` (H, W) bool: where nothing was to change."""
    weights = original.new_tensor(_LUMA, dtype=torch.float32)
    a, b = moved.float() @ weights, original.float() @ weights
    sure = torch.ones_like(b) if trusted is None else trusted.float()
    if _energy(b, sure) < _FLAT:
        return Motion(measurable=False)
    longest = max(b.shape)
    levels = [1]
    while longest / levels[0] > _COARSE:
        levels.insert(0, levels[0] * 2)
    first = levels[0]
    dy, dx = _phase(_shrink(a, first), _shrink(b, first), _shrink(sure, first))
    p = torch.tensor([dx * first, dy * first, 1.0], dtype=torch.float64)
    for level in levels:
        p = _refine(_shrink(a, level), _shrink(b, level), _shrink(sure, level), p, level)
    dx, dy, scale = p.tolist()
    return Motion(dx, dy, scale)


def undo(picture: Tensor, motion: Motion) -> Tensor:
    """The picture (H, W, 3) moved back, bicubic; edges repeat."""
    return _warp(picture.movedim(-1, 0)[None].float(), motion, "bicubic")[0].movedim(0, -1)


def _warp(x: Tensor, motion: Motion, mode: str) -> Tensor:
    height, width = x.shape[-2:]
    ys, xs = _centred(height, width, x.device)
    across = (motion.scale * xs + motion.dx) * 2 / width
    down = (motion.scale * ys + motion.dy) * 2 / height
    where = torch.stack((across, down), -1)[None].expand(len(x), -1, -1, -1)
    return F.grid_sample(
        x, where.to(x.dtype), mode=mode, padding_mode="border", align_corners=False
    )


def _centred(height: int, width: int, device) -> tuple[Tensor, Tensor]:
    """Distances from the picture's centre, in pixels."""
    ys = torch.arange(height, device=device, dtype=torch.float32) - (height - 1) / 2
    xs = torch.arange(width, device=device, dtype=torch.float32) - (width - 1) / 2
    return ys[:, None].expand(-1, width), xs[None].expand(height, -1)


def _shrink(x: Tensor, by: int) -> Tensor:
    return x if by == 1 else F.avg_pool2d(x[None, None], by)[0, 0]


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    return (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2, (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2


def _energy(x: Tensor, sure: Tensor) -> float:
    gx, gy = _gradient(x)
    return (((gx**2 + gy**2) * sure).sum() / sure.sum().clamp_min(1)).sqrt().item()


def _phase(a: Tensor, b: Tensor, sure: Tensor) -> tuple[int, int]:
    """(down, right) in whole pixels: how far `a` shows what `b` shows."""
    height, width = b.shape
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(
        width, periodic=False
    )
    window = window.to(b) * sure
    both = [
        torch.fft.rfft2((x - (x * window).sum() / window.sum().clamp_min(1e-6)) * window)
        for x in (a, b)
    ]
    cross = both[0] * both[1].conj()
    peaks = torch.fft.irfft2(cross / cross.abs().clamp_min(1e-9), s=(height, width))
    # an edit moves a picture by little: a peak far away is chance
    reach_y, reach_x = max(2, height // 8), max(2, width // 8)
    rolled = torch.roll(peaks, (reach_y, reach_x), (0, 1))[: 2 * reach_y + 1, : 2 * reach_x + 1]
    best = int(rolled.argmax())
    return best // rolled.shape[1] - reach_y, best % rolled.shape[1] - reach_x


def _refine(a: Tensor, b: Tensor, sure: Tensor, p: Tensor, level: int, rounds: int = 30) -> Tensor:
    """Gauss-Newton on (dx, dy, scale) with a gain and an offset of the brightness beside them."""
    ys, xs = _centred(b.shape[0], b.shape[1], b.device)
    gain, offset = 1.0, 0.0
    margin = torch.zeros_like(b)
    margin[2:-2, 2:-2] = 1
    for _ in range(rounds):
        motion = Motion(float(p[0]) / level, float(p[1]) / level, float(p[2]))
        seen = _warp(a[None, None], motion, "bicubic")[0, 0]
        gx, gy = _gradient(seen)
        residual = (gain * seen + offset - b).double()
        spread = (
            1.4826 * residual[sure > 0].abs().median().clamp_min(2e-3)
            if bool((sure > 0).any())
            else 1
        )
        weight = (sure * margin).double() / (1 + (residual / (2 * spread)) ** 2) ** 2
        slopes = torch.stack((gx, gy, gx * xs + gy * ys, seen, torch.ones_like(seen)), -1).double()
        slopes[..., :3] *= gain
        flat = slopes.flatten(0, 1)
        weighted = flat * weight.flatten()[:, None]
        normal = flat.T @ weighted + 1e-9 * torch.eye(5, dtype=torch.float64)
        step = torch.linalg.solve(normal, -(weighted.T @ residual.flatten()))
        p = p + torch.stack((step[0] * level, step[1] * level, step[2]))
        gain, offset = gain + float(step[3]), offset + float(step[4])
        if step[:2].abs().max() < 2e-3 and step[2].abs() * max(b.shape) < 2e-3:
            break
    return p
