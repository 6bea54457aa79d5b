"""Draft small, finish large."""

from ..flux2_core import enlarge
from ..flux2_core.errors import Flux2Error
from ..flux2_core.latents import PIXELS
from . import host, host_sampling
from .schema import Schema, io


def _inputs() -> list:
    return [
        io.Model.Input("model", tooltip="The model that will finish: it knows its steps."),
        io.Latent.Input("latent", tooltip="The draft: a finished latent, or a preview's."),
        io.Vae.Input("vae", tooltip="The FLUX.2 VAE."),
        io.Float.Input(
            "scale",
            default=2.0,
            min=1.0,
            max=8.0,
            step=0.05,
            tooltip="How much larger each side becomes. 2 makes 1 megapixel into 4.",
        ),
        io.Float.Input(
            "change",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much may change: 0 nothing, 0.3 detail only, 0.5 shapes get sharper, 0.8 only "
            "the layout stays, 1 is drawn anew.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=200,
            tooltip="Steps for the finish. 0 is auto: a quarter of what the model wants.",
        ),
    ]


class Flux2KitEnlarge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitEnlarge",
            display_name="FLUX.2 Enlarge",
            category="FLUX.2/sampling",
            description="Carries a small draft to full size, with the sigmas to finish it there: the same "
            "composition for a fraction of the time.",
            search_aliases=["hires fix", "upscale latent", "draft to final"],
            inputs=_inputs(),
            outputs=[
                io.Latent.Output(tooltip="The draft at full size, for Sampler Custom Advanced."),
                io.Sigmas.Output(tooltip="From where to finish it, for the same sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, vae, scale=2.0, change=0.5, steps=0):
        host.check_vae(vae)
        samples = host_sampling.empty_for(model, latent)
        width, height = (
            PIXELS * max(1, round(side * scale)) for side in (samples.shape[3], samples.shape[2])
        )
        check(samples)
        if (width, height) != (samples.shape[3] * PIXELS, samples.shape[2] * PIXELS):
            samples = vae.encode(enlarge.resize(vae.decode(samples), width, height))
        steps = enlarge.steps_for(steps, host.variant_of(model).steps)
        sigmas = enlarge.sigmas(steps, enlarge.start_of(change, scale), width=width, height=height)
        out = {**latent, "samples": samples, "downscale_ratio_spacial": PIXELS}
        out.pop("noise_mask", None)  # of the draft's size
        return io.NodeOutput(out, sigmas)


def check(samples) -> None:
    if not bool(samples.any()):
        raise Flux2Error(
            "There is no draft to enlarge",
            "an empty latent",
            "Connect the latent of a sampler that has drawn it",
        )
