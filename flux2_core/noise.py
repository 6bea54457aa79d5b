"""Noise as a function of the seed: variations between two seeds, and a composition kept across sizes."""

import torch
from torch import Tensor

from .errors import Flux2Error
from .latents import CHANNELS, PIXELS, check_size, noise

BASE = 32  # cells a side of the noise whose coarse part all sizes share


def composed(seed: int, *, width: int, height: int, batch: int = 1) -> Tensor:
    """Standard normal float32 like `latents.noise`, whose coarse part is the same at every size: what a
    seed puts on the left at 512 pixels it puts on the left at 1024.

    White noise has a flat spectrum of independent coefficients, whatever its size. Here those of up to
    16 waves across the picture come from a draw of 32 x 32 cells, the rest from a draw of the full
    size: the sum is white noise again.
    """
    check_size(width, height)
    return torch.cat([_composed(seed + i, height // PIXELS, width // PIXELS) for i in range(batch)])


def _composed(seed: int, height: int, width: int) -> Tensor:
    base = noise(seed, width=BASE * PIXELS, height=BASE * PIXELS)
    own = torch.Generator("cpu").manual_seed(
        (seed * 6364136223846793005 + 1442695040888963407) % 2**63
    )
    fine = torch.randn(1, CHANNELS, height, width, generator=own)
    whole, coarse = (torch.fft.fft2(x.double(), norm="ortho") for x in (fine, base))
    rows, columns = _shared(height), _shared(width)
    there = torch.meshgrid(rows % height, columns % width, indexing="ij")
    here = torch.meshgrid(rows % BASE, columns % BASE, indexing="ij")
    whole[:, :, there[0], there[1]] = coarse[:, :, here[0], here[1]]
    return torch.fft.ifft2(whole, norm="ortho").real.float()


def _shared(cells: int) -> Tensor:
    """Waves, negative ones too, that a side of so many cells shares with the base; the highest of an
    even side has no partner and stays its own."""
    most = (min(cells, BASE) - 1) // 2
    return torch.arange(-most, most + 1)


def between(one: Tensor, other: Tensor, amount: float) -> Tensor:
    """Spherical interpolation picture by picture: 0 is `one`, 1 is `other`, bit for bit; between them
    the noise stays as strong as noise is. Source: Shoemake 1985."""
    if not 0 <= amount <= 1:
        raise Flux2Error(
            "A variation lies between two seeds", f"{amount:g}", "Set it between 0 and 1"
        )
    if amount in (0, 1):
        return one if amount == 0 else other
    a, b = (x.double().flatten(1) for x in (one, other))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = torch.acos(cosine.clamp(-1, 1))[:, None]
    near = angle.abs() < 1e-6  # the same noise
    safe = torch.where(near, torch.ones_like(angle), angle)
    left = torch.where(near, 1 - amount, torch.sin((1 - amount) * safe) / torch.sin(safe))
    right = torch.where(near, amount, torch.sin(amount * safe) / torch.sin(safe))
    return (left * a + right * b).reshape(one.shape).float()
