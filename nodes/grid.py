"""Steps against guidance: one labelled picture of them all."""

import torch

from ..flux2_core import schedule, sheet
from ..flux2_core.errors import Flux2Error
from . import host, host_sampling
from .flex import NEGATIVE
from .sampling import SEED
from .schema import Schema, io, ui

MOST = 64  # pictures


def _inputs() -> list:
    return [
        io.Model.Input("model", tooltip="The model that draws."),
        io.Conditioning.Input("positive", tooltip="The prompt."),
        io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
        io.Latent.Input("latent", tooltip="The canvas; the first picture of a batch is used."),
        io.Vae.Input("vae", tooltip="The FLUX.2 VAE."),
        io.String.Input("steps", default="0", tooltip="Steps, a row each: 8 20 50. 0 is auto."),
        io.String.Input(
            "guidance",
            default="0",
            tooltip="Guidance values, a column each: 1.5 4 7. 0 is auto.",
        ),
        io.Int.Input("seed", **SEED),
        io.Int.Input(
            "side",
            default=256,
            min=64,
            max=1024,
            tooltip="Longer side of each picture on the sheet, in pixels.",
        ),
    ]


class Flux2KitGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitGrid",
            display_name="FLUX.2 Steps x Guidance Sheet",
            category="FLUX.2/sampling",
            description="Draws one prompt and seed with every number of steps and every guidance that "
            "you name, side by side and labelled: a picture to choose by, and to share.",
            search_aliases=["xy plot", "contact sheet", "grid", "compare settings"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="All of them, labelled."),
                io.Image.Output(display_name="pictures", tooltip="Each alone, row by row."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, vae, steps="0", guidance="0", seed=0, side=256, negative=None
    ):
        host.check_vae(vae)
        down, across = values(steps, guidance)
        drawn = [
            vae.decode(draw(model, positive, negative, latent, s, g, seed)["samples"])
            for s in down
            for g in across
        ]
        pictures = torch.cat([picture[:1, ..., :3].cpu() for picture in drawn])
        page = labelled(pictures, host.variant_of(model), down, across, seed, side)[None]
        return io.NodeOutput(page, pictures, ui=ui.PreviewImage(page, cls=cls))


def values(steps: str, guidance: str) -> tuple[list[int], list[float]]:
    """What is typed -> numbers of steps, guidance values. Raises Flux2Error for too many."""
    rows = schedule.numbers(steps, "The list of steps", least=1, low=0, high=200, example="8 20 50")
    columns = schedule.numbers(
        guidance, "The list of guidance values", least=1, low=0, high=30, example="1.5 4 7"
    )
    if len(rows) * len(columns) > MOST:
        raise Flux2Error(
            "That is a very large sheet",
            f"{len(rows)} x {len(columns)} pictures",
            f"Stay within {MOST}",
        )
    return [round(row) for row in rows], columns


def draw(model, positive, negative, latent, steps: int, guidance: float, seed: int) -> dict:
    one = {**latent, "samples": latent["samples"][:1]}
    guider = host_sampling.guider(model, positive, negative, guidance)
    return host_sampling.sample(guider, host_sampling.sigmas(model, one, steps), one, seed)


def labelled(pictures, variant, down, across, seed: int, side: int) -> torch.Tensor:
    rows = [f"{s or variant.steps} steps" for s in down]
    columns = [f"guidance {g or variant.guidance:g}" for g in across]
    return sheet.sheet(pictures, rows, columns, f"{variant.label}, seed {seed}", side)
