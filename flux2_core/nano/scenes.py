"""nano's world: pictures of plain shapes, the prompts that ask for them, and a checker.

`draw` makes a picture of a `Scene`, `describe` and the `*_prompt` functions word it, `parse` turns
a prompt back into what is wanted, and `check` reads pixels alone and says what is right. The
numbers are the contract of every nano figure: palette, places, sizes (world.py), tolerances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from .glyphs import STROKES, aspect, draw_glyph
from .wording import (
    background_prompt,
    describe,
    held_back,
    mix_prompt,
    parse,
    pick_prompt,
    recolor_prompt,
    reword,
)
from .world import (
    BACKGROUNDS,
    COLORS,
    COUNT_SIZES,
    COUNTS,
    LETTER,
    LETTER_SIZES,
    MEASURES,
    OPPOSITE,
    PAIR_SIZES,
    PLACES,
    SHAPES,
    SIZES,
    WORD,
    WORD_PLACES,
    WORD_SIZES,
    Scene,
    Thing,
    alike,
    usual_sizes,
)

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLORS",
    "COUNTS",
    "COUNT_SIZES",
    "LETTER",
    "LETTER_SIZES",
    "MEASURES",
    "OPPOSITE",
    "PAIR_SIZES",
    "PLACES",
    "SHAPES",
    "SIZES",
    "WORD",
    "WORD_PLACES",
    "WORD_SIZES",
    "Report",
    "Scene",
    "Thing",
    "alike",
    "background_prompt",
    "check",
    "describe",
    "draw",
    "held_back",
    "letter_boxes",
    "mix_prompt",
    "parse",
    "pick_prompt",
    "recolor_prompt",
    "reword",
    "usual_sizes",
]  # fmt: skip

COLOR_TOLERANCE = 60.0  # Euclidean distance in RGB
PLACE_TOLERANCE = 0.10  # of the side
SHAPE_OVERLAP = 0.80  # intersection over union with the ideal shape in its bounding box
GLYPH_OVERLAP = 0.65  # the same for letters, whose strokes are thin
SMALLEST = 0.01  # of the picture: a smaller spot is no object
NEITHER = 0.03  # of the side: how far a size may be from small or large
WORD_GAP = 0.2  # of a letter's height


# ---------------------------------------------------------------------------------------- drawing


Box = tuple[float, float, float, float]  # left, top, right, bottom


def draw(scene: Scene, width: int = 128, height: int = 128) -> Image.Image:
    """An RGB picture, drawn at twice the size and averaged down. Nothing in the scene may be free."""
    big = Image.new("RGB", (2 * width, 2 * height), BACKGROUNDS[_given(scene.background)])
    pen = ImageDraw.Draw(big)
    side = 2 * min(width, height)
    for thing in scene.things:
        x, y = PLACES[_given(thing.place)]
        x, y = (x + thing.offset[0]) * 2 * width, (y + thing.offset[1]) * 2 * height
        half = thing.size * side / 2
        box = (x - half, y - half, x + half, y + half)
        _draw_shape(pen, _given(thing.shape), box, COLORS[_given(thing.color)])
    return big.resize((width, height), Image.Resampling.BOX)


def _given(attribute: str | None) -> str:
    if attribute is None:
        raise ValueError("a scene to draw needs every attribute")
    return attribute


def _draw_shape(pen, shape: str, box: Box, fill) -> None:
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    if shape.startswith((LETTER, WORD)):
        for letter, part in letter_boxes(shape, box):
            draw_glyph(pen, letter, part, fill)
    elif shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "square":
        pen.rectangle(box, fill)
    elif shape == "triangle":
        pen.polygon([((x0 + x1) / 2, y0), (x1, y1), (x0, y1)], fill)
    elif shape == "cross":
        pen.rectangle((x0 + width / 3, y0, x1 - width / 3, y1), fill)
        pen.rectangle((x0, y0 + height / 3, x1, y1 - height / 3), fill)
    elif shape == "ring":
        pen.ellipse(box, None, fill, width=round(width * 0.22))


def letter_boxes(shape: str, box: Box) -> list[tuple[str, Box]]:
    """Each letter of a letter or a word that fills a square box, and the part that it fills."""
    x0, y0, x1, y1 = box
    if shape.startswith(LETTER):
        half = aspect(shape[-1]) * (y1 - y0) / 2
        return [(shape[-1], ((x0 + x1) / 2 - half, y0, (x0 + x1) / 2 + half, y1))]
    word = shape.removeprefix(WORD)
    shares = [aspect(letter) for letter in word]
    height = (x1 - x0) / (sum(shares) + WORD_GAP * (len(word) - 1))
    left, top, found = x0, (y0 + y1 - height) / 2, []
    for letter, share in zip(word, shares, strict=True):
        found.append((letter, (left, top, left + share * height, top + height)))
        left += (share + WORD_GAP) * height
    return found


# --------------------------------------------------------------------------------------- checking


ATTRIBUTES = ("count", "shape", "color", "place", "background", "size")


@dataclass(frozen=True)
class Report:
    """Which attributes of a picture are right. `ok` means all of them."""

    count: bool
    shape: bool
    color: bool
    place: bool
    background: bool
    found: Scene
    size: bool = True  # where small or large is asked for

    @property
    def ok(self) -> bool:
        return all(getattr(self, attribute) for attribute in ATTRIBUTES)

    def __str__(self) -> str:
        wrong = [attribute for attribute in ATTRIBUTES if not getattr(self, attribute)]
        seen = describe(self.found) if self.found.things else "no object"
        return "right" if self.ok else f"wrong {', '.join(wrong)}: saw {seen}"


def check(image, wanted: Scene | str) -> Report:
    """Read a picture (PIL, or uint8 array (H, W, 3)) and hold it against what was wanted."""
    if isinstance(wanted, str):
        wanted = parse(wanted)
    pixels = np.asarray(
        image.convert("RGB") if isinstance(image, Image.Image) else image, np.float32
    )
    kinds = [str(thing.shape) for thing in wanted.things]
    lettered = any(kind.startswith((LETTER, WORD)) for kind in kinds)
    background, things = _read(pixels, lettered)
    if any(kind.startswith(WORD) for kind in kinds):
        things = _as_word(things)
    found = Scene(tuple(thing for thing, _ in things), background)
    if wanted.anything:
        return Report(True, True, True, True, True, found)
    counted = len(things) == len(wanted.things)
    orders = permutations(things) if counted else [tuple(things)]
    shape, color, place, size = max((_compare(wanted.things, order) for order in orders), key=sum)
    return Report(
        counted,
        shape and counted,
        color and counted,
        place and counted,
        background is not None and wanted.background in (None, background),
        found,
        size and counted,
    )


def _compare(wanted: Sequence[Thing], seen) -> tuple[bool, bool, bool, bool]:
    pairs = list(zip(wanted, seen, strict=False))
    return (
        all(t.shape is not None and w.shape in (None, t.shape) for w, (t, _) in pairs),
        all(t.color is not None and w.color in (None, t.color) for w, (t, _) in pairs),
        all(w.place is None or _near(centre, PLACES[w.place]) for w, (_, centre) in pairs),
        all(w.measure is None or _measures(t.size, w.measure) for w, (t, _) in pairs),
    )


def _measures(size: float, measure: str) -> bool:
    low, high = MEASURES[measure]
    return low - NEITHER <= size <= high + NEITHER


def _near(a, b) -> bool:
    return all(abs(p - q) <= PLACE_TOLERANCE for p, q in zip(a, b, strict=True))


Found = list[tuple[Thing, tuple[float, float]]]  # with the centre as shares of the sides


def _as_word(things: Found) -> Found:
    """Letters from left to right, all as one object; without a colour where they differ."""
    if not things or any(not (thing.shape or LETTER).startswith(LETTER) for thing, _ in things):
        return things
    ordered = sorted(things, key=lambda found: found[1][0])
    colors = {thing.color for thing, _ in ordered}
    across, down = (float(np.mean(part)) for part in zip(*(c for _, c in ordered), strict=True))
    word = "".join(thing.shape[-1] if thing.shape else "?" for thing, _ in ordered)
    color = colors.pop() if len(colors) == 1 else None
    place = min(PLACES, key=lambda p: np.hypot(PLACES[p][0] - across, PLACES[p][1] - down))
    return [(Thing(WORD + word, color, place), (across, down))]


def _read(pixels: np.ndarray, lettered: bool = False) -> tuple[str | None, Found]:
    """Pixels -> background name, and each object; `lettered`: letters are among the shapes."""
    height, width = pixels.shape[:2]
    edge = max(1, round(0.03 * min(height, width)))
    inner = np.zeros((height, width), bool)
    inner[edge:-edge, edge:-edge] = True
    ground = np.median(pixels[~inner], 0)
    background = _nearest(ground, BACKGROUNDS)
    mask = np.linalg.norm(pixels - ground, axis=-1) > 50
    things = []
    for spot in _components(mask):
        if spot.sum() < SMALLEST * spot.size:
            continue
        rows, columns = np.flatnonzero(spot.any(1)), np.flatnonzero(spot.any(0))
        box = spot[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        centre = ((columns[0] + columns[-1] + 1) / 2 / width, (rows[0] + rows[-1] + 1) / 2 / height)
        core = _erode(spot)
        color = np.median(pixels[core if core.any() else spot], 0)
        place = min(PLACES, key=lambda p: np.hypot(*np.subtract(PLACES[p], centre)))
        size = max(box.shape) / min(height, width)
        shape = _shape(box, lettered)
        things.append((Thing(shape, _nearest(color, COLORS), place, size), centre))
    return background, things


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {
        name: float(np.linalg.norm(color - np.array(rgb))) for name, rgb in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= COLOR_TOLERANCE else None


def _shape(box: np.ndarray, lettered: bool) -> str | None:
    """The shape whose ideal form in this bounding box overlaps best, if it overlaps well."""
    height, width = box.shape
    shapes = SHAPES if 0.7 <= width / height <= 1.43 else ()
    letters = [c for c in STROKES if lettered and 0.7 < width / height / aspect(c) < 1.4]
    overlaps = {shape: _overlap(box, shape) for shape in (*shapes, *(LETTER + c for c in letters))}
    if not overlaps:
        return None
    best = max(overlaps, key=overlaps.__getitem__)
    least = GLYPH_OVERLAP if best.startswith(LETTER) else SHAPE_OVERLAP
    return best if overlaps[best] >= least else None


def _overlap(box: np.ndarray, shape: str) -> float:
    height, width = box.shape
    ideal = Image.new("L", (width * 2, height * 2))
    area = (0, 0, 2 * width - 1, 2 * height - 1)
    if shape.startswith(LETTER):
        draw_glyph(ImageDraw.Draw(ideal), shape[-1], area, 255)
    else:
        _draw_shape(ImageDraw.Draw(ideal), shape, area, 255)
    mask = np.asarray(ideal.resize((width, height), Image.Resampling.BOX)) > 127
    return float((mask & box).sum() / (mask | box).sum())


def _erode(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected parts of a mask: labels spread to neighbours until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = np.maximum.reduce(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels]
        )
        spread = np.where(mask, around, 0)
        if (spread == labels).all():
            return [labels == label for label in np.unique(labels[labels > 0])]
        labels = spread
