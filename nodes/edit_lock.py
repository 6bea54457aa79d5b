"""Edits that stay put, and how far two pictures are apart."""

import torch

from ..flux2_core import difference, quality
from ..flux2_core.color import delta_e
from ..flux2_core.edit_lock import COLOR, lock
from ..flux2_core.errors import Flux2Error
from .masks import each
from .schema import Schema, io, ui


def _inputs() -> list:
    return [
        io.Image.Input("original", tooltip="The picture as it was."),
        io.Image.Input("edited", tooltip="What the model made of it. Another size is scaled."),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="White where the edit was wanted. Without one the part that visibly changed is found.",
        ),
        io.Boolean.Input(
            "align",
            default=True,
            tooltip="Measure how far the edit has moved or grown, and undo it inside the mask.",
        ),
        io.Float.Input(
            "limit",
            default=16.0,
            min=0.0,
            max=256.0,
            step=0.5,
            tooltip="Up to how many pixels a motion is undone; a larger one is only reported.",
        ),
        io.Combo.Input(
            "color",
            options=list(COLOR),
            default="affine",
            tooltip="Match colour and tone on the part that was to stay. affine: all channels "
            "together; mean: level and contrast of each channel; off: as they came.",
        ),
        io.Float.Input(
            "feather",
            default=8.0,
            min=0.0,
            max=256.0,
            step=1.0,
            tooltip="Width of the seam in pixels. It lies inside the mask.",
        ),
        io.Boolean.Input(
            "restore",
            default=True,
            tooltip="Put the original back outside the mask, value for value. Off: only motion and "
            "colour are corrected, everywhere.",
        ),
    ]


def _outputs() -> list:
    return [
        io.Image.Output(tooltip="The locked edit, in the original's size."),
        io.Image.Output(display_name="report", tooltip="Before, after, and where they differ."),
        io.String.Output(display_name="text", tooltip="Shift, scale and colour difference."),
        io.Mask.Output(tooltip="How much of the edit shows, pixel by pixel."),
    ]


class Flux2KitEditLock(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitEditLock",
            display_name="FLUX.2 Edit Lock",
            category="FLUX.2/editing",
            description="Keeps an edit to its place: undoes shift and colour drift, and outside the "
            "mask the picture is the original's, pixel for pixel.",
            search_aliases=["color match", "composite", "pixel shift", "colour drift", "restore"],
            inputs=_inputs(),
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, original, edited, mask=None, **how):
        done, shown = locked(original[..., :3].cpu(), edited[..., :3].cpu(), mask, how)
        image, alpha = torch.stack([d.image for d in done]), torch.stack([d.alpha for d in done])
        text = "\n\n".join(map(str, done))
        return io.NodeOutput(image, shown, text, alpha, ui=ui.PreviewImage(shown, cls=cls))


def locked(original, edited, mask, how: dict) -> tuple[list, torch.Tensor]:
    """Each edit locked to its original (one may serve all), and the report on the first."""
    count = len(edited)
    masks = each(mask, count, "The mask")
    olds = [original[i % len(original)] for i in range(count)]
    done = [lock(*pair, **how) for pair in zip(olds, edited, masks, strict=True)]
    maps = {
        "difference as it came": done[0].map,
        "difference now": delta_e(olds[0], done[0].image),
    }
    pictures = {"original": olds[0], "locked edit": done[0].image}
    return done, difference.report(pictures, maps, str(done[0]))[None]


class Flux2KitCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitCompare",
            display_name="FLUX.2 Compare Pictures",
            category="FLUX.2/editing",
            description="How far two pictures are apart, in figures and as a map: two runs, two "
            "autoencoders, before and after.",
            search_aliases=["psnr", "ssim", "lpips", "delta e", "difference", "quality"],
            inputs=[
                io.Image.Input("first", tooltip="One picture, or several."),
                io.Image.Input(
                    "second", tooltip="The other, of the same size; as many, or one for all."
                ),
                io.Boolean.Input(
                    "perceptual",
                    default=False,
                    tooltip="LPIPS too, where the Python package lpips is installed.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="report", tooltip="Both, and where they differ."),
                io.String.Output(display_name="text", tooltip="The figures, a line for each pair."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, first, second, perceptual=False):
        text, shown = compared(first[..., :3].cpu(), second[..., :3].cpu(), perceptual)
        return io.NodeOutput(shown, text, ui=ui.PreviewImage(shown, cls=cls))


def compared(first, second, perceptual: bool) -> tuple[str, torch.Tensor]:
    """A line of figures for each pair, and the report on the first."""
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise Flux2Error(
            "These pictures do not pair up",
            f"{len(first)} and {len(second)}",
            "Give as many on both sides, or one on one side",
        )
    count = max(len(first), len(second))
    pairs = [(first[i % len(first)], second[i % len(second)]) for i in range(count)]
    found = [quality.distance(a, b, perceptual=perceptual) for a, b in pairs]
    text = "\n".join(map(str, found))
    if perceptual and found[0].lpips is None:
        text += "\nLPIPS needs the Python package lpips, which is not installed"
    a, b = pairs[0]
    maps = {"difference (CIEDE2000)": delta_e(a, b)}
    return text, difference.report({"first": a, "second": b}, maps, text)[None]
