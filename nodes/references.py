"""Reference pictures: a visible chain of them, and where they are encoded."""

import logging
from dataclasses import replace

from ..flux2_core.references import MOST, STRONGEST, Reference, check_names, label, pixels, plan
from . import host, host_controls
from .masks import each
from .schema import References, Schema, io

EACH, PER_PICTURE = "one reference each", "one per picture"
log = logging.getLogger(__name__)


def _controls() -> list:
    """What came after the first release: at the end, and optional, so that old graphs still run."""

    def number(name, default, most, step, tooltip):
        limits = {"default": default, "min": 0.0, "max": most, "step": step}
        return io.Float.Input(name, optional=True, tooltip=tooltip, **limits)

    return [
        number(
            "strength",
            1.0,
            STRONGEST,
            0.05,
            "How much attention the reference gets, as a factor. 1 is the model's own, 0 as if it "
            "were absent (its number stays taken), 3 the most.",
        ),
        number(
            "start",
            0.0,
            1.0,
            0.01,
            "From where in the run it acts, as a share of the steps: 0 from the beginning, 0.5 from "
            "half of them. The beginning decides the layout, the end colours and detail.",
        ),
        number(
            "end",
            1.0,
            1.0,
            0.01,
            "Until where in the run it acts, as a share of the steps: 1 to the last. Steps without "
            "it cost less time.",
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Which parts of this picture count: white stays, black leaves, in patches of 16 "
            "pixels. What leaves costs no time. One mask, or one for each picture of a batch.",
        ),
        io.Mask.Input(
            "region",
            optional=True,
            tooltip="Where in the new picture the reference may act: white there, gray a little, "
            "black not. Any size; it is stretched over the new picture.",
        ),
        number(
            "megapixels",
            0.0,
            4.1,
            0.05,
            "The most it may have, in millions of pixels: a larger picture is shrunk. 0 is the "
            "model's rule: 4.1 for one alone, 1 each for several. Smaller is faster, with less detail.",
        ),
        io.Float.Input(
            "importance",
            default=1.0,
            min=0.05,
            max=10.0,
            step=0.05,
            optional=True,
            tooltip="Its share, as a factor, where FLUX.2 Reference Plan shrinks references to a "
            "budget: 2 keeps twice the pixels that 1 keeps. Without a budget it does nothing.",
        ),
        io.Combo.Input(
            "batch",
            options=[EACH, PER_PICTURE],
            default=EACH,
            optional=True,
            tooltip="What a batch of pictures is. One reference each: three pictures are three "
            "references. One per picture: they are one reference, the first for the first picture "
            "of the batch that is drawn, the second for the second ...; as many as are drawn.",
        ),
    ]


class Flux2KitReference(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitReference",
            display_name="FLUX.2 Reference",
            category="FLUX.2/references",
            description="Adds one picture to a chain of references, and says how much, when and where "
            "it counts. The first in the chain is image 1.",
            search_aliases=["reference latent", "kontext", "edit image", "reference strength"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture to refer to. At least 64 pixels a side and at most 8 times "
                    "as long as wide; large ones are shrunk. For several at once see batch.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="What the prompt may call it: with the name hero, @hero in FLUX.2 Prompt "
                    "becomes image 1, or whichever number it has. Letters, digits, - and _.",
                ),
                References.Input(
                    "references",
                    optional=True,
                    tooltip="The references that come before this one. At most ten in all.",
                ),
                *_controls(),
            ],
            outputs=[
                References.Output(display_name="references", tooltip="The chain, longer by one.")
            ],
        )

    @classmethod
    def execute(cls, image, name="", references=(), batch=EACH, **controls):
        return io.NodeOutput(longer(references, image, name.strip().lstrip("@"), batch, **controls))


def longer(chain, image, name, batch, mask=None, region=None, megapixels=0.0, **controls) -> tuple:
    """The chain and, after it, IMAGE (N, H, W, 3) as N references, or as one with N pictures."""
    pictures = [image] if batch == PER_PICTURE and len(image) > 1 else list(image)
    names = [name, *[""] * (len(pictures) - 1)]
    plain = [
        Reference(picture, called, megapixels=megapixels or None, **controls)
        for picture, called in zip(pictures, names, strict=True)
    ]
    called = label(len(chain), Reference(image, name))
    masks = each(mask, len(plain), f"The mask of {called}")
    regions = each(region, len(plain), f"The region of {called}")
    for reference, cut, place in zip(plain, masks, regions, strict=True):
        _note_size(reference, cut, label(len(chain), reference))
        chain = (*chain, replace(reference, mask=cut, region=place))
    plan(chain)
    check_names(chain)
    return chain


def _note_size(reference: Reference, mask, called: str) -> None:
    """The core stretches a mask over its picture, which the user should know of."""
    if mask is not None and (mask.shape[-1], mask.shape[-2]) != reference.size:
        seen, wanted = f"{mask.shape[-1]} x {mask.shape[-2]}", "{} x {}".format(*reference.size)
        log.warning(
            "The mask of %s has %s pixels, the picture %s: it is stretched.", called, seen, wanted
        )


def _slot(i: int):
    return io.Image.Input(
        f"image_{i}",
        optional=True,
        tooltip=f"A reference picture. Empty slots are skipped: this is image {i} if no chain is "
        "connected and no slot before it is empty.",
    )


class Flux2KitApplyReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitApplyReferences",
            display_name="FLUX.2 Apply References",
            category="FLUX.2/references",
            description="Encodes reference pictures and gives them to the prompts: a chain, pictures "
            "in the numbered slots, or both (the chain comes first).",
            search_aliases=["reference latent", "kontext", "edit image", "multi reference"],
            inputs=[
                io.Vae.Input("vae", tooltip="The FLUX.2 VAE that encodes the pictures."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt, where one is used: it gets the same references.",
                ),
                References.Input(
                    "references", optional=True, tooltip="A chain of FLUX.2 Reference."
                ),
                *(_slot(i) for i in range(1, MOST + 1)),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
                References.Output(display_name="references", tooltip="All of them, in order."),
            ],
        )

    @classmethod
    def execute(cls, vae, positive, negative=None, references=(), **images):
        host.check_vae(vae)
        chain = (*references, *pictures(images))
        added = encode(vae, chain), host_controls.entries(chain)
        attach = host_controls.with_references
        return io.NodeOutput(attach(positive, *added), attach(negative, *added), chain)


def pictures(images: dict) -> list[Reference]:
    """Those in the slots image_1 ... image_10, in this order; each of a batch counts."""
    slots = (images.get(f"image_{i}") for i in range(1, MOST + 1))
    return [Reference(picture) for slot in slots if slot is not None for picture in slot]


def encode(vae, chain) -> list:
    """References -> latents (1 or N, 128, h, w), in the sizes that their number allows."""
    return [
        vae.encode((pixels(reference, fit).movedim(1, -1) + 1) / 2)
        for reference, fit in zip(chain, plan(chain), strict=True)
    ]
