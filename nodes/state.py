"""Paused runs as files."""

from . import host_state
from .schema import Schema, State, io, ui


class Flux2KitSaveState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitSaveState",
            display_name="FLUX.2 Save State",
            category="FLUX.2/sampling",
            description="Writes a paused run below ComfyUI's output folder: finish it another day.",
            search_aliases=["save latent", "checkpoint run"],
            inputs=[
                State.Input("state", tooltip="From FLUX.2 Preview or FLUX.2 Continue."),
                io.String.Input(
                    "name",
                    default="flux2_kit/run",
                    tooltip="The file's name below the output folder. A number is added: no file is "
                    "written over.",
                ),
            ],
            outputs=[io.String.Output(display_name="name", tooltip="For FLUX.2 Load State.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, state, name="flux2_kit/run"):
        saved = host_state.save(state, name)
        return io.NodeOutput(saved, ui=ui.PreviewText(f"Saved as {saved}."))


class Flux2KitLoadState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitLoadState",
            display_name="FLUX.2 Load State",
            category="FLUX.2/sampling",
            description="Reads a paused run, for FLUX.2 Continue.",
            search_aliases=["load latent", "resume run"],
            inputs=[
                io.String.Input(
                    "name",
                    default="flux2_kit/run_00001.safetensors",
                    tooltip="The file's name below ComfyUI's output or input folder, as FLUX.2 Save "
                    "State shows it.",
                ),
            ],
            outputs=[
                State.Output(display_name="state", tooltip="The paused run."),
                io.String.Output(display_name="about", tooltip="Which run it is."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name="", **_):
        return host_state.stamp(name)

    @classmethod
    def execute(cls, name):
        state = host_state.load(name)
        height, width = (16 * side for side in state.x.shape[-2:])
        about = (
            f"{state.model.variant}, {width} x {height}: {state.step} of {state.steps} steps done with "
            f"{state.solver}, seed {state.seeds[0]}"
        )
        return io.NodeOutput(state, about, ui=ui.PreviewText(about))
