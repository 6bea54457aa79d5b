"""Preview a run, and finish the very same one."""

from ..flux2_core.errors import Flux2Error
from . import host_run
from .sampling import SEED
from .schema import Schema, State, io


class Flux2KitPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitPreview",
            display_name="FLUX.2 Preview",
            category="FLUX.2/sampling",
            description="Runs the first steps and shows the picture as it looks then. FLUX.2 Continue "
            "finishes the very same run: nothing is computed twice.",
            search_aliases=["pause", "preview then final", "draft"],
            inputs=[
                io.Guider.Input("guider", tooltip="From FLUX.2 Steps & Guidance."),
                io.Sigmas.Input("sigmas", tooltip="The whole run's, from FLUX.2 Steps & Guidance."),
                io.Latent.Input("latent", tooltip="The canvas, or a picture to change."),
                io.Sampler.Input(
                    "sampler", optional=True, tooltip="From FLUX.2 Solver. Empty is Euler."
                ),
                io.Int.Input("seed", **SEED),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=200,
                    tooltip="How many of the run's steps. 0 is auto: half of them.",
                ),
            ],
            outputs=[
                State.Output(display_name="state", tooltip="The paused run."),
                io.Latent.Output(tooltip="The picture as it looks now, for FLUX.2 VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls, guider, sigmas, latent, seed=0, steps=0, sampler=None):
        state = host_run.begin(guider, sigmas, latent, seed, sampler)
        steps = min(steps or max(1, state.steps // 2), state.steps)
        state = host_run.go_on(guider, state, steps)
        return io.NodeOutput(state, host_run.picture(guider, state))


def _continue() -> list:
    return [
        State.Input("state", tooltip="From FLUX.2 Preview, FLUX.2 Load State or another FLUX.2 Continue."),
        io.Guider.Input(
            "guider",
            tooltip="The same one finishes the same picture; another prompt, guidance or other "
            "references change what is still open.",
        ),
        io.Sampler.Input("sampler", optional=True, tooltip="Another solver for the rest. Empty: the same."),
        io.Float.Input(
            "strength",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="How much of what is done is drawn again, with fresh noise. 0: nothing, the run "
            "just goes on; 1: from the start.",
        ),
        io.Int.Input(
            "steps", default=0, min=0, max=200, tooltip="How many steps to take now. 0: all that are left."
        ),
    ]  # fmt: skip


class Flux2KitContinue(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitContinue",
            display_name="FLUX.2 Continue",
            category="FLUX.2/sampling",
            description="Goes on with a paused run. With the same guider the picture is the one of a run "
            "without a pause, bit for bit.",
            search_aliases=["resume", "finish"],
            inputs=_continue(),
            outputs=[
                io.Latent.Output(tooltip="The picture, for FLUX.2 VAE Decode."),
                State.Output(display_name="state", tooltip="The run, to go on with or to save."),
            ],
        )

    @classmethod
    def execute(cls, state, guider, strength=0.0, steps=0, sampler=None):
        state = host_run.continued(state, guider, sampler, strength)
        left = state.steps - state.step
        if not left:
            raise Flux2Error(
                "This run is finished",
                f"all {state.steps} steps are done",
                "Set strength above 0 to draw some of them again, or begin with FLUX.2 Preview",
            )
        state = host_run.go_on(guider, state, state.step + min(steps or left, left))
        return io.NodeOutput(host_run.picture(guider, state), state)
