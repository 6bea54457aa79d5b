"""Pictures of any size for a model that takes multiples of 16: reflected, and cut back."""

import torch
from torch import Tensor

from .latents import PIXELS

LONG = 4000  # pixels a side beyond which FLUX.2 was not made to go
LARGE = 2048 * 2064  # and pixels in all: 4 megapixels, rounded up to multiples of 16


def mirrored(length: int, wanted: int) -> Tensor:
    """Indices (wanted,) into a row of `length`: 0, 1, ... to its end, then back without repeating
    the last, and so on."""
    period = max(1, 2 * (length - 1))
    index = torch.arange(wanted) % period
    return torch.where(index < length, index, period - index)


def pad(images: Tensor) -> Tensor:
    """(B, H, W, C) -> sides that are multiples of 16, reflected at the right and at the bottom;
    the very same tensor where they are already."""
    for axis in (1, 2):
        length = images.shape[axis]
        if wanted := -length % PIXELS:
            index = mirrored(length, length + wanted).to(images.device)
            images = images.index_select(axis, index)
    return images


def cut(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The (width, height) at the top left that `pad` was given. Images of another size than `pad`
    makes of it (something resized the latent) come back as they are."""
    width, height = size
    padded = tuple(-(-side // PIXELS) * PIXELS for side in (height, width))
    return images[:, :height, :width] if tuple(images.shape[1:3]) == padded else images


def too_large(width: int, height: int) -> str:
    """A warning for sizes at which FLUX.2's pictures get worse, or ""."""
    if max(width, height) > LONG:
        return f"{width} x {height}: FLUX.2's pictures get worse beyond {LONG} pixels a side."
    if width * height > LARGE:
        return f"{width} x {height}: FLUX.2's pictures get worse beyond 4 megapixels."
    return ""
