"""Large pictures in the memory of small ones."""

from . import host_windows
from .schema import Schema, io


class Flux2KitWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitWindows",
            display_name="FLUX.2 Windows",
            category="FLUX.2/model",
            description="The model looks at a large picture through overlapping windows: 4 megapixels "
            "in the memory of one, as one picture. For refining an enlarged draft.",
            search_aliases=["tiled diffusion", "multidiffusion", "ultimate upscale", "tiles"],
            inputs=[
                io.Model.Input("model", tooltip="A model from FLUX.2 Loader or FLUX.2 Load Model."),
                io.Int.Input(
                    "window",
                    default=1024,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip="Side of a window in pixels. A picture that fits into one is drawn as ever.",
                ),
                io.Int.Input(
                    "overlap",
                    default=256,
                    min=0,
                    max=2048,
                    step=16,
                    tooltip="Pixels that neighbours share at least. More is smoother and slower.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with windows, for the sampler.")],
        )

    @classmethod
    def execute(cls, model, window=1024, overlap=256):
        return io.NodeOutput(host_windows.with_windows(model, window, overlap))
