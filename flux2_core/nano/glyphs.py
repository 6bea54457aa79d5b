"""Capital letters as strokes: the same on every computer, for no font is read."""

import math
from itertools import pairwise

# A glyph is a list of lines through points (u, v): u from left to right, v from top to bottom.
Line = list[tuple[float, float]]

STROKE = 0.18  # of the height
ASPECT = 0.72  # width / height
WIDE = {"m": 0.95, "w": 0.95}


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float) -> Line:
    """Part of an ellipse; degrees, clockwise from the right."""
    turns = [math.radians(start + (end - start) * i / 16) for i in range(17)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in turns]


STROKES: dict[str, list[Line]] = {
    "a": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.68), (0.8, 0.68)]],
    "b": [
        [(0, 0), (0, 1)],
        [(0, 0), *_arc(0.6, 0.23, 0.35, 0.23, -90, 90), (0, 0.46)],
        [(0, 0.46), *_arc(0.6, 0.73, 0.4, 0.27, -90, 90), (0, 1)],
    ],
    "c": [_arc(0.5, 0.5, 0.5, 0.5, -50, -310)],
    "d": [[(0, 0), (0, 1)], [(0, 0), *_arc(0.4, 0.5, 0.6, 0.5, -90, 90), (0, 1)]],
    "e": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
    "f": [[(1, 0), (0, 0), (0, 1)], [(0, 0.5), (0.8, 0.5)]],
    "g": [_arc(0.5, 0.5, 0.5, 0.5, -50, -360), [(1, 0.5), (0.55, 0.5)]],
    "h": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "i": [[(0.5, 0), (0.5, 1)], [(0, 0), (1, 0)], [(0, 1), (1, 1)]],
    "j": [[(0.3, 0), (1, 0)], [(1, 0), *_arc(0.5, 0.62, 0.5, 0.38, 0, 180)]],
    "k": [[(0, 0), (0, 1)], [(1, 0), (0.05, 0.55)], [(0.3, 0.42), (1, 1)]],
    "l": [[(0, 0), (0, 1), (1, 1)]],
    "m": [[(0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)]],
    "n": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
    "o": [_arc(0.5, 0.5, 0.5, 0.5, 0, 360)],
    "p": [[(0, 0), (0, 1)], [(0, 0), *_arc(0.6, 0.28, 0.4, 0.28, -90, 90), (0, 0.56)]],
    "q": [_arc(0.5, 0.46, 0.5, 0.46, 0, 360), [(0.5, 0.6), (1, 1)]],
    "r": [
        [(0, 0), (0, 1)],
        [(0, 0), *_arc(0.6, 0.26, 0.4, 0.26, -90, 90), (0, 0.52)],
        [(0.45, 0.52), (1, 1)],
    ],
    "s": [[*_arc(0.5, 0.25, 0.5, 0.25, -30, -270), *_arc(0.5, 0.75, 0.5, 0.25, -90, 150)]],
    "t": [[(0.5, 0), (0.5, 1)], [(0, 0), (1, 0)]],
    "u": [[(0, 0), *_arc(0.5, 0.6, 0.5, 0.4, 180, 0), (1, 0)]],
    "v": [[(0, 0), (0.5, 1), (1, 0)]],
    "w": [[(0, 0), (0.22, 1), (0.5, 0.3), (0.78, 1), (1, 0)]],
    "x": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
    "y": [[(0, 0), (0.5, 0.5), (1, 0)], [(0.5, 0.5), (0.5, 1)]],
    "z": [[(0, 0), (1, 0), (0, 1), (1, 1)]],
}


def aspect(letter: str) -> float:
    """Width over height."""
    return WIDE.get(letter, ASPECT)


def draw_glyph(pen, letter: str, box: tuple[float, float, float, float], fill) -> None:
    """A letter that fills the box (left, top, right, bottom) of a PIL drawing."""
    x0, y0, x1, y1 = box
    thick = STROKE * (y1 - y0)
    half = thick / 2
    for line in STROKES[letter]:
        points = [
            (x0 + half + u * (x1 - x0 - thick), y0 + half + v * (y1 - y0 - thick)) for u, v in line
        ]
        for a, b in pairwise(points):
            _segment(pen, a, b, half, fill)
        for x, y in points:
            pen.ellipse((x - half, y - half, x + half, y + half), fill)


def _segment(pen, a: tuple[float, float], b: tuple[float, float], half: float, fill) -> None:
    length = math.dist(a, b) or 1.0
    dx, dy = half * (b[1] - a[1]) / length, half * (a[0] - b[0]) / length
    corners = [(a[0] + dx, a[1] + dy), (b[0] + dx, b[1] + dy), (b[0] - dx, b[1] - dy)]
    pen.polygon([*corners, (a[0] - dx, a[1] - dy)], fill)
