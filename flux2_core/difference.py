"""Difference maps that people can read: where two pictures differ, how much, and in words."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MOST = 20.0  # CIEDE2000 at the top of the colour scale
_STOPS = ((12, 10, 30), (92, 24, 110), (205, 66, 70), (250, 160, 50), (252, 250, 190))
_GROUND, _INK, _DIM = (24, 24, 28), (232, 232, 236), (150, 150, 158)


def heat(values: Tensor, most: float = MOST) -> Tensor:
    """(H, W) from 0 to `most` -> RGB (H, W, 3) in [0, 1], dark to bright."""
    stops = torch.tensor(_STOPS, dtype=torch.float32) / 255
    at = (values.float() / most).clamp(0, 1) * (len(stops) - 1)
    low = at.floor().long().clamp(max=len(stops) - 2)
    return stops[low].lerp(stops[low + 1], (at - low)[..., None])


def report(
    pictures: dict[str, Tensor], maps: dict[str, Tensor], text: str, *, side: int = 320
) -> Tensor:
    """Pictures (H, W, 3) of one size by title, maps (H, W) of CIEDE2000 by title with their scale, and
    lines of text under them, as one picture (h, w, 3) in [0, 1]."""
    panels = {**pictures, **{title: heat(values) for title, values in maps.items()}}
    height, width = next(iter(panels.values())).shape[:2]
    by = side / max(height, width)
    size = (max(1, round(width * by)), max(1, round(height * by)))
    font, lines = ImageFont.load_default(15), text.splitlines()
    gap, line = 12, 22
    sheet = Image.new(
        "RGB",
        (
            max(len(panels) * (size[0] + gap) + gap, 560),
            size[1] + 3 * gap + (3 + len(lines)) * line,
        ),
        _GROUND,
    )
    pen = ImageDraw.Draw(sheet)
    how = Image.Resampling.NEAREST if by > 1 else Image.Resampling.LANCZOS
    top = size[1] + gap + line + gap // 2
    for i, (title, panel) in enumerate(panels.items()):
        left = gap + i * (size[0] + gap)
        pen.text((left, gap // 2), title, _DIM, font)
        sheet.paste(_pil(panel).resize(size, how), (left, gap + line))
        if title in maps:
            _scale(sheet, pen, (left, top, size[0]), font)
    for i, words in enumerate(lines):
        pen.text((gap, top + line + gap + i * line), words, _INK, font)
    return torch.from_numpy(np.asarray(sheet).copy()).float() / 255


def _scale(sheet: Image.Image, pen: ImageDraw.ImageDraw, place: tuple[int, int, int], font) -> None:
    left, top, width = place
    ramp = heat(torch.linspace(0, MOST, width).expand(8, -1))
    sheet.paste(_pil(ramp), (left, top))
    for share, label in ((0, "0"), (0.5, f"{MOST / 2:g}"), (1, f"{MOST:g}+")):
        anchor = ("la", "ma", "ra")[round(2 * share)]
        pen.text((left + share * width, top + 10), label, _DIM, font, anchor=anchor)


def _pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())
