"""The host's MASK, (H, W) or (n, H, W), as the core wants it: one (H, W) for each picture."""

from torch import Tensor

from ..flux2_core.errors import Flux2Error


def each(mask: Tensor | None, count: int, called: str) -> list[Tensor | None]:
    """One mask for each of `count` pictures; a single one serves them all. None stays None."""
    if mask is None:
        return [None] * count
    masks = mask[None] if mask.ndim == 2 else mask
    if masks.ndim != 3 or len(masks) not in (1, count):
        raise Flux2Error(
            f"{called} does not go with the number of pictures",
            f"a mask of shape {tuple(mask.shape)} for {count} picture{'s' if count > 1 else ''}",
            f"Connect one mask{f', or {count}' if count > 1 else ''}",
        )
    return [masks[i % len(masks)] for i in range(count)]
