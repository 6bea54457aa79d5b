"""How far two pictures are apart: PSNR, SSIM, CIEDE2000, and LPIPS where its package is there."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import delta_e
from .errors import Flux2Error

_LUMA = (0.2126, 0.7152, 0.0722)


@dataclass(frozen=True)
class Distance:
    """psnr in dB, ssim in [-1, 1], delta_e: mean and 95th percentile of CIEDE2000; lpips or None."""

    psnr: float
    ssim: float
    delta_e: float
    delta_e_95: float
    lpips: float | None = None

    def __str__(self) -> str:
        known = "" if self.lpips is None else f", LPIPS {self.lpips:.4f}"
        return (
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, colour difference {self.delta_e:.2f} "
            f"on average and {self.delta_e_95:.2f} in the worst twentieth{known}"
        )


def distance(a: Tensor, b: Tensor, *, perceptual: bool = False) -> Distance:
    """Two pictures (H, W, 3) in [0, 1]. `perceptual` adds LPIPS (AlexNet), if `lpips` is installed.

    Raises Flux2Error where they differ in size.
    """
    if a.shape != b.shape:
        raise Flux2Error(
            "Two pictures of different sizes cannot be compared",
            f"{a.shape[1]} x {a.shape[0]} and {b.shape[1]} x {b.shape[0]}",
            "Scale one to the other's size first",
        )
    a, b = a.float(), b.float()
    error = (a - b).square().mean().item()
    apart = delta_e(a, b).flatten()
    worst = apart.kthvalue(max(1, round(0.95 * apart.numel()))).values
    return Distance(
        psnr=-10 * torch.tensor(error).log10().item() if error else float("inf"),
        ssim=ssim(a, b),
        delta_e=apart.mean().item(),
        delta_e_95=worst.item(),
        lpips=_lpips(a, b) if perceptual else None,
    )


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of the luma, 11 x 11 Gaussian window of 1.5 pixels, picture range 1.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004; borders that the window leaves are not counted.
    """
    weights = a.new_tensor(_LUMA)
    x, y = (p @ weights for p in (a, b))
    if min(x.shape) < 11:
        return 1.0 if torch.equal(x, y) else float(((x - y) == 0).float().mean())
    at = torch.arange(11, dtype=a.dtype) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    line = (line / line.sum()).to(a)
    maps = torch.stack((x, y, x * x, y * y, x * y))[:, None]
    maps = F.conv2d(F.conv2d(maps, line.view(1, 1, 1, 11)), line.view(1, 1, 11, 1))
    mx, my, xx, yy, xy = maps[:, 0]
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    return (top / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))).mean().item()


def _lpips(a: Tensor, b: Tensor) -> float | None:
    try:
        import lpips  # type: ignore
    except ImportError:
        return None
    net = lpips.LPIPS(net="alex", verbose=False)
    pair = (p.movedim(-1, 0)[None] * 2 - 1 for p in (a, b))
    with torch.inference_mode():
        return float(net(*pair))
