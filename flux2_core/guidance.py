"""What guidance means for a model: one forward with a number, or two whose difference is scaled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .configs import Variant
from .errors import Flux2Error
from .schedule import share
from .transformer import Controls, Flux2Transformer

Velocity = Callable[[Tensor, Tensor], Tensor]
Steer = Callable[[float], Controls | None]  # sigma -> what holds at that time
Strength = float | Callable[[float], float]  # a guidance value, or one for each sigma


def cfg(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """negative + scale (positive - negative): at 1 the positive alone."""
    return torch.lerp(negative, positive, scale)


def rescaled(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """The guided velocity with the spread of the positive one, by `amount` of the way: takes back the
    overexposure of strong CFG. Source: Lin et al. 2023, Common Diffusion Noise Schedules, eq. 15, 16."""
    if not amount:
        return guided
    axes = tuple(range(1, guided.ndim))
    spread = positive.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-12)
    return torch.lerp(guided, guided * spread, amount)


KINDS = ("constant", "interval", "ramp up", "ramp down", "curve")


@dataclass(frozen=True)
class Course:
    """Guidance over a run: `value` at its height, `low` elsewhere (1 is none for CFG).

    constant: `value` throughout. interval: `value` from `start` to `end` (shares of the run), `low`
    outside. ramp up, ramp down: a straight line between them, from `start` to `end`. curve: through
    `points`, evenly spaced over the run.
    """

    value: float
    kind: str = "constant"
    low: float = 1.0
    start: float = 0.0
    end: float = 1.0
    points: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise Flux2Error(
                "There is no such course of guidance",
                repr(self.kind)[:40],
                f"Choose one of {', '.join(KINDS)}",
            )
        if not 0 <= self.start < self.end <= 1:
            raise Flux2Error(
                "The course of guidance must begin before it ends",
                f"from {self.start:g} to {self.end:g} of the run",
                "Set both between 0 and 1, the first below the second",
            )
        if self.kind == "curve" and len(self.points) < 2:
            raise Flux2Error(
                "A curve of guidance needs at least two numbers",
                f"{len(self.points)}",
                "Write values over the run: 1 4 4 1",
            )

    def at(self, step: int, steps: int) -> float:
        """The value in step `step` (from 0) of `steps`. Intervals hold from `start` to before `end` of
        the steps, as references do; lines and curves begin with the first step and end with the last."""
        if self.kind == "constant":
            return self.value
        if self.kind == "interval":
            return self.value if self.start <= step / steps < self.end else self.low
        along = step / max(1, steps - 1)
        if self.kind == "curve":
            place = along * (len(self.points) - 1)
            i = min(int(place), len(self.points) - 2)
            return self.points[i] + (place - i) * (self.points[i + 1] - self.points[i])
        along = min(max((along - self.start) / (self.end - self.start), 0.0), 1.0)
        along = along if self.kind == "ramp up" else 1 - along
        return self.low + along * (self.value - self.low)

    @property
    def values(self) -> tuple[float, ...]:
        """The values between which it runs."""
        if self.kind == "curve":
            return self.points
        return (self.value,) if self.kind == "constant" else (self.value, self.low)

    def over(self, sigmas: Tensor) -> Strength:
        """As a function of sigma within a run; a number where it is constant."""
        if self.kind == "constant":
            return self.value
        steps = len(sigmas) - 1
        return lambda sigma: self.at(round(share(sigmas, sigma) * steps), steps)


def split(variant: Variant, guidance: float | None) -> tuple[float | None, float]:
    """The user's guidance (None or 0: what the variant wants) -> (embedded value, CFG scale).

    Distilled variants have neither: whatever is asked, they get (None, 1).
    """
    value = guidance or variant.guidance
    if variant.guidance_kind == "embedded":
        return value, 1.0
    return None, value if variant.guidance_kind == "cfg" else 1.0


def over(
    variant: Variant, guidance: "float | Course | None", sigmas: Tensor
) -> tuple[Strength | None, Strength]:
    """`split` for a value or for a course over the run of these sigmas."""
    if not isinstance(guidance, Course):
        return split(variant, guidance)
    strength = guidance.over(sigmas)
    if variant.guidance_kind == "embedded":
        return strength, 1.0
    return None, strength if variant.guidance_kind == "cfg" else 1.0


def advice(variant: Variant, steps: int | None = None, guidance: float | None = None) -> list[str]:
    """Plain-word warnings about steps and guidance that this variant was not trained for; 0 and
    None are what it wants."""
    said = []
    if variant.guidance_kind == "none":
        if steps and steps > 2 * variant.steps:
            said.append(
                f"{variant.label} is distilled for {variant.steps} steps: {steps} take longer and may "
                "look worse."
            )
        if guidance and guidance != 1:
            said.append(f"{variant.label} takes no guidance: the value {guidance:g} does nothing.")
    elif steps and variant.steps >= 20 and steps < 10:
        said.append(
            f"{variant.label} is not distilled: with {steps} steps pictures stay rough, it wants "
            f"{variant.steps}. If this file is a distilled one, choose its variant in the loader."
        )
    return said


def check_negative(variant: Variant, scale: float, has_negative: bool) -> None:
    """Raise where CFG is asked for and there is nothing to steer away from."""
    if scale != 1.0 and not has_negative:
        raise Flux2Error(
            f"{variant.label} needs a negative prompt at guidance {scale:g}",
            "none is given",
            "Connect a second prompt to negative (an empty text is fine), or set guidance to 1",
        )


def velocity(
    model: Flux2Transformer,
    context: Tensor,
    *,
    negative: Tensor | None = None,
    embedded: Strength | None = None,
    scale: Strength = 1.0,
    rescale: float = 0.0,
    zero_above: float | None = None,
    references: Sequence[Tensor] = (),
    controls: Controls | Steer | None = None,
) -> Velocity:
    """-> v(x, t) with x (B, 128, h, w), t (B,); context and negative (B or 1, T, ctx).

    Two forwards where scale is not 1; both get the references (source: reference implementation),
    the prompts of regions, their isolation, and what attention steers away from, only the first. `embedded` and `scale` may be
    functions of sigma. `rescale`: see `rescaled`. `zero_above`: from this sigma on the velocity is zero
    and the model is not asked (zero-init of Fan et al. 2025, CFG-Zero*).
    """

    def one(x: Tensor, t: Tensor, text: Tensor, drop: bool = False) -> Tensor:
        value = embedded(float(t[0])) if callable(embedded) else embedded
        guidance = None if value is None else torch.full_like(t, value)
        text = text.expand(x.shape[0], -1, -1)
        now = controls(float(t[0])) if callable(controls) else controls
        if now is not None and drop:
            now = replace(now, regions=(), isolate=False, negative=None)
        return model(x, t, text, guidance, references, now)

    def two(x: Tensor, t: Tensor) -> Tensor:
        if zero_above is not None and float(t[0]) >= zero_above:
            return torch.zeros_like(x)
        strength = scale(float(t[0])) if callable(scale) else scale
        positive = one(x, t, context)
        if strength == 1.0 or negative is None:
            return positive
        guided = cfg(positive, one(x, t, negative, drop=True), strength)
        return rescaled(guided, positive, rescale)

    return two
