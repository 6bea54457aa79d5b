"""Quantised copies of a model, for the next time."""

from . import host_save
from .schema import Schema, io, ui

FORMATS = ["fp8", "fp8_rows", "int8", "nvfp4", "mxfp8"]


class Flux2KitSaveQuantized(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitSaveQuantized",
            display_name="FLUX.2 Save Quantized",
            category="FLUX.2/loaders",
            description="Writes a model with its blocks quantised: half the size as fp8, a third as "
            "nvfp4. The file lands below ComfyUI's output folder.",
            search_aliases=["save checkpoint", "quantize", "fp8", "export"],
            inputs=[
                io.Model.Input("model", tooltip="A model from FLUX.2 Load Model, without LoRAs."),
                io.Combo.Input(
                    "format",
                    options=FORMATS,
                    default="fp8",
                    tooltip="fp8 is read by every FLUX.2 loader, and fastest on cards from Ada on. "
                    "fp8_rows has a scale for each row, for this pack: more exact. int8 is the most "
                    "exact, nvfp4 the smallest.",
                ),
                io.String.Input(
                    "name",
                    default="flux2_quantized",
                    tooltip="The file's name below the output folder; folders with / between. A "
                    "number is added: no file is written over.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, format="fp8", name="flux2_quantized"):
        path = host_save.save(model, format, name)
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"Saved as {path.name}."))
