"""The noise schedule, as pure functions. Source: reference implementation, sampling; fact: mu is
an empirical line in the number of picture tokens, and the steps move it below 4,300 tokens."""

import math

import torch
from torch import Tensor

from .errors import Flux2Error

_SLOPE_10, _BASE_10 = 8.73809524e-05, 1.89833333  # mu at 10 steps
_SLOPE_200, _BASE_200 = 0.00016927, 0.45666666  # mu at 200 steps, and at any count above the limit
_TOKEN_LIMIT = 4300


def mu(tokens: int, steps: int) -> float:
    """The time shift for `tokens` = (H / 16)(W / 16) picture tokens; references do not count.

    It jumps down just above 4,300 tokens, in the reference implementation as here.
    """
    high = _SLOPE_200 * tokens + _BASE_200
    if tokens > _TOKEN_LIMIT:
        return high
    low = _SLOPE_10 * tokens + _BASE_10
    slope = (high - low) / 190.0
    return slope * steps + high - 200.0 * slope


def shift(u: Tensor, mu: float) -> Tensor:
    """sigma(u) = e^mu / (e^mu + 1 / u - 1) for u in [0, 1]; sigma(0) = 0, sigma(1) = 1."""
    e = math.exp(mu)
    return e * u / (e * u + 1.0 - u)


def sigmas(steps: int, *, width: int, height: int) -> Tensor:
    """-> float32 (steps + 1,), from 1 to 0, for a picture of width x height pixels."""
    if steps < 1:
        raise Flux2Error(
            "A picture needs at least one step", f"{steps} steps", "Set steps to 1 or more"
        )
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift(u, mu((height // 16) * (width // 16), steps)).float()


def share(sigmas: Tensor, sigma: float) -> float:
    """The share of a run's steps that lies behind `sigma`: i / n within step i of n.

    Solvers that look between two steps are within the earlier one.
    """
    steps = len(sigmas) - 1
    begun = int((sigmas[:-1] >= sigma * (1 - 1e-4)).sum())
    return max(0, begun - 1) / max(1, steps)
