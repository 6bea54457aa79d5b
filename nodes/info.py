"""What a file is, before it is loaded."""

from ..flux2_core.info import describe
from . import host, host_plan
from .schema import Schema, io, ui

FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras")


def _files() -> list[str]:
    """Every file that may be FLUX.2's, with its folder before it."""
    return [f"{folder}/{name}" for folder in FOLDERS for name in host.files(folder)]


class Flux2KitCheckpointInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitCheckpointInfo",
            display_name="FLUX.2 Checkpoint Info",
            category="FLUX.2/loaders",
            description="Says what a file is without loading it: variant, layout, precision, what it "
            "goes with, and what this computer will do with it. Only its header is read.",
            search_aliases=["model info", "metadata", "precision", "inspect"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[f"diffusion_models/{host.NANO}", *_files()],
                    default=f"diffusion_models/{host.NANO}",
                    tooltip="A file of models/diffusion_models, text_encoders, vae or loras.",
                )
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What the node shows.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        return host.stamp(*file.split("/", 1))

    @classmethod
    def execute(cls, file):
        folder, name = file.split("/", 1)
        info = describe(host.NANO_FILE if name == host.NANO else host.path_of(folder, name))
        lines = [*info.lines, *host_plan.room_for(info)]
        host_plan.show(cls.hidden, "\n".join(lines))
        return io.NodeOutput("\n".join(lines), ui=ui.PreviewText("\n".join(lines)))
