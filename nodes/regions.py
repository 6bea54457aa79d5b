"""A prompt of its own for a part of the picture."""

from torch import isfinite

from ..flux2_core.errors import Flux2Error
from . import host_controls
from .masks import each
from .schema import Schema, io

# What a conditioning may carry that a region cannot follow.
BOUND = {
    "reference_latents": "references",
    host_controls.KIT: "controls or regions",
    "area": "an area",
    "mask": "a mask",
    "start_percent": "a range of steps",
    "end_percent": "a range of steps",
    "control": "a ControlNet",
    "hooks": "hooks",
}

ISOLATE = (
    "On: the rest of the picture does not look into regions, so that less of their content leaks "
    "out. Off: the parts see each other and fit together better. One node with it on counts for all."
)


class Flux2KitRegionPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitRegionPrompt",
            display_name="FLUX.2 Region Prompt",
            category="FLUX.2/prompt",
            description="Gives a part of the picture a prompt of its own. One node a region, one "
            "after the other; all of them are drawn in one pass.",
            search_aliases=["regional prompt", "area composition", "attention couple"],
            inputs=[
                io.Conditioning.Input(
                    "positive", tooltip="The main prompt: for the whole picture."
                ),
                io.Conditioning.Input(
                    "prompt", tooltip="The region's prompt: a FLUX.2 Prompt, without references."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the region is: white inside, black outside, gray for soft edges. "
                    "Any size; it is stretched over the new picture.",
                ),
                io.Float.Input(
                    "base",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much the region still listens to the main prompt, as a factor: 0 "
                    "not at all, 1 as much as the rest of the picture does.",
                ),
                io.Boolean.Input("isolate", default=False, tooltip=ISOLATE),
            ],
            outputs=[io.Conditioning.Output(tooltip="The main prompt with one more region.")],
        )

    @classmethod
    def execute(cls, positive, prompt, mask, base=0.5, isolate=False):
        region = {"context": rows(prompt, positive), "region": place(mask), "base": float(base)}
        return io.NodeOutput(host_controls.with_region(positive, region, isolate))


def rows(prompt: list, positive: list):
    """A region's prompt -> (1, T, context_dim). Raises Flux2Error for one that is not plain text."""
    if len(prompt) != 1:
        raise Flux2Error(
            "A region takes one prompt",
            f"a conditioning of {len(prompt)} parts",
            "Connect FLUX.2 Prompt straight to it, and use one FLUX.2 Region Prompt a region",
        )
    ((text, options),) = prompt
    if found := [what for key, what in BOUND.items() if options.get(key) is not None]:
        raise Flux2Error(
            "A region's prompt is text alone",
            f"it carries {found[0]}",
            "Put that on the main prompt: a reference is bound to a place by its own region",
        )
    widths = {main.shape[-1] for main, _ in positive}
    if widths != {text.shape[-1]}:
        raise Flux2Error(
            "The region's prompt and the main prompt come from different text encoders",
            f"rows {text.shape[-1]} and {', '.join(map(str, sorted(widths)))} wide",
            "Use one CLIP for both",
        )
    return text


def place(mask):
    """MASK -> (H, W) in [0, 1]. Raises Flux2Error where it names no place."""
    (region,) = each(mask, 1, "The mask of a region")
    if not isfinite(region).all() or not (region > 0).any():
        raise Flux2Error(
            "The mask of a region must be white somewhere",
            f"{region.shape[-1]} x {region.shape[-2]} pixels, none above 0",
            "Paint white where the region is",
        )
    return region.float().clamp(0, 1)
