"""Curves of a run as a picture: noise and guidance, step by step."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GROUND, _PANEL, _GRID = (24, 24, 28), (32, 32, 38), (58, 58, 66)
_INK, _DIM, _NOISE, _GUIDE = (232, 232, 236), (150, 150, 158), (108, 170, 255), (255, 176, 92)
_SCALE = 2  # drawn larger, then averaged down: smooth lines
WIDTH, HEIGHT = 880, 380


def run(sigmas: Tensor, guidance: Sequence[float], title: str, notes: Sequence[str] = ()) -> Tensor:
    """sigmas (n + 1,) and a guidance value for each of n steps -> RGB (h, w, 3) in [0, 1]."""
    size = (WIDTH * _SCALE, (HEIGHT + 20 * len(notes)) * _SCALE)
    sheet = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(sheet)
    _text(pen, (20, 16), title, _INK, 17)
    half = (WIDTH - 60) // 2
    steps = len(sigmas) - 1
    noise = [(i, float(s)) for i, s in enumerate(sigmas)]
    _panel(pen, (20, 52, half, 290), "noise left (sigma)", noise, steps, 1.0, _NOISE)
    most = max(1.0, math.ceil(max(guidance, default=1.0)))
    held = [(i + k, value) for i, value in enumerate(guidance) for k in (0, 1)]
    place = (40 + half, 52, half, 290)
    _panel(pen, place, "guidance", held, steps, most, _GUIDE, dots=False)
    for i, note in enumerate(notes):
        _text(pen, (20, HEIGHT - 16 + 20 * i), note, _DIM, 13)
    small = sheet.resize((size[0] // _SCALE, size[1] // _SCALE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).float() / 255


def _panel(pen, place, label: str, points, steps: int, top: float, ink, dots: bool = True) -> None:
    """A frame with axes, a grid and one line; x from 0 to `steps`, y from 0 to `top`."""
    left, upper, width, height = place
    _box(pen, (left, upper, left + width, upper + height), _PANEL)
    _text(pen, (left + 12, upper + 8), label, ink, 14)
    x0, y0, across, up = left + 40, upper + height - 26, width - 56, height - 66
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = y0 - share * up
        _line(pen, [(x0, y), (x0 + across, y)], _GRID, 1)
        _text(pen, (x0 - 6, y), f"{share * top:.3g}", _DIM, 11, "rm")
    marks = sorted({round(steps * i / min(steps, 6)) for i in range(min(steps, 6) + 1)})
    for step in marks:
        x = x0 + across * step / steps
        _line(pen, [(x, y0), (x, y0 - up)], _GRID, 1)
        _text(pen, (x, y0 + 5), str(step), _DIM, 11, "ma")
    drawn = [(x0 + across * i / steps, y0 - up * min(v, top) / top) for i, v in points]
    _line(pen, drawn, ink, 2)
    if dots and steps <= 60:
        for x, y in drawn:
            _dot(pen, (x, y), 3.2, ink)


def _line(pen, points, ink, width: int) -> None:
    scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
    pen.line(scaled, ink, width * _SCALE, joint="curve")


def _dot(pen, at, radius: float, ink) -> None:
    x, y, r = at[0] * _SCALE, at[1] * _SCALE, radius * _SCALE
    pen.ellipse((x - r, y - r, x + r, y + r), ink)


def _box(pen, box, ink) -> None:
    pen.rounded_rectangle([v * _SCALE for v in box], 8 * _SCALE, ink)


def _text(pen, at, words: str, ink, size: int, anchor: str = "la") -> None:
    font = ImageFont.load_default(size * _SCALE)
    pen.text((at[0] * _SCALE, at[1] * _SCALE), words, ink, font, anchor=anchor)
