"""A labelled contact sheet: one picture for each value down and across."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import Flux2Error

_GROUND, _INK, _DIM = (24, 24, 28), (232, 232, 236), (150, 150, 158)
# in sides of a cell: the place for labels on the left and above, and between cells
LEFT, TOP, GAP = 0.5, 0.32, 0.0625
Box = tuple[int, int, int, int]


def boxes(width: int, rows: int, columns: int, aspect: float = 1.0) -> list[Box]:
    """Where the pictures are on a sheet `width` pixels wide, row by row: left, top, right, bottom.
    `aspect` is their width over their height; a cell's longer side is 1."""
    wide, high = min(1.0, aspect), min(1.0, 1 / aspect)
    side = width / (LEFT + columns * (wide + GAP))
    out = []
    for row in range(rows):
        for column in range(columns):
            left, top = LEFT + column * (wide + GAP), TOP + row * (high + GAP)
            box = (left, top, left + wide, top + high)
            out.append(tuple(round(v * side) for v in box))
    return out  # type: ignore[return-value]


def sheet(
    pictures: Sequence[Tensor],
    down: Sequence[str],
    across: Sequence[str],
    title: str = "",
    side: int = 256,
) -> Tensor:
    """Pictures (H, W, 3) in [0, 1] of one size, row by row, a label for each row and column -> RGB
    (h, w, 3) in [0, 1]. Raises Flux2Error where their number does not fit."""
    if len(pictures) != len(down) * len(across) or not len(pictures):
        raise Flux2Error(
            "The sheet has another number of places than there are pictures",
            f"{len(pictures)} pictures for {len(down)} x {len(across)}",
            "Give a picture for every row and column",
        )
    height, width = pictures[0].shape[:2]
    aspect = width / height
    wide, high = min(1.0, aspect), min(1.0, 1 / aspect)
    size = (
        round(side * (LEFT + len(across) * (wide + GAP))),
        round(side * (TOP + len(down) * (high + GAP))),
    )
    page = Image.new("RGB", size, _GROUND)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(max(11, round(0.085 * side)))
    small = ImageFont.load_default(max(10, round(0.07 * side)))
    places = boxes(size[0], len(down), len(across), aspect)
    for picture, box in zip(pictures, places, strict=True):
        array = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
        how = Image.Resampling.LANCZOS
        page.paste(Image.fromarray(array).resize((box[2] - box[0], box[3] - box[1]), how), box[:2])
    pen.text((GAP * side, GAP * side), title, _INK, font)
    for i, words in enumerate(across):
        box = places[i]
        pen.text(((box[0] + box[2]) / 2, box[1] - 0.03 * side), words, _DIM, small, anchor="mb")
    for i, words in enumerate(down):
        box = places[i * len(across)]
        pen.text(
            (LEFT * side - 0.04 * side, (box[1] + box[3]) / 2), words, _DIM, small, anchor="rm"
        )
    return torch.from_numpy(np.asarray(page).copy()).float() / 255
