"""What FLUX.2 Steps & Guidance is about to run: sigmas, guidance step by step, and it in words."""

from dataclasses import dataclass

from torch import Tensor

from ..flux2_core import schedule
from ..flux2_core.configs import Variant
from ..flux2_core.guidance import Course, split
from . import host, host_plan, host_sampling
from .plan import NONE, run_of, seconds_as_words

CURVE, LIST = "curve", "sigmas"
RECOMMENDED = {"steps": (1, 50), "guidance": (1.5, 10.0)}  # Flex's own ranges


@dataclass(frozen=True)
class Planned:
    """`guidance` as asked (0: auto); `strengths` its value in each step; `extra` for the guider."""

    sigmas: Tensor
    guidance: float
    course: Course
    strengths: list[float]
    extra: dict
    title: str
    words: list[str]
    warnings: list[str]


def plan(
    model, positive, latent, steps=0, guidance=0.0, preset="standard", spacing="flux2", mu=0.0, curve="",
    start=0.0, end=1.0, course="constant", low=1.0, guidance_start=0.0, guidance_end=1.0,
    guidance_curve="", rescale=0.0, zero_init=False, measure=True,
) -> Planned:  # fmt: skip
    """The widgets' values -> what will run. Raises Flux2Error for values that contradict each other."""
    variant = host.variant_of(model)
    wanted = schedule.preset(preset, variant)
    typed = schedule.numbers(curve, "The list of sigmas") if spacing == LIST else None
    asked = steps or (len(typed) - 1 if typed else wanted[0])
    guidance = guidance or wanted[1]
    size = host_sampling.size_of(latent)
    if typed:
        sigmas = schedule.explicit(typed, steps or None)
    else:
        how = {"spacing": spacing, "start": start, "end": end}
        if spacing == CURVE:
            drawn = schedule.numbers(curve, "The curve", low=0, high=1)
            how |= {"spacing": "flux2", "curve": schedule.monotone(drawn, "The curve")}
        sigmas = host_sampling.sigmas(model, latent, asked, shift_by=mu or None, **how)
    embedded, scale = split(variant, guidance or known(positive))
    value = scale if embedded is None else embedded
    points = ()
    if course == "curve":
        points = tuple(
            schedule.numbers(
                guidance_curve, "The curve of guidance", low=0, high=30, example="1 4 4 1"
            )
        )
    way = Course(value, course, low, guidance_start, guidance_end, points)
    count = len(sigmas) - 1
    inert = variant.guidance_kind == "none"
    strengths = [1.0 if inert else way.at(i, count) for i in range(count)]
    passes = sum(_passes(variant, s, zero_init and i == 0) for i, s in enumerate(strengths))
    return Planned(
        sigmas,
        guidance,
        way,
        strengths,
        {"rescale": rescale, "zero_init": zero_init},
        f"{variant.label}, {count} steps at {size[0]} x {size[1]}",
        _words(model, latent, sigmas, passes, mu, spacing, (start, end), measure),
        _warnings(variant, count, strengths, course, rescale, (start, end), typed is not None),
    )


def known(positive) -> float:
    """The guidance that another node put into the prompt, or 0."""
    return next((float(o["guidance"]) for _, o in positive if o.get("guidance")), 0.0)


def _passes(variant: Variant, strength: float, skipped: bool) -> int:
    """Forwards in one step."""
    if skipped:
        return 0
    return 2 if variant.guidance_kind == "cfg" and strength != 1 else 1


def _words(model, latent, sigmas, passes, mu, spacing, span, measure) -> list[str]:
    run, count = run_of(model, latent, NONE), len(sigmas) - 1
    picture = run.picture
    shift = mu or schedule.mu(picture, schedule.whole(count, *span))
    shifted = spacing == CURVE or (
        spacing in schedule.SPACINGS and schedule.SPACINGS[spacing].shifted
    )
    noted = f"mu {shift:.3f}" if shifted else "not shifted"
    said = [
        f"{count} steps, {passes} passes; {picture:,} picture tokens and {run.config.text_length:,} of "
        f"text, references not counted; {noted}; noise {float(sigmas[0]):.3g} to {float(sigmas[-1]):.3g}."
    ]
    clock = host_plan.clock_of(model) if measure else None
    if clock is not None:
        sizes = {"text": run.config.text_length, "picture": picture, "batch": run.batch}
        one = clock.seconds(run.config, **sizes, references=[], kv=run.kv)
        said.append(
            f"About {seconds_as_words(one)} a pass here, {seconds_as_words(one * passes)} in all, "
            "without references."
        )
    return said


def _warnings(variant, count, strengths, course, rescale, span, typed) -> list[str]:
    said = []
    high = RECOMMENDED["steps"][1]
    if count > high:
        said.append(f"{count} steps: beyond {high} the picture hardly changes any more.")
    if variant.guidance_kind == "none":
        if course != "constant" or rescale:
            said.append(
                f"{variant.label} is distilled and takes no guidance: its course does nothing."
            )
        return said
    if course != "constant" and len(set(strengths)) == 1:
        said.append(
            f"The course of guidance never changes: with {count} steps it stays at {strengths[0]:g}."
        )
    least, most = RECOMMENDED["guidance"]
    peak = max(strengths, default=1.0)
    if peak > most or (peak < least and peak != 1):
        said.append(f"Guidance {peak:g}: {least:g} to {most:g} is the usual range.")
    if variant.guidance_kind == "embedded" and rescale:
        said.append(f"{variant.label} has its guidance built in: rescale does nothing.")
    if typed and span != (0.0, 1.0):
        said.append("A list of sigmas is run as it is: start and end do nothing.")
    return said
