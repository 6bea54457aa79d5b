"""Random scenes of nano's wider world: letters, words, counts, sizes."""

import random

from .glyphs import STROKES
from .world import (
    BACKGROUNDS,
    COLORS,
    COUNT_SIZES,
    LETTER,
    LETTER_SIZES,
    MEASURES,
    PLACES,
    SHAPES,
    WORD,
    WORD_PLACES,
    WORD_SIZES,
    Scene,
    Thing,
    alike,
)

KINDS = ("letter", "word", "count", "size")


def some(kind: str, r: random.Random) -> tuple[Scene, Scene]:
    """-> a scene to draw, and the wish that asks for it."""
    background, color = r.choice(list(BACKGROUNDS)), r.choice(list(COLORS))
    offset = (r.uniform(-0.02, 0.02), r.uniform(-0.02, 0.02))
    place, shape = r.choice(list(PLACES)), r.choice(SHAPES)
    if kind == "letter":
        thing = Thing(
            LETTER + r.choice(list(STROKES)), color, place, r.uniform(*LETTER_SIZES), offset
        )
    elif kind == "word":
        letters = "".join(r.choices(list(STROKES), k=3))
        place = r.choice(WORD_PLACES)
        thing = Thing(WORD + letters, color, place, r.uniform(*WORD_SIZES), offset)
    elif kind == "size":
        measure = r.choice(list(MEASURES))
        still = offset if measure == "small" else (0.0, 0.0)
        thing = Thing(shape, color, place, r.uniform(*MEASURES[measure]), still, measure)
    else:
        count = r.randint(1, 4)
        thing = Thing(shape, color, None, r.uniform(*COUNT_SIZES), offset)
        wish = Scene((Thing(shape, color),) * count, background)
        return Scene(alike(thing, count), background), wish
    scene = Scene((thing,), background)
    return scene, scene
