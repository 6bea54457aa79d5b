"""nano's world: pictures of plain shapes, the prompts that ask for them, and a checker.

`draw` makes a picture of a `Scene`, `describe` and the `*_prompt` functions word it, `parse` turns
a prompt back into what is wanted, and `check` reads pixels alone and says what is right. The
numbers are the contract of every nano figure: palette, places, sizes, tolerances.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from ..errors import Flux2Error

BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "pink": (250, 190, 210),
    "tan": (210, 180, 140),
}
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "cyan": (60, 200, 210),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "center": (0.5, 0.5),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
SIZES = (0.30, 0.45)  # of the shorter side, one object
PAIR_SIZES = (0.30, 0.40)  # two objects never touch

COLOR_TOLERANCE = 60.0  # Euclidean distance in RGB
PLACE_TOLERANCE = 0.10  # of the side
SHAPE_OVERLAP = 0.80  # intersection over union with the ideal shape in its bounding box
SMALLEST = 0.01  # of the picture: a smaller spot is no object


@dataclass(frozen=True)
class Thing:
    """One object. In a wish, an attribute that is None is free."""

    shape: str | None = None
    color: str | None = None
    place: str | None = None
    size: float = 0.38
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """Objects on a background. As a wish: background None is free; `anything` wants nothing."""

    things: tuple[Thing, ...]
    background: str | None = "white"
    anything: bool = False


# ---------------------------------------------------------------------------------------- drawing


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


def _draw_shape(pen, shape: str, box: tuple[float, float, float, float], fill) -> None:
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    if shape == "circle":
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


# ---------------------------------------------------------------------------------------- wording


def describe(scene: Scene) -> str:
    """`a red circle left and a blue square right on tan background`; free attributes left out."""
    return _finish(" and ".join(_name(thing) for thing in scene.things), scene.background)


def _name(thing: Thing) -> str:
    words = [thing.color, thing.shape or "shape", thing.place]
    phrase = " ".join(word for word in words if word)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _finish(phrase: str, background: str | None) -> str:
    return f"{phrase} on {background} background" if background else phrase


def recolor_prompt(image: int, color: str) -> str:
    return f"image {image} with {'an' if color == 'orange' else 'a'} {color} shape"


def background_prompt(image: int, background: str) -> str:
    return f"image {image} on {background} background"


def mix_prompt(shape_of: int, color_of: int, place: str, background: str) -> str:
    return f"the shape of image {shape_of} in the color of image {color_of} {place} on {background} background"


def pick_prompt(picks: Sequence[tuple[int, str]], background: str) -> str:
    """picks: (image, place) each; the object is taken as it is, with its colour."""
    return _finish(
        " and ".join(f"the shape of image {i} {place}" for i, place in picks), background
    )


def held_back(prompt: str) -> bool:
    """Prompts that nano never trains on."""
    return zlib.crc32(prompt.encode()) % 5 == 0


# ---------------------------------------------------------------------------------------- reading


def parse(prompt: str, references: Sequence[Scene] = ()) -> Scene:
    """What a prompt of nano's world wants; "image i" is looked up among the references' scenes."""
    text = " ".join(prompt.lower().split())
    if not text:
        return Scene((), None, anything=True)
    body, background = text, None
    if match := re.search(rf" on ({'|'.join(BACKGROUNDS)}) background$", text):
        body, background = text[: match.start()], match[1]
    if match := re.fullmatch(r"image (\d+)(?: with an? (\w+) shape)?", body):
        scene = _reference(references, match[1], prompt)
        things = scene.things
        if match[2]:
            things = tuple(
                replace(thing, color=_known(match[2], COLORS, prompt)) for thing in things
            )
        return Scene(things, background or scene.background)
    return Scene(
        tuple(_thing(part, references, prompt) for part in body.split(" and ")), background
    )


def _thing(text: str, references: Sequence[Scene], prompt: str) -> Thing:
    place = f"(?: ({'|'.join(PLACES)}))?"
    if match := re.fullmatch(
        rf"the shape of image (\d+)(?: in the color of image (\d+))?{place}", text
    ):
        source = _reference(references, match[1], prompt).things[0]
        color = (
            _reference(references, match[2], prompt).things[0].color if match[2] else source.color
        )
        return Thing(source.shape, color, match[3])
    pattern = rf"an?(?: ({'|'.join(COLORS)}))? ({'|'.join(SHAPES)}|shape){place}"
    if match := re.fullmatch(pattern, text):
        return Thing(None if match[2] == "shape" else match[2], match[1], match[3])
    raise _not_understood(prompt, text)


def _reference(references: Sequence[Scene], number: str, prompt: str) -> Scene:
    if not 1 <= int(number) <= len(references):
        raise _not_understood(prompt, f"image {number}, with {len(references)} references")
    return references[int(number) - 1]


def _known(word: str, table, prompt: str) -> str:
    if word not in table:
        raise _not_understood(prompt, word)
    return word


def _not_understood(prompt: str, part: str) -> Flux2Error:
    return Flux2Error(
        "nano's checker cannot tell what this prompt wants",
        f"'{part}' in '{prompt}'",
        "Use the forms in nano's README, for instance: a red circle left on white background",
    )


# --------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Report:
    """Which attributes of a picture are right. `ok` means all of them."""

    count: bool
    shape: bool
    color: bool
    place: bool
    background: bool
    found: Scene

    @property
    def ok(self) -> bool:
        return self.count and self.shape and self.color and self.place and self.background

    def __str__(self) -> str:
        wrong = [
            n for n in ("count", "shape", "color", "place", "background") if not getattr(self, n)
        ]
        seen = describe(self.found) if self.found.things else "no object"
        return "right" if self.ok else f"wrong {', '.join(wrong)}: saw {seen}"


def check(image, wanted: Scene | str) -> Report:
    """Read a picture (PIL, or uint8 array (H, W, 3)) and hold it against what was wanted."""
    if isinstance(wanted, str):
        wanted = parse(wanted)
    pixels = np.asarray(
        image.convert("RGB") if isinstance(image, Image.Image) else image, np.float32
    )
    background, things = _read(pixels)
    found = Scene(tuple(thing for thing, _ in things), background)
    if wanted.anything:
        return Report(True, True, True, True, True, found)
    counted = len(things) == len(wanted.things)
    orders = permutations(things) if counted else [tuple(things)]
    shape, color, place = max((_compare(wanted.things, order) for order in orders), key=sum)
    return Report(
        counted,
        shape and counted,
        color and counted,
        place and counted,
        background is not None and wanted.background in (None, background),
        found,
    )


def _compare(wanted: Sequence[Thing], seen) -> tuple[bool, bool, bool]:
    pairs = list(zip(wanted, seen, strict=False))
    return (
        all(t.shape is not None and w.shape in (None, t.shape) for w, (t, _) in pairs),
        all(t.color is not None and w.color in (None, t.color) for w, (t, _) in pairs),
        all(w.place is None or _near(centre, PLACES[w.place]) for w, (_, centre) in pairs),
    )


def _near(a, b) -> bool:
    return all(abs(p - q) <= PLACE_TOLERANCE for p, q in zip(a, b, strict=True))


def _read(pixels: np.ndarray) -> tuple[str | None, list[tuple[Thing, tuple[float, float]]]]:
    """Pixels -> background name, and each object with its centre as shares of the sides."""
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
        things.append((Thing(_shape(box), _nearest(color, COLORS), place, size), centre))
    return background, things


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {
        name: float(np.linalg.norm(color - np.array(rgb))) for name, rgb in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= COLOR_TOLERANCE else None


def _shape(box: np.ndarray) -> str | None:
    """The shape whose ideal form in this bounding box overlaps best, if it overlaps well."""
    height, width = box.shape
    if not 0.7 <= width / height <= 1.43:
        return None
    overlaps = {}
    for shape in SHAPES:
        ideal = Image.new("L", (width * 2, height * 2))
        _draw_shape(ImageDraw.Draw(ideal), shape, (0, 0, 2 * width - 1, 2 * height - 1), 255)
        mask = np.asarray(ideal.resize((width, height), Image.Resampling.BOX)) > 127
        overlaps[shape] = (mask & box).sum() / (mask | box).sum()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= SHAPE_OVERLAP else None


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
