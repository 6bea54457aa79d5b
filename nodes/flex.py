"""Steps and guidance for any sampler: the model's own schedule and kind of guidance."""

from . import host_sampling
from .schema import Schema, io

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


class Flux2KitFlex(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitFlex",
            display_name="FLUX.2 Steps & Guidance (Flex)",
            category="FLUX.2/sampling",
            description="The schedule for this model and size, and a guider with its kind of "
            "guidance: for Sampler Custom Advanced.",
            search_aliases=["flux2 scheduler", "basic guider", "cfg guider", "sigmas"],
            inputs=[
                io.Model.Input("model", tooltip="The model that draws."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
                io.Latent.Input(
                    "latent", tooltip="The canvas. Only its size is used: it shifts the schedule."
                ),
                io.Int.Input("steps", **STEPS),
                io.Float.Input("guidance", **GUIDANCE),
            ],
            outputs=[
                io.Guider.Output(tooltip="For Sampler Custom Advanced."),
                io.Sigmas.Output(tooltip="For Sampler Custom Advanced."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, latent, steps=0, guidance=0.0, negative=None):
        guider = host_sampling.guider(model, positive, negative, guidance)
        return io.NodeOutput(guider, host_sampling.sigmas(model, latent, steps))
