"""The noise schedule, as pure functions. Source: reference implementation, sampling; fact: mu is
an empirical line in the number of picture tokens, and the steps move it below 4,300 tokens.

A schedule is a spacing of u from 1 to 0, shifted by mu. `flux2` is the reference's even spacing.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .configs import Variant
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


# ---------------------------------------------------------------------------------------- spacings


def _even(u: Tensor, _: int) -> Tensor:
    return u


def _cosine(u: Tensor, _: int) -> Tensor:
    """Slow at both ends (Nichol and Dhariwal 2021, as a path of u)."""
    return (1 - torch.cos(math.pi * u)) / 2


def _beta(u: Tensor, _: int) -> Tensor:
    """Quantiles of Beta(0.6, 0.6): more steps at both ends (Lee et al. 2024), by bisection of the
    distribution's integral on a grid fine enough for float32."""
    grid = (1 - torch.cos(math.pi * torch.linspace(0, 1, 20001, dtype=torch.float64))) / 2
    middle = (grid[1:] + grid[:-1]) / 2
    mass = (middle * (1 - middle)) ** (0.6 - 1) * grid.diff()
    total = torch.cat((mass.new_zeros(1), mass.cumsum(0)))
    total = total / total[-1]
    at = torch.searchsorted(total, u.contiguous()).clamp(1, len(grid) - 1)
    low, high = total[at - 1], total[at]
    part = ((u - low) / (high - low)).clamp(0, 1)
    return torch.lerp(grid[at - 1], grid[at], part)


def _karras(u: Tensor, steps: int) -> Tensor:
    """Karras et al. 2022, rho 7, in the flow's own noise level n = sigma / (1 - sigma) from 80 to 0.02,
    laid over the whole way from 1 to 0."""
    rho, most, least = 7.0, 80.0, 0.02
    n = (least ** (1 / rho) + u * (most ** (1 / rho) - least ** (1 / rho))) ** rho
    sigma, ends = n / (1 + n), torch.tensor([least, most], dtype=u.dtype)
    low, high = (ends / (1 + ends)).tolist()
    return (sigma - low) / (high - low)


@dataclass(frozen=True)
class Spacing:
    """`place`(u, steps): where the evenly spaced u go. `shifted`: whether mu is applied after."""

    label: str
    place: Callable[[Tensor, int], Tensor]
    shifted: bool = True


SPACINGS: dict[str, Spacing] = {
    "flux2": Spacing("the reference's own", _even),
    "linear": Spacing("even, not shifted", _even, shifted=False),
    "cosine": Spacing("slow at both ends, shifted", _cosine),
    "beta": Spacing("more steps at both ends, shifted", _beta),
    "karras": Spacing("Karras' noise levels, not shifted", _karras, shifted=False),
}


