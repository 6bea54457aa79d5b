"""LoRAs: small changes to a model, from every trainer."""

import logging

from . import host, host_lora
from .schema import Schema, io, ui

log = logging.getLogger(__name__)


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
            inputs=[
                io.Model.Input("model", tooltip="The model to change."),
                io.Combo.Input(
                    "lora",
                    options=host.files("loras") or ["none found in models/loras"],
                    tooltip="A file in models/loras, trained on the same FLUX.2: klein 4B, klein 9B "
                    "and dev cannot share LoRAs.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of it, as a factor: 1 as trained, 0 nothing, below 0 the "
                    "opposite.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA; several nodes add up."),
                io.String.Output(
                    display_name="report", tooltip="Keys used, renamed and skipped, each with why."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora, **_):
        return host.stamp("loras", lora)

    @classmethod
    def execute(cls, model, lora, strength=1.0):
        out, report = host_lora.with_lora(model, host.path_of("loras", lora), strength)
        log.info("FLUX.2 LoRA: %s", report)
        return io.NodeOutput(out, str(report), ui=ui.PreviewText(str(report)))
