"""Redraw a part of a picture, or draw beyond its edges; everything else keeps its bytes."""

from torch import Tensor

from ..flux2_core import inpaint
from ..flux2_core.latents import PIXELS
from . import host
from .schema import Schema, io

PLACE = "flux2_kit_place"  # of a LATENT: where FLUX.2 VAE Decode puts the picture back

FEATHER = {
    "default": 16.0,
    "min": 0.0,
    "max": 256.0,
    "step": 1.0,
    "tooltip": "Over how many pixels inside the mask the last difference at its edge fades out.",
}


def _outputs() -> list:
    return [
        io.Latent.Output(tooltip="For the sampler, then FLUX.2 VAE Decode, which puts it back."),
        io.Image.Output(
            display_name="window",
            tooltip="The part of the picture that is worked on: a reference for the edit.",
        ),
        io.Mask.Output(display_name="window mask", tooltip="What is redrawn in it."),
    ]


def _latent(work: inpaint.Work, vae) -> dict:
    host.check_vae(vae)
    return {
        "samples": vae.encode(work.pictures),
        "noise_mask": inpaint.latent_mask(work.masks),
        "downscale_ratio_spacial": PIXELS,
        PLACE: work.place,
    }


def put_back(images: Tensor, latent: dict) -> Tensor:
    """Decoded pictures, back in the picture that the latent was cut from; others as they are."""
    place = latent.get(PLACE)
    return images if place is None else inpaint.stitch(images.cpu(), place)


def _window() -> list:
    return [
        io.Float.Input(
            "context",
            default=0.5,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip="How much of the surroundings the model sees, in sizes of the masked "
            "part, on every side. 10 is as good as the whole picture.",
        ),
        io.Float.Input(
            "megapixels",
            default=0.0,
            min=0.0,
            max=4.0,
            step=0.05,
            tooltip="Size at which the window is worked on, in millions of pixels. 0 leaves "
            "it as it is; 1 draws a small part with all the detail the model has.",
        ),
        io.Int.Input(
            "grow",
            default=0,
            min=0,
            max=256,
            tooltip="Pixels by which the mask is made larger first.",
        ),
    ]


class Flux2KitInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitInpaint",
            display_name="FLUX.2 Inpaint",
            category="FLUX.2/editing",
            description="Redraws what is masked. Works on a window around the mask at the size you "
            "choose; FLUX.2 VAE Decode puts it back, and outside the mask no pixel changes.",
            search_aliases=["inpaint crop", "mask edit", "inpaint stitch", "fill"],
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Mask.Input("mask", tooltip="White where it is redrawn; gray for soft edges."),
                io.Vae.Input("vae", tooltip="The FLUX.2 VAE."),
                *_window(),
                io.Float.Input("feather", **FEATHER),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, image, mask, vae, context=0.5, megapixels=0.0, grow=0, feather=16.0):
        masks = mask[None] if mask.ndim == 2 else mask
        work = inpaint.prepare(
            image[..., :3].cpu(), masks.cpu(),
            context=context, megapixels=megapixels, grow=grow, feather=feather,
        )  # fmt: skip
        return io.NodeOutput(_latent(work, vae), work.pictures, work.masks)


def _side(name: str):
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=4096,
        step=8,
        tooltip=f"Pixels to draw beyond the {name} edge.",
    )


class Flux2KitOutpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitOutpaint",
            display_name="FLUX.2 Outpaint",
            category="FLUX.2/editing",
            description="Draws beyond the edges of a picture. The picture itself keeps every pixel.",
            search_aliases=["extend", "uncrop", "pad image for outpainting", "expand"],
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Vae.Input("vae", tooltip="The FLUX.2 VAE."),
                *map(_side, ("left", "top", "right", "bottom")),
                io.Float.Input("feather", **FEATHER),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, image, vae, left=0, top=0, right=0, bottom=0, feather=16.0):
        sides = {"left": left, "top": top, "right": right, "bottom": bottom}
        canvas, mask = inpaint.extend(image[..., :3].cpu(), **sides)
        work = inpaint.prepare(canvas, mask, feather=feather, whole=True)
        return io.NodeOutput(_latent(work, vae), work.pictures, work.masks)
