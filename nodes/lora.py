"""LoRAs: small changes to a model, from every trainer."""

import logging

from . import host, host_lora
from .schema import Schema, io, ui

NONE = "none"
log = logging.getLogger(__name__)


def _inputs() -> list:
    return [
        io.Model.Input("model", tooltip="The model to change."),
        io.Combo.Input(
            "lora",
            options=[NONE, *host.files("loras")],
            default=NONE,
            tooltip="A file in models/loras, trained on the same FLUX.2: klein 4B, klein 9B and dev "
            "cannot share LoRAs. none leaves the model as it is.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=-4.0,
            max=4.0,
            step=0.05,
            tooltip="How much of it, as a factor: 1 as trained, 0 nothing, below 0 the opposite.",
        ),
    ]


class Flux2KitLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitLoRA",
            display_name="FLUX.2 LoRA",
            category="FLUX.2/loaders",
            description="Adds a LoRA to a model, whatever trainer wrote it, and says what became of "
            "its keys. Quantised weights stay as they are: the LoRA works beside them.",
            search_aliases=["load lora", "lora loader", "lokr", "loha", "dora"],
            inputs=_inputs(),
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA; several nodes add up."),
                io.String.Output(
                    display_name="report", tooltip="Keys used, renamed and skipped, each with why."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora=NONE, **_):
        return NONE if lora == NONE else host.stamp("loras", lora)

    @classmethod
    def execute(cls, model, lora=NONE, strength=1.0):
        if lora == NONE:
            return io.NodeOutput(model, "No LoRA is chosen.")
        out, report = host_lora.with_lora(model, host.path_of("loras", lora), strength)
        log.info("FLUX.2 LoRA: %s", report)
        return io.NodeOutput(out, str(report), ui=ui.PreviewText(str(report)))
