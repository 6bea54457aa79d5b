"""Steps and guidance for any sampler: the schedule and kind of guidance in the artist's hands."""

import logging

from ..flux2_core import charts, schedule
from ..flux2_core.guidance import KINDS
from . import host_sampling
from .flex_plan import CURVE, LIST, plan
from .schema import Schema, io, ui

log = logging.getLogger(__name__)

STEPS = {
    "default": 0,
    "min": 0,
    "max": 200,
    "tooltip": "How many steps. 0 is auto: what the model wants (50 for dev and klein base, 4 for klein, 8 for "
    "nano). 20 to 28 is the usual trade-off for dev.",
}
GUIDANCE = {
    "default": 0.0,
    "min": 0.0,
    "max": 30.0,
    "step": 0.1,
    "tooltip": "How strictly the prompt is followed. 0 is auto: what the model wants (4 for dev and klein base). "
    "Base models then draw twice a step and need a negative prompt; klein, which is distilled, "
    "takes no guidance: the value does nothing.",
}
NEGATIVE = "What to steer away from. Read by models with true guidance (klein base, nano above 1); others ignore it."
SPACINGS = [*schedule.SPACINGS, CURVE, LIST]


def _run() -> list:
    return [
        io.Model.Input("model", tooltip="The model that draws."),
        io.Conditioning.Input("positive", tooltip="The prompt."),
        io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
        io.Latent.Input(
            "latent", tooltip="The canvas. Only its size is used: it shifts the schedule."
        ),
        io.Int.Input("steps", **STEPS),
        io.Float.Input("guidance", **GUIDANCE),
    ]


def _outputs() -> list:
    return [
        io.Guider.Output(tooltip="For Sampler Custom Advanced."),
        io.Sigmas.Output(tooltip="For Sampler Custom Advanced."),
        io.Image.Output(display_name="chart", tooltip="Noise and guidance, step by step."),
        io.String.Output(display_name="plan", tooltip="What will run, in words."),
    ]


def _share(name: str, default: float, tooltip: str):
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tooltip
    )


def _schedule() -> list:
    return [
        io.Combo.Input(
            "preset",
            options=list(schedule.PRESETS),
            default="standard",
            optional=True,
            tooltip="Steps and guidance where these are on auto. draft: a quick look; standard: what "
            "the model wants; fine type: 50 steps, guidance 7; art: 30 steps, guidance 4. A distilled "
            "model keeps its own, a draft halves its steps.",
        ),
        io.Combo.Input(
            "spacing",
            options=SPACINGS,
            default="flux2",
            optional=True,
            tooltip="Where the steps lie. flux2: the reference's own. linear, cosine, beta, karras: others. "
            "curve: through the numbers below, then shifted. sigmas: exactly the numbers below.",
        ),
        io.Float.Input(
            "mu",
            default=0.0,
            min=0.0,
            max=6.0,
            step=0.01,
            optional=True,
            tooltip="Shift towards noise. 0 is auto: by size and steps, as the reference does; its value "
            "is in the plan. Higher: more steps for the layout; lower: more for the detail.",
        ),
        io.String.Input(
            "curve",
            default="",
            optional=True,
            tooltip="Numbers for spacing curve (from 1 to 0, any count: 1 0.9 0.5 0) or sigmas (one more "
            "than steps; steps on auto follows).",
        ),
        _share("start", 0.0, "For a picture in the latent: the share of the schedule to leave out. "
               "0.4 keeps its composition (as denoise 0.6)."),
        _share("end", 1.0, "Where to stop: below 1 noise is left, for another sampler to go on."),
    ]  # fmt: skip


def _guidance() -> list:
    return [
        io.Combo.Input(
            "course",
            options=list(KINDS),
            default="constant",
            optional=True,
            tooltip="Guidance over the run. interval: only from guidance_start to guidance_end; ramp up, "
            "ramp down: a line between them; curve: the numbers in guidance_curve.",
        ),
        io.Float.Input(
            "low",
            default=1.0,
            min=0.0,
            max=30.0,
            step=0.1,
            optional=True,
            tooltip="The value outside the interval, or at the low end of a ramp. At 1 a base model draws "
            "once a step there: faster.",
        ),
        _share("guidance_start", 0.0, "Where the interval or the ramp begins, as a share of the steps."),
        _share("guidance_end", 1.0, "Where it ends, as a share of the steps."),
        io.String.Input(
            "guidance_curve",
            default="",
            optional=True,
            tooltip="For course curve: values from the first step to the last: 1 5 5 2.",
        ),
        _share("rescale", 0.0, "Takes back the harsh contrast of strong guidance, 0.7 is usual. Base "
               "models only; 0 is off."),
        io.Boolean.Input(
            "zero_init",
            default=False,
            optional=True,
            tooltip="Leave out the first step, whose direction is the least certain. For many steps.",
        ),
        io.Boolean.Input(
            "measure",
            default=True,
            optional=True,
            tooltip="Time the model once, for about a second, so that the plan can say how long it takes.",
        ),
    ]  # fmt: skip


class Flux2KitFlex(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitFlex",
            display_name="FLUX.2 Steps & Guidance (Flex)",
            category="FLUX.2/sampling",
            description="The schedule for this model and size, and a guider with its kind of "
            "guidance: for Sampler Custom Advanced. Shows both as curves, and what will run.",
            search_aliases=["flux2 scheduler", "basic guider", "cfg guider", "sigmas"],
            inputs=[
                *_run(),
                *_schedule(),
                *_guidance(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, positive, latent, steps=0, guidance=0.0, negative=None, **how):
        made = plan(model, positive, latent, steps, guidance, **how)
        for sentence in made.warnings:
            log.warning(sentence)
        guider = host_sampling.guider(
            model, positive, negative, made.guidance, course=made.course, **made.extra
        )
        chart = charts.run(made.sigmas, made.strengths, made.title, made.words)[None]
        words = "\n".join([*made.words, *made.warnings])
        shown = ui.PreviewImage(chart, cls=cls)
        return io.NodeOutput(guider, made.sigmas, chart, words, ui=shown)
