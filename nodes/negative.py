"""A negative prompt for models that take no guidance."""

from ..flux2_core.errors import Flux2Error
from . import host_controls
from .schema import Schema, io


def _number(name: str, default: float, least: float, most: float, tooltip: str):
    step = 0.05 if most <= 1 else 0.1
    return io.Float.Input(name, default=default, min=least, max=most, step=step, tooltip=tooltip)


def _inputs() -> list:
    return [
        io.Conditioning.Input("positive", tooltip="The prompt, before or after its references."),
        io.Conditioning.Input(
            "negative", tooltip="What to steer away from: a FLUX.2 Prompt with the same CLIP."
        ),
        _number("scale", 5.0, 1.0, 50.0, "How strongly. 1 is off: the picture is then as without this node."),
        _number("tau", 2.5, 1.0, 20.0, "How far attention may grow before it is held back: lower is gentler."),
        _number("alpha", 0.25, 0.0, 1.0, "How much of the steered attention is used. 0 is off."),
        _number("start", 0.0, 0.0, 1.0, "From which share of the steps on."),
        _number("end", 1.0, 0.0, 1.0, "Up to which share of the steps. 0.5 costs half."),
    ]  # fmt: skip


class Flux2KitNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitNegative",
            display_name="FLUX.2 Negative",
            category="FLUX.2/prompt",
            description="A negative prompt that works on every FLUX.2, distilled klein included, in one "
            "pass: normalised attention guidance.",
            search_aliases=["nag", "normalized attention guidance", "negative prompt klein"],
            inputs=_inputs(),
            outputs=[io.Conditioning.Output(tooltip="For positive of the sampler.")],
        )

    @classmethod
    def execute(
        cls, positive, negative, scale=5.0, tau=2.5, alpha=0.25, start=0.0, end=1.0
    ):  # fmt: skip
        if scale == 1 or alpha == 0:
            return io.NodeOutput(positive)
        context = text_of(positive, negative)
        if start >= end:
            raise Flux2Error(
                "The negative never acts",
                f"it would act from {start:g} to {end:g} of the steps",
                "Set start below end",
            )
        entry = {"context": context, "scale": scale, "tau": tau, "alpha": alpha}
        entry |= {"start": start, "end": end}
        return io.NodeOutput(host_controls.with_negative(positive, entry))


def text_of(positive, negative):
    """The negative's rows. Raises Flux2Error where another text encoder made them, or several are
    combined."""
    if len(negative) != 1:
        raise Flux2Error(
            "One negative prompt is read, and several are connected",
            f"{len(negative)} combined",
            "Put all that is not wanted into one prompt",
        )
    context = negative[0][0]
    for text, _ in positive:
        if text.shape[-1] != context.shape[-1]:
            raise Flux2Error(
                "The negative prompt was made with another text encoder",
                f"its rows are {context.shape[-1]} wide, the prompt's {text.shape[-1]}",
                "Make both with the same CLIP",
            )
    return context
