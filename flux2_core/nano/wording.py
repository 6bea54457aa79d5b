"""nano's language: scenes into prompts, prompts back into what they want."""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace

from ..errors import Flux2Error
from .world import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    LETTER,
    MEASURES,
    PLACES,
    SHAPES,
    WORD,
    Scene,
    Thing,
)

PLURALS = {f"{shape}es" if shape == "cross" else f"{shape}s": shape for shape in SHAPES} | {
    "shapes": None
}
SAME = {"grey": "gray", "centre": "center", "middle": "center", "big": "large", "tiny": "small"}
FILLERS = frozenset(("a", "an", "the", "in", "at", "of", "is", "that", "to", "side", "it"))
GROUND = re.compile(
    rf"(?:^| )(?:on )?(?:an? |the )?({'|'.join(BACKGROUNDS)}) background(?: with)?(?= |$)"
)


# ---------------------------------------------------------------------------------------- wording


def describe(scene: Scene) -> str:
    """`a red circle left and a blue square right on tan background`; free attributes left out.
    Several objects alike whose places are free are counted: `three red circles`."""
    return _finish(_phrase(scene.things), scene.background)


def _phrase(things: Sequence[Thing]) -> str:
    first = things[0]
    if len(things) > 1 and first.place is None and all(thing == first for thing in things):
        plural = next(p for p, shape in PLURALS.items() if shape == first.shape)
        return " ".join(w for w in (COUNTS[len(things) - 1], first.color, plural) if w)
    return " and ".join(_name(thing) for thing in things)


def _name(thing: Thing) -> str:
    if thing.shape and thing.shape.startswith(WORD):
        phrase = f'the word "{thing.shape.removeprefix(WORD)}"'
        phrase += f" in {thing.color}" if thing.color else ""
        return f"{phrase} {thing.place}" if thing.place else phrase
    return _noun([thing.measure, thing.color, thing.shape or "shape", thing.place])


def _noun(words: Sequence[str | None]) -> str:
    phrase = " ".join(word for word in words if word)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _finish(phrase: str, background: str | None) -> str:
    return f"{phrase} on {background} background" if background else phrase


def reword(scene: Scene, r: random.Random) -> str:
    """The same wish in another order of words."""
    parts = [_freely(thing, r) for thing in scene.things]
    counted = len(parts) > 1 and scene.things[0].place is None
    phrase = _phrase(scene.things) if counted else " and ".join(parts)
    if not scene.background:
        return phrase
    return r.choice(
        (
            f"{phrase} on {scene.background} background",
            f"on {scene.background} background {phrase}",
            f"a {scene.background} background with {phrase}",
        )
    )


def _freely(thing: Thing, r: random.Random) -> str:
    if thing.shape and thing.shape.startswith(WORD):
        word = f'the word "{thing.shape.removeprefix(WORD)}"'
        color = f" in {thing.color}" if thing.color else ""
        place = f" at the {thing.place}" if thing.place else ""
        return r.choice((word + color + place, word + place + color))
    shape, color = thing.shape or "shape", thing.color
    name = _noun([thing.measure, color, shape])
    if color and r.random() < 0.5:
        name = f"{_noun([thing.measure, shape])} in {color}"
    if not thing.place:
        return name
    at = f"{'in' if thing.place == 'center' else 'at'} the {thing.place}"
    return r.choice((f"{name} {thing.place}", f"{name} {at}", f"{thing.place} {name}"))


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
    text = " ".join(SAME.get(word, word) for word in re.sub("[.,]", " ", prompt.lower()).split())
    if not text:
        return Scene((), None, anything=True)
    body, background = text, None
    if match := GROUND.search(text):
        body, background = f"{text[: match.start()]} {text[match.end() :]}".strip(), match[1]
    if match := re.fullmatch(r"image (\d+)(?: with an? (\w+) shape)?", body):
        scene = _reference(references, match[1], prompt)
        things = scene.things
        if match[2]:
            things = tuple(
                replace(thing, color=_known(match[2], COLORS, prompt)) for thing in things
            )
        return Scene(things, background or scene.background)
    parts = body.split(" and ")
    if len(parts) == 1 and body.split(" ")[0] in COUNTS:
        return Scene(_counted(body, prompt), background)
    return Scene(tuple(_thing(part, references, prompt) for part in parts), background)


def _counted(body: str, prompt: str) -> tuple[Thing, ...]:
    count, *words = body.split(" ")
    plural = count != "one"
    kind = _words([PLURALS[w] or "shape" if plural and w in PLURALS else w for w in words], prompt)
    if plural and not set(words) & PLURALS.keys():
        raise _not_understood(prompt, body)
    return (kind,) * (COUNTS.index(count) + 1)


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
    if match := re.search(r'\bword "([a-z]{1,4})"|\bletter ([a-z])\b', text):
        glyphs = WORD + match[1] if match[1] else LETTER + match[2]
        rest = (text[: match.start()] + text[match.end() :]).split()
        return replace(_words([*rest, "shape"], prompt), shape=glyphs)
    return _words(text.split(" "), prompt)


def _words(words: Sequence[str], prompt: str) -> Thing:
    """One object from the words that tell it, in any order; no attribute twice."""
    tables = {"shape": (*SHAPES, "shape"), "color": COLORS, "place": PLACES, "measure": MEASURES}
    found: dict[str, str] = {}
    for word in words:
        kind = next((name for name, table in tables.items() if word in table), None)
        if (kind is None and word not in FILLERS) or kind in found:
            raise _not_understood(prompt, word)
        if kind:
            found[kind] = word
    if "shape" not in found:
        raise _not_understood(prompt, " ".join(words))
    shape = None if found["shape"] == "shape" else found["shape"]
    return Thing(shape, found.get("color"), found.get("place"), measure=found.get("measure"))


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
