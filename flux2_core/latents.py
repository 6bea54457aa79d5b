"""The 128-channel latent: 2x2 packing of the autoencoder's 32 channels, its statistics, noise."""

import torch
from einops import rearrange
from torch import Tensor

from .errors import Flux2Error

PIXELS = 16  # pixels a side per latent position
CHANNELS = 128
EPS = 1e-4  # of the statistics' variance


def pack(z: Tensor) -> Tensor:
    """(B, 32, 2h, 2w) -> (B, 128, h, w); channel 4c + 2i + j is (2r + i, 2s + j) of channel c."""
    return rearrange(z, "b c (h i) (w j) -> b (c i j) h w", i=2, j=2)


def unpack(x: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return rearrange(x, "b (c i j) h w -> b c (h i) (w j)", i=2, j=2)


def normalise(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """(B, 128, h, w) as packed -> what the transformer reads: (z - mean) / sqrt(var + 1e-4).

    `mean` and `var` (128,) are the file's batch-norm statistics. The arithmetic is float32 whatever
    z is: it costs nothing here, and bf16 would round the offsets away.
    """
    mean, std = _statistics(z, mean, var)
    return ((z.float() - mean) / std).to(z.dtype)


def denormalise(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    mean, std = _statistics(x, mean, var)
    return (x.float() * std + mean).to(x.dtype)


def _statistics(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (v.to(x.device, torch.float32).view(1, -1, 1, 1) for v in (mean, var))
    return mean, torch.sqrt(var + EPS)


def tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C), row by row."""
    return rearrange(x, "b c h w -> b (h w) c")


def grid(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `tokens`."""
    return rearrange(x, "b (h w) c -> b c h w", h=height, w=width)


def noise(seed: int, *, width: int, height: int, batch: int = 1) -> Tensor:
    """Standard normal float32 (batch, 128, height / 16, width / 16) on the CPU.

    One draw per picture, with seeds seed, seed + 1, ...: a batch's noise equals its pictures' one
    by one, bit for bit, on every machine.
    """
    check_size(width, height)
    draws = []
    for i in range(batch):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        draws.append(
            torch.randn(1, CHANNELS, height // PIXELS, width // PIXELS, generator=generator)
        )
    return torch.cat(draws)


def check_size(width: int, height: int) -> None:
    """Raise unless both sides are positive multiples of 16 pixels."""
    if min(width, height) < PIXELS or width % PIXELS or height % PIXELS:
        near = [max(PIXELS, round(side / PIXELS) * PIXELS) for side in (width, height)]
        raise Flux2Error(
            "Width and height must be multiples of 16",
            f"{width} x {height}",
            f"The nearest size that fits is {near[0]} x {near[1]}",
        )
