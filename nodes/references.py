"""Reference pictures: a visible chain of them, and where they are encoded."""

from ..flux2_core.errors import Flux2Error
from ..flux2_core.references import MOST, Reference, check_names, pixels, plan
from . import host
from .schema import References, Schema, io


class Flux2KitReference(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitReference",
            display_name="FLUX.2 Reference",
            category="FLUX.2/references",
            description="Adds one picture to a chain of references. The first in the chain is image 1.",
            search_aliases=["reference latent", "kontext", "edit image"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture to refer to. At least 64 pixels a side and at most 8 times "
                    "as long as wide; large ones are shrunk. A batch counts as that many references.",
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
            ],
            outputs=[
                References.Output(display_name="references", tooltip="The chain, longer by one.")
            ],
        )

    @classmethod
    def execute(cls, image, name="", references=()):
        name = name.strip().lstrip("@")
        added = tuple(Reference(picture, name if i == 0 else "") for i, picture in enumerate(image))
        chain = (*references, *added)
        plan(chain)
        check_names(chain)
        return io.NodeOutput(chain)


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
        encoded = encode(vae, chain)
        return io.NodeOutput(attach(positive, encoded), attach(negative, encoded), chain)


def pictures(images: dict) -> list[Reference]:
    """Those in the slots image_1 ... image_10, in this order; each of a batch counts."""
    slots = (images.get(f"image_{i}") for i in range(1, MOST + 1))
    return [Reference(picture) for slot in slots if slot is not None for picture in slot]


def encode(vae, chain) -> list:
    """References -> latents (1, 128, h, w), in the sizes that their number allows."""
    return [
        vae.encode((pixels(reference, fit).movedim(1, -1) + 1) / 2)
        for reference, fit in zip(chain, plan(chain), strict=True)
    ]


def attach(conditioning, encoded: list):
    """The conditioning with the references after those that it has already; None stays None."""
    if conditioning is None or not encoded:
        return conditioning
    out = []
    for text, options in conditioning:
        latents = [*options.get("reference_latents", []), *encoded]
        if len(latents) > MOST:
            raise Flux2Error(
                f"FLUX.2 takes at most {MOST} reference images",
                f"{len(latents)}, with those that another node added",
                f"Remove {len(latents) - MOST}",
            )
        out.append([text, {**options, "reference_latents": latents}])
    return out
