"""nano's stand-in for a writer: rules that fill in what a prompt of nano's world leaves free.

nano's text encoder is far too small to write. So that graphs with an upsampler run on nano, rules
choose a colour, a place and a background by the seed, and leave every word of the prompt standing.
"""

import random
import re

from .errors import Flux2Error
from .nano import scenes
from .prompt_nano import in_words
from .upsample import Answer, Ask

_UNKNOWN = "nano's stand-in for a writer knows the words of nano's world only"
_SHAPE = re.compile(rf"\b({'|'.join((*scenes.SHAPES, 'shape'))})\b", re.IGNORECASE)
_PICTURE = scenes.Scene((scenes.Thing("circle", "red", "center"),))
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")


def write(ask: Ask) -> Answer:
    """`a circle` -> `a blue circle left on tan background`. Raises Flux2Error for other worlds."""
    text = ask.prompt.strip().rstrip(".")
    try:
        wanted = scenes.parse(in_words(text)[0], [_PICTURE] * ask.references)
    except Flux2Error as error:
        raise Flux2Error(
            _UNKNOWN,
            error.seen,
            "Write it like: a red circle; or load a klein or dev text encoder, which can write",
        ) from error
    chance = random.Random(ask.seed)
    if re.match(r"image \d+\b", text, re.IGNORECASE):  # a picture brings all it needs
        return Answer(text)
    before, body, after = _around_ground(text)
    parts = body.split(" and ")
    if len(parts) == len(wanted.things):
        places = _places(wanted, chance)
        objects = zip(parts, wanted.things, places, strict=True)
        body = " and ".join(_filled(part, thing, place, chance) for part, thing, place in objects)
    ground = chance.choice(list(scenes.BACKGROUNDS))
    return Answer(before + body + (after or ("" if before else f" on {ground} background")))


def _around_ground(text: str) -> tuple[str, str, str]:
    """A prompt as what it says of the background before all else, its objects, and what it says
    of the background at its end."""
    ground = r"(?:on )?(?:an? |the )?\w+ background"
    if match := re.match(rf"{ground}(?: with)? ", text, re.IGNORECASE):
        return match[0], text[match.end() :], ""
    match = re.search(rf" {ground}$", text, re.IGNORECASE)
    return ("", text[: match.start()], match[0]) if match else ("", text, "")


def _places(wanted: scenes.Scene, chance: random.Random) -> list[str]:
    """A place for each thing: its own, else one that no other has."""
    first = wanted.things[0]
    if len(wanted.things) == 1:
        word = (first.shape or "").startswith(scenes.WORD)
        return [first.place or chance.choice(list(scenes.WORD_PLACES if word else scenes.PLACES))]
    pair = chance.choice((["left", "right"], ["top", "bottom"]))
    given = next((thing.place for thing in wanted.things if thing.place), "")
    if given:
        pair = [given, scenes.OPPOSITE.get(given, pair[1])]
    return [thing.place or pair[1 if given else i % 2] for i, thing in enumerate(wanted.things)]


def _filled(part: str, thing: scenes.Thing, place: str, chance: random.Random) -> str:
    """An object's words with its colour and its place where they were missing."""
    if thing.color is None:
        color = chance.choice(COLORS)
        article = re.compile(r"\ban?\s+$", re.IGNORECASE)
        match = _SHAPE.search(part)
        before = part[: match.start()] if match else ""
        before = article.sub("an " if color == "orange" else "a ", before)
        part = f"{before}{color} {part[match.start() :]}" if match else f"{part} in {color}"
    return part if thing.place else f"{part} {place}"
