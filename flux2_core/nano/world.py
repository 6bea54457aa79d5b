"""nano's world as data: palette, places, sizes, and what a scene is.

The numbers are the contract of every nano figure.
"""

from dataclasses import dataclass

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

# The wider world. Sizes of the shorter side too; what lies between small and large is neither.
MEASURES = {"small": (0.19, 0.25), "large": (0.49, 0.55)}
COUNTS = ("one", "two", "three", "four")
COUNT_SIZES = (0.26, 0.34)  # of up to four objects alike
LETTER_SIZES = (0.40, 0.50)  # the height of a letter
WORD_SIZES = (0.80, 0.88)  # the width of a word of three letters, of the shorter side
WORD_PLACES = ("top", "center", "bottom")
# A letter is the shape "letter k", a word the shape "word cat".
LETTER, WORD = "letter ", "word "


@dataclass(frozen=True)
class Thing:
    """One object. In a wish, an attribute that is None is free."""

    shape: str | None = None
    color: str | None = None
    place: str | None = None
    size: float = 0.38
    offset: tuple[float, float] = (0.0, 0.0)
    measure: str | None = None  # small or large


@dataclass(frozen=True)
class Scene:
    """Objects on a background. As a wish: background None is free; `anything` wants nothing."""

    things: tuple[Thing, ...]
    background: str | None = "white"
    anything: bool = False


def usual_sizes(thing: Thing, count: int) -> tuple[float, float]:
    """From what to what a thing is drawn, where `count` objects are in the picture."""
    if thing.measure:
        return MEASURES[thing.measure]
    if thing.shape and thing.shape.startswith((LETTER, WORD)):
        return LETTER_SIZES if thing.shape.startswith(LETTER) else WORD_SIZES
    return SIZES if count == 1 else PAIR_SIZES


def alike(kind: Thing, count: int) -> tuple[Thing, ...]:
    """Up to four objects of one kind, spread over the picture, to draw."""
    spread = {
        1: [(0.0, 0.0)],
        2: [(-0.22, 0.0), (0.22, 0.0)],
        3: [(0.0, -0.22), (-0.22, 0.2), (0.22, 0.2)],
        4: [(-0.22, -0.22), (0.22, -0.22), (-0.22, 0.22), (0.22, 0.22)],
    }[count]
    return tuple(
        Thing(kind.shape, kind.color, "center", kind.size, (x + kind.offset[0], y + kind.offset[1]))
        for x, y in spread
    )
