"""What guidance means for a model: one forward with a number, or two whose difference is scaled."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .configs import Variant
from .errors import Flux2Error
from .transformer import Controls, Flux2Transformer

Velocity = Callable[[Tensor, Tensor], Tensor]
Steer = Callable[[float], Controls | None]  # sigma -> what holds at that time


def cfg(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """negative + scale (positive - negative): at 1 the positive alone."""
    return torch.lerp(negative, positive, scale)


def split(variant: Variant, guidance: float | None) -> tuple[float | None, float]:
    """The user's guidance (None or 0: what the variant wants) -> (embedded value, CFG scale).

    Distilled variants have neither: whatever is asked, they get (None, 1).
    """
    value = guidance or variant.guidance
    if variant.guidance_kind == "embedded":
        return value, 1.0
    return None, value if variant.guidance_kind == "cfg" else 1.0


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
    embedded: float | None = None,
    scale: float = 1.0,
    references: Sequence[Tensor] = (),
    controls: Controls | Steer | None = None,
) -> Velocity:
    """-> v(x, t) with x (B, 128, h, w), t (B,); context and negative (B or 1, T, ctx).

    Two forwards where scale is not 1; both get the references (source: reference implementation),
    the prompts of regions, and their isolation, only the first.
    """

    def one(x: Tensor, t: Tensor, text: Tensor, drop: bool = False) -> Tensor:
        guidance = None if embedded is None else torch.full_like(t, embedded)
        text = text.expand(x.shape[0], -1, -1)
        now = controls(float(t[0])) if callable(controls) else controls
        if now is not None and drop:
            now = replace(now, regions=(), isolate=False)
        return model(x, t, text, guidance, references, now)

    def two(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1.0 or negative is None:
            return one(x, t, context)
        return cfg(one(x, t, context), one(x, t, negative, drop=True), scale)

    return two
