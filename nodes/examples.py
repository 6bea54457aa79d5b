"""Example pictures: reference inputs for the shipped workflows, so that no file can be missing."""

from dataclasses import replace

from ..flux2_core.errors import Flux2Error
from ..flux2_core.nano import scenes
from ..flux2_core.references import from_pil
from .schema import Schema, io, ui

FREE_PLACES = {1: ("center",), 2: ("left", "right")}


class Flux2KitExamplePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitExamplePicture",
            display_name="FLUX.2 Example Picture",
            category="FLUX.2/examples",
            description="A plain shape on a plain background, drawn without any model: stands in for "
            "your own picture where an example needs one.",
            search_aliases=["test image", "placeholder", "nano"],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle left on white background",
                    tooltip="What is in it: one or more of circle, square, triangle, cross, ring, each "
                    "with a colour (red, green, blue, yellow, purple, cyan, orange, black) and a place "
                    "(left, right, top, bottom, center), on white, gray, pink or tan background.",
                ),
                io.Int.Input(
                    "size",
                    default=128,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Width and height in pixels. nano knows references of 64 and 128.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, text, size=128):
        picture = scenes.draw(complete(read(text)), size, size)
        image = from_pil(picture)[None]
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def read(text: str) -> scenes.Scene:
    """What the text names. Raises Flux2Error for text that is not about shapes."""
    try:
        return scenes.parse(text)
    except Flux2Error as error:
        raise Flux2Error(
            "FLUX.2 Example Picture draws plain shapes and cannot read this",
            f"'{text}'",
            "Write it like: a red circle left and a blue square right on tan background. For a "
            "picture of your own use Load Image",
        ) from error


def complete(scene: scenes.Scene) -> scenes.Scene:
    """What the text leaves open gets a value, always the same one."""
    things = scene.things
    places = FREE_PLACES.get(len(things), tuple(scenes.PLACES))
    counted = len(things) > 2 and len(set(things)) == 1  # three circles
    if counted:
        kind = replace(things[0], size=sum(scenes.COUNT_SIZES) / 2)
        things = scenes.alike(kind, len(things))
    filled = (
        replace(
            thing,
            shape=thing.shape or "circle",
            color=thing.color or "red",
            place=thing.place or places[i % len(places)],
            size=thing.size if counted else middle(thing, len(things)),
        )
        for i, thing in enumerate(things)
    )
    return scenes.Scene(tuple(filled), scene.background or "white")


def middle(thing: scenes.Thing, count: int) -> float:
    return sum(scenes.usual_sizes(thing, count)) / 2
