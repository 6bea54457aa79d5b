"""Ways to follow the velocity field from noise to a picture: one step each, as pure functions.

dx/dsigma = v(x, sigma), sigma from 1 to 0; v = (x - x0) / sigma, so x0 = x - sigma v is the picture
as it looks now. A step sees one place or two, and what earlier steps saw (its history). All of it
is handed in and out, so that a run can stop between any two steps and go on elsewhere.
Sources: Karras et al. 2022 (Heun); Lu et al. 2022, DPM-Solver++ (2M); Zhao et al. 2023, UniPC (an
evaluation serves the correction of the step behind it and the prediction of the one ahead).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from .errors import Flux2Error

Field = Callable[[Tensor, float], Tensor]  # x (B, 128, h, w) at sigma -> velocity, like x
History = tuple[tuple[float, Tensor], ...]  # (sigma, what was seen there), the newest first
Noise = Callable[[], Tensor]  # fresh standard normal noise, like x
Stepped = tuple[Tensor, History]

STRETCH = math.exp(2.0)  # how `_time` stretches the run's beginning: about mu of a 1 MP picture


@dataclass(frozen=True)
class Solver:
    """`calls`: of the model, a step. `step`(field, x, now, after, history, noise, eta) -> x at
    `after`, and the history for the next step."""

    name: str
    label: str
    order: int
    calls: int
    stochastic: bool
    step: Callable[..., Stepped]


def get_solver(name: str) -> Solver:
    """The solver of that name. Raises Flux2Error for one that does not exist."""
    if name not in SOLVERS:
        raise Flux2Error(
            "There is no such solver", repr(name)[:60], f"Choose one of {', '.join(SOLVERS)}"
        )
    return SOLVERS[name]


def draw(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Standard normal float32 of the shape and on the device of `like`: a function of each picture's
    seed and the step alone, so that neither a batch nor a pause changes it.

    The start noise is drawn from the seed itself; these draws are independent of it.
    """
    if len(seeds) != len(like):
        raise Flux2Error(
            "Each picture of a batch needs a seed of its own",
            f"{len(seeds)} seeds for {len(like)} pictures",
            "Give as many seeds as pictures",
        )
    drawn = []
    for seed in seeds:
        digest = sha256(f"flux2 solver noise, seed {seed}, step {step}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(drawn).to(like.device)


def euler(field: Field, x, now: float, after: float, history: History = (), *_) -> Stepped:
    """A straight line along the velocity: the stock solver."""
    return x + (after - now) * field(x, now), ()


def heun(field: Field, x, now: float, after: float, history: History = (), *_) -> Stepped:
    """The mean of the velocities at both ends; the last step is Euler's, for at sigma 0 there is
    nothing left to see."""
    v = field(x, now)
    there = x + (after - now) * v
    if after <= 0:
        return there, ()
    return x + (after - now) * ((v + field(there, after)) / 2), ()


def dpmpp_2m(field: Field, x, now: float, after: float, history: History = (), *_) -> Stepped:
    """DPM-Solver++ (2M) for straight paths: x0 runs on linearly in log((1 - sigma) / sigma), which
    is infinite at both ends: steps that touch one are of first order, as is the first."""
    x0 = x - now * field(x, now)
    aim = x0
    if history and after > 0 and now < history[0][0] < 1:
        before, old = history[0]
        ratio = (_snr(after) - _snr(now)) / (_snr(now) - _snr(before))
        aim = x0 + (ratio / 2) * (x0 - old)
    return (after / now) * x + (1 - after / now) * aim, ((now, x0),)


def unipc(field: Field, x, now: float, after: float, history: History = (), *_) -> Stepped:
    """Predictor and corrector of third order: the velocity is a polynomial through the places seen.

    What the model says at `now` first mends the step that led here, then carries the next one.
    """
    v = field(x, now)
    history = () if history and history[0][0] == now else history  # a step of no length was taken
    seen = ((now, v), *history)
    if history:
        before = history[0][0]
        x = x + (_integral(seen[:3], before, now) - _integral(history[:3], before, now))
    return x + _integral(seen[:3], now, after), seen[:3]


def sde(
    field: Field, x, now: float, after: float, history: History, noise: Noise, eta: float
) -> Stepped:
    """Euler, with a part of the noise replaced by fresh noise at every step. eta 1 replaces as much
    as ancestral sampling does; eta 0 is Euler itself."""
    v = field(x, now)
    out = x + (after - now) * v
    fresh = eta * _replaced(now, after)
    if fresh == 0:
        return out, ()
    estimate = x + (1 - now) * v  # of the noise in x
    return out + after * ((math.sqrt(1 - fresh * fresh) - 1) * estimate + fresh * noise()), ()


def _replaced(now: float, after: float) -> float:
    """The share (in amplitude) of the noise at `after` that ancestral sampling draws anew: with
    n = sigma / (1 - sigma), sqrt(1 - n'^2 / n^2)."""
    if after <= 0:
        return 0.0
    ratio = after * (1 - now) / (now * (1 - after)) if after < 1 else 1.0
    return math.sqrt(max(0.0, 1 - ratio * ratio))


def _snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def _integral(seen: History, start: float, end: float) -> Tensor:
    """Of the polynomial through `seen`, from sigma `start` to `end`."""
    weights = _weights(tuple(sigma for sigma, _ in seen), start, end)
    total = weights[0] * seen[0][1]
    for weight, (_, v) in zip(weights[1:], seen[1:], strict=True):
        total = total + weight * v
    return total


@lru_cache(maxsize=1024)
def _weights(sigmas: tuple[float, ...], start: float, end: float) -> tuple[float, ...]:
    """How much each of the velocities at `sigmas` counts. The polynomial is one in `_time`, in which
    steps are even; the integral over sigma is Gauss-Legendre's, exact to 1e-12 here."""
    points, shares = np.polynomial.legendre.leggauss(32)
    at = _time(start + (end - start) * (points + 1) / 2)
    places = [_time(sigma) for sigma in sigmas]
    weights = []
    for i, place in enumerate(places):
        basis = np.ones_like(at)
        for other in places[:i] + places[i + 1 :]:
            basis = basis * (at - other) / (place - other)
        weights.append(float((shares * basis).sum() * (end - start) / 2))
    return tuple(weights)


def _time(sigma):
    """sigma with the schedule's shift undone."""
    return sigma / (STRETCH + (1 - STRETCH) * sigma)


SOLVERS: dict[str, Solver] = {
    s.name: s
    for s in (
        Solver("euler", "Euler", 1, 1, False, euler),
        Solver("heun", "Heun", 2, 2, False, heun),
        Solver("dpmpp_2m", "DPM++ 2M", 2, 1, False, dpmpp_2m),
        Solver("unipc", "UniPC", 3, 1, False, unipc),
        Solver("sde", "Euler with fresh noise", 1, 1, True, sde),
    )
}