def sigmas(
    steps: int,
    *,
    width: int,
    height: int,
    spacing: str = "flux2",
    shift_by: float | None = None,
    curve: Tensor | None = None,
    start: float = 0.0,
    end: float = 1.0,
) -> Tensor:
    """-> float32 (steps + 1,), falling, for a picture of width x height pixels.

    `shift_by` replaces mu. `curve` (n,), rising or falling between 0 and 1, is a spacing of one's
    own, drawn through n points and shifted like the reference's. `start` and `end` are the shares of
    the way that are gone: start 0.4 begins at the noise of a schedule of steps / (1 - 0.4) steps after
    its first 40 %, so that as many steps are run; end below 1 leaves noise in the picture.
    """
    if steps < 1:
        raise Flux2Error(
            "A picture needs at least one step", f"{steps} steps", "Set steps to 1 or more"
        )
    if not 0 <= start < end <= 1:
        raise Flux2Error(
            "The schedule must begin before it ends",
            f"start {start:g}, end {end:g}",
            "Set start to 0 or more, end to 1 or less, and start below end",
        )
    if spacing not in SPACINGS:
        raise Flux2Error(
            "There is no such spacing", repr(spacing)[:40], f"Choose one of {', '.join(SPACINGS)}"
        )
    way, total = SPACINGS[spacing], whole(steps, start, end)
    first = total - steps if end == 1 else min(round(start * total), total - steps)
    u = torch.linspace(1, 0, total + 1, dtype=torch.float64)
    placed = way.place(u, total) if curve is None else through(curve, u)
    if way.shifted or curve is not None:
        amount = mu((height // 16) * (width // 16), total) if shift_by is None else shift_by
        placed = shift(placed, amount)
    return placed.float()[first : first + steps + 1]


def partial(steps: int, strength: float, **how) -> Tensor:
    """The end of a longer schedule, for a picture of which the share `strength` is drawn anew: as many
    steps are run, from the noise that steps / strength of them leave. 1 is `sigmas` itself, whose
    other arguments are `how`. Raises Flux2Error for a strength outside (0, 1]."""
    if not 0 < strength <= 1:
        raise Flux2Error(
            "The strength must be above 0 and at most 1",
            f"{strength:g}",
            "Use 1 to draw all of the picture anew, 0.5 to keep its composition",
        )
    total = max(steps, round(steps / strength))
    return sigmas(total, **how)[-(steps + 1) :]


def whole(steps: int, start: float = 0.0, end: float = 1.0) -> int:
    """The steps of the schedule of which `steps` are run: mu belongs to this number."""
    return max(steps, round(steps / (end - start)))


def through(curve: Tensor, u: Tensor) -> Tensor:
    """The drawn line through evenly spaced points, read at 1 - u; from 1 to 0 whatever its direction
    and ends."""
    points = curve.double()
    points = points if points[0] >= points[-1] else points.flip(0)
    points = (points - points[-1]) / (points[0] - points[-1])
    at = (1 - u) * (len(points) - 1)
    low = at.floor().long().clamp(max=len(points) - 2)
    return torch.lerp(points[low], points[low + 1], at - low)


NUMBERS = re.compile(r"[\s,;]+")


def numbers(
    text: str, what: str, *, least: int = 2, low=-math.inf, high=math.inf, example="1 0.8 0.3 0"
) -> list[float]:
    """Numbers as people type them, parted by spaces, commas or lines. Raises Flux2Error that says
    which of them is none, too few or out of range; `what` names the field."""
    found = []
    for word in filter(None, NUMBERS.split(text.strip())):
        try:
            value = float(word)
        except ValueError as error:
            raise Flux2Error(
                f"{what} holds something that is no number",
                repr(word)[:40],
                f"Write numbers parted by spaces or commas: {example}",
            ) from error
        if not (low <= value <= high):  # NaN is not
            raise Flux2Error(
                f"A number of {what} is out of range",
                word[:40],
                f"Keep them between {low:g} and {high:g}",
            )
        found.append(value)
    if len(found) < least:
        raise Flux2Error(
            f"{what} needs at least {least} numbers", f"{len(found)}", f"Write it like: {example}"
        )
    return found


def monotone(values: list[float], what: str) -> Tensor:
    """The numbers as a curve (n,). Raises Flux2Error unless they only rise or only fall."""
    steps = [b - a for a, b in pairwise(values)]
    if not (all(s < 0 for s in steps) or all(s > 0 for s in steps)):
        wrong = next(
            i + 1 for i, s in enumerate(steps) if (s >= 0) == (values[-1] < values[0]) or s == 0
        )
        raise Flux2Error(
            f"{what} goes up and down",
            f"number {wrong + 1} is {values[wrong]:g} after {values[wrong - 1]:g}",
            "Let the numbers fall from the first to the last (or rise)",
        )
    return torch.tensor(values, dtype=torch.float64)


def explicit(values: list[float], steps: int | None = None) -> Tensor:
    """A list of sigmas, as typed -> float32. Raises Flux2Error unless it falls within 0 and 1, and,
    with `steps`, has one number more than there are steps."""
    if steps is not None and len(values) != steps + 1:
        raise Flux2Error(
            "The list of sigmas has another length than the steps ask for",
            f"{len(values)} numbers for {steps} steps",
            f"Write {steps + 1} numbers, or set steps to {len(values) - 1} or to 0",
        )
    if any(b >= a for a, b in pairwise(values)) or not (values[-1] >= 0 and values[0] <= 1):
        raise Flux2Error(
            "A list of sigmas must fall, from at most 1 to at least 0",
            " ".join(f"{v:g}" for v in values)[:80],
            "Write it like: 1 0.9 0.7 0.4 0",
        )
    return torch.tensor(values, dtype=torch.float32)


def share(sigmas: Tensor, sigma: float) -> float:
    """The share of a run's steps that lies behind `sigma`: i / n within step i of n.

    Solvers that look between two steps are within the earlier one.
    """
    steps = len(sigmas) - 1
    begun = int((sigmas[:-1] >= sigma * (1 - 1e-4)).sum())
    return max(0, begun - 1) / max(1, steps)


# ----------------------------------------------------------------------------------------- presets


@dataclass(frozen=True)
class Preset:
    """Steps and guidance as a share of what a variant wants, or as Flex has them."""

    steps: int
    guidance: float
    about: str


# Source: Black Forest Labs' help pages for Flex.
PRESETS: dict[str, Preset] = {
    "draft": Preset(12, 0.0, "a quick look"),
    "standard": Preset(0, 0.0, "what the model wants"),
    "fine type": Preset(50, 7.0, "clean lettering"),
    "art": Preset(30, 4.0, "loose and painterly"),
}


def preset(name: str, variant: Variant) -> tuple[int, float]:
    """-> steps, guidance of a preset; a distilled variant keeps its own, a draft of it halves them."""
    chosen = PRESETS[name]
    if variant.guidance_kind == "none" or variant.steps < 20:
        return max(1, variant.steps // 2) if name == "draft" else variant.steps, 0.0
    return chosen.steps or variant.steps, chosen.guidance
