"""What computes here, and why not something faster."""

from . import host_kernels, host_plan
from .schema import Schema, io, ui


class Flux2KitKernelStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitKernelStatus",
            display_name="FLUX.2 Kernel Status",
            category="FLUX.2/loaders",
            description="Says what this computer's card can do, what serves each step of the model "
            "on it and why nothing faster does, and how the model's layers are stored and multiplied.",
            search_aliases=["fp8", "precision", "attention", "triton", "benchmark", "speed"],
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A model whose layers are counted. Empty: only the card is told about.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What the node shows.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None):
        return float("nan")  # runs each time: what serves is found out while pictures are drawn

    @classmethod
    def execute(cls, model=None):
        text = host_kernels.status_of(model)
        host_plan.show(cls.hidden, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
