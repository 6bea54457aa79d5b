"""The sampler: noise, schedule, guidance and solver in one node."""

from . import host_run, host_sampling
from .flex import GUIDANCE, NEGATIVE, STEPS
from .schema import Schema, io
from .solver import ETA, SOLVER

SEED = {
    "default": 0,
    "min": 0,
    "max": 2**63 - 1,
    "control_after_generate": True,
    "tooltip": "Which noise to start from: the same seed gives the same picture. The next pictures "
    "of a batch have seed + 1, + 2 ...",
}
DENOISE = {
    "default": 1.0,
    "min": 0.01,
    "max": 1.0,
    "step": 0.01,
    "tooltip": "How much of an existing picture is drawn anew: 1 all of it, 0.5 keeps its "
    "composition. As many steps are run, over the end of a longer schedule.",
}


class Flux2KitSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitSampler",
            display_name="FLUX.2 Sampler",
            category="FLUX.2/sampling",
            description="Draws: from noise to a finished latent, with the model's own schedule and "
            "kind of guidance, and a preview at every step.",
            search_aliases=["ksampler", "flux2 ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model that draws."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
                io.Latent.Input(
                    "latent", tooltip="The canvas from FLUX.2 Empty Latent, or a picture to change."
                ),
                io.Int.Input("steps", **STEPS),
                io.Float.Input("guidance", **GUIDANCE),
                io.Int.Input("seed", **SEED),
                io.Float.Input("denoise", **DENOISE),
                io.Combo.Input("solver", optional=True, **SOLVER),
                io.Float.Input("eta", optional=True, **ETA),
            ],
            outputs=[io.Latent.Output(tooltip="The finished latent, for FLUX.2 VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, steps=0, guidance=0.0, seed=0, denoise=1.0, negative=None,
        solver="euler", eta=1.0,
    ):  # fmt: skip
        guider = host_sampling.guider(model, positive, negative, guidance)
        sigmas = host_sampling.sigmas(model, latent, steps, denoise)
        sampler = None if solver == "euler" else host_run.for_latent(solver, eta, seed, latent)
        return io.NodeOutput(host_sampling.sample(guider, sigmas, latent, seed, sampler))
