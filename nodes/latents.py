"""Latents: an empty canvas of the right size, and pictures in and out."""

import logging
import math

import torch

from ..flux2_core import sizes
from ..flux2_core.latents import CHANNELS, PIXELS, check_size
from . import host, host_vae
from .inpaint import put_back
from .schema import Schema, io

SIZE = "flux2_kit_size"  # of a LATENT: (width, height) that FLUX.2 VAE Decode cuts back to
log = logging.getLogger(__name__)

ASPECTS = ["1:1", "5:4", "4:3", "3:2", "16:9", "21:9", "4:5", "3:4", "2:3", "9:16", "9:21"]

MEGAPIXELS = {
    "default": 0.0,
    "min": 0.0,
    "max": 16.0,
    "step": 0.05,
    "tooltip": "Area in millions of pixels. 0 is auto: the model's native area, 1.05 for dev and "
    "klein, 0.016 for nano. More than 4 is slow and gets worse.",
}
BATCH = {
    "default": 1,
    "min": 1,
    "max": 64,
    "tooltip": "How many pictures at once. FLUX.2 Sampler draws the seed's own picture first, then "
    "those of seed + 1, seed + 2 ...",
}


def _side(name: str):
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=8192,
        step=PIXELS,
        tooltip=f"Exact {name} in pixels, a multiple of {PIXELS}. 0 is auto: from the other side and "
        "the aspect, or from megapixels.",
    )


class Flux2KitEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitEmptyLatent",
            display_name="FLUX.2 Empty Latent",
            category="FLUX.2/latent",
            description="An empty canvas: by shape and megapixels, or exactly as many pixels as you say.",
            search_aliases=["empty flux 2 latent", "size", "resolution", "megapixels"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will draw: it knows its native size."
                ),
                io.Combo.Input(
                    "aspect",
                    options=ASPECTS,
                    default="1:1",
                    tooltip="Width to height. Not used where width and height are both set.",
                ),
                io.Float.Input("megapixels", **MEGAPIXELS),
                _side("width"),
                _side("height"),
                io.Int.Input("batch_size", **BATCH),
            ],
            outputs=[io.Latent.Output(tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, model, aspect="1:1", megapixels=0.0, width=0, height=0, batch_size=1):
        area = megapixels * 1e6 or host.variant_of(model).size ** 2
        width, height = fit(aspect, area, width, height)
        check_size(width, height)
        if warning := sizes.too_large(width, height):
            log.warning("%s", warning)
        samples = torch.zeros(batch_size, CHANNELS, height // PIXELS, width // PIXELS)
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": PIXELS})


def fit(aspect: str, area: float, width: int = 0, height: int = 0) -> tuple[int, int]:
    """The size in pixels: sides that are set stay, the others are multiples of 16."""
    across, down = (int(number) for number in aspect.split(":"))
    ratio = across / down
    if not width and not height:
        width = _whole(math.sqrt(area * ratio))
        height = _whole(math.sqrt(area / ratio))
    return width or _whole(height * ratio), height or _whole(width / ratio)


def _whole(side: float) -> int:
    return max(PIXELS, round(side / PIXELS) * PIXELS)


def _memory_inputs() -> list:
    return [
        io.Float.Input(
            "memory",
            default=0.0,
            min=0.0,
            max=256.0,
            step=0.005,
            optional=True,
            tooltip="Most memory in GB (of 1024 MB) that this may take for a picture, beyond the "
            "VAE's weights. 0 is auto: what is free. Where the whole picture does not fit at once, "
            "it goes strip by strip with the same result, without seams.",
        ),
        io.Boolean.Input(
            "overflow",
            default=False,
            optional=True,
            tooltip="What does not fit on the graphics card may wait in the computer's memory. Slow, "
            "and only used where it is needed.",
        ),
    ]


class Flux2KitVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitVAEEncode",
            display_name="FLUX.2 VAE Encode",
            category="FLUX.2/latent",
            description="A picture of any size as a latent, to change it with denoise below 1.",
            search_aliases=["image to latent", "img2img"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture. Sides that are no multiple of 16 are continued by reflection; "
                    "FLUX.2 VAE Decode cuts that off again.",
                ),
                io.Vae.Input("vae", tooltip="The FLUX.2 VAE."),
                *_memory_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, image, vae, memory=0.0, overflow=False):
        host.check_vae(vae)
        padded = sizes.pad(image[..., :3])
        with host_vae.bounded(vae, memory, overflow):
            samples = vae.encode(padded)
        height, width = image.shape[1:3]
        size = {SIZE: (width, height)} if padded.shape[1:3] != image.shape[1:3] else {}
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": PIXELS, **size})


class Flux2KitVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitVAEDecode",
            display_name="FLUX.2 VAE Decode",
            category="FLUX.2/latent",
            description="A latent as a picture. What FLUX.2 Inpaint or Outpaint cut out goes back to its place.",
            search_aliases=["latent to image", "4 megapixels", "vae decode tiled", "out of memory"],
            inputs=[
                io.Latent.Input("samples", tooltip="The finished latent from the sampler."),
                io.Vae.Input("vae", tooltip="The FLUX.2 VAE."),
                *_memory_inputs(),
            ],
            outputs=[io.Image.Output(tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, samples, vae, memory=0.0, overflow=False):
        host.check_vae(vae)
        with host_vae.bounded(vae, memory, overflow):
            images = vae.decode(samples["samples"])
        if size := samples.get(SIZE):
            images = sizes.cut(images, size)
        return io.NodeOutput(put_back(images, samples))
