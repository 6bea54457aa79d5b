"""From noise to a picture's latent: Euler along the velocity field."""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import Flux2Error
from .guidance import Velocity

OnStep = Callable[[int, int, Tensor], None]  # step (from 0), steps, the picture as it looks now


def denoise(
    velocity: Velocity, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """x (B, 128, h, w) at sigmas[0] -> x at sigmas[-1]: x += (s' - s) v(x, s), step by step.

    Sums in float32, the model in whatever dtype it has. `on_step` sees x - s v, the estimate of
    the finished picture, before each step is taken; what it raises ends the run. Raises Flux2Error
    where the result is not finite.
    """
    x = x.float()
    steps = len(sigmas) - 1
    for i in range(steps):
        now, after = float(sigmas[i]), float(sigmas[i + 1])
        t = torch.full((x.shape[0],), now, device=x.device)
        v = velocity(x, t).float()
        if on_step is not None:
            on_step(i, steps, x - now * v)
        x = x + (after - now) * v
    return check_finite(x)


def check_finite(x: Tensor) -> Tensor:
    """x, unless it holds NaN or infinity: a black picture would be all that came of it."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise Flux2Error(
            "The model's numbers overflowed: the picture would be black",
            f"{bad} of {x.numel()} values of the latent are NaN or infinite",
            "Run the model in bf16 or fp32 rather than fp16, and try without LoRAs and patches",
        )
    return x
