"""Advice about a prompt, in plain words: what FLUX.2 is known to read badly. Never a block.

Source: Black Forest Labs' prompting guide and help pages.
"""

import re

from . import prompt_nano
from .configs import Variant
from .prompting import HEX, positive
from .references import NUMBER

MOST_COLORS = 5
MOST_LETTERING = 6  # words in one quotation
_NEGATION = re.compile(
    r"\b(?:no|without|not|don't|do not|never|avoid)\s+(?:any\s+)?([a-z][a-z' -]{1,30})", re.I
)
_QUOTED = re.compile(r"[\"“”]([^\"“”]{1,400})[\"“”]|(?<![A-Za-z])'([^'\n]{1,400})'(?![A-Za-z])")
_WEIGHT = re.compile(r"\([^()]{1,80}:\s*\d+(?:\.\d+)?\)")


def advice(text: str, variant: Variant | None = None) -> list[str]:
    """Sentences, one for each thing found; none for a prompt without faults."""
    checks = (_negations, _colors, _lettering, _weights, _tags)
    said = [sentence for check in checks for sentence in check(text)]
    return said + (_fit(text, variant) if variant else [])


def _negations(text: str) -> list[str]:
    found = [match for match in _NEGATION.finditer(_unquoted(text)) if match[1].strip()]
    out = []
    for match in found[:3]:
        thing = re.split(r"\b(?:and|or|but|in|on|with|is|are)\b", match[1])[0].strip(" -'")
        if not thing:
            continue
        better = positive(thing)
        out.append(
            f'"{match[0].strip()}": FLUX.2 draws what a prompt names, also after "no". Say what '
            f"should be there instead, such as {better}."
        )
    return out


def _colors(text: str) -> list[str]:
    found = HEX.findall(text)
    out = []
    if len(set(map(str.lower, found))) > MOST_COLORS:
        out.append(
            f"{len(set(map(str.lower, found)))} hex colours: beyond {MOST_COLORS} they run into each other."
        )
    bare = [c for c in found if not re.search(rf"\b(?:colou?r|hex)\b[^.#]{{0,12}}{c}", text, re.I)]
    if bare:
        out.append(f"{bare[0]} stands alone: write 'color {bare[0]}' and say which object has it.")
    short = re.findall(r"(?<![\w#])#[0-9a-fA-F]{3}\b(?![0-9a-fA-F])", text)
    if short:
        out.append(f"{short[0]} is a short colour code: write all six digits.")
    return out


def _lettering(text: str) -> list[str]:
    quoted = [a or b for a, b in _QUOTED.findall(text)]
    long = [q for q in quoted if len(q.split()) > MOST_LETTERING]
    return [
        f'"{q[:40]}..." has {len(q.split())} words: lettering of up to four words is drawn reliably.'
        for q in long[:2]
    ]


def _weights(text: str) -> list[str]:
    found = _WEIGHT.search(text)
    if not found:
        return []
    return [f"{found[0]}: FLUX.2 knows no weights, the brackets and the number are read as text."]


def _tags(text: str) -> list[str]:
    if text.lstrip().startswith("{"):
        return []
    parts = [part.split() for part in text.split(",")]
    short = sum(0 < len(part) <= 3 for part in parts)
    if short < 6 or short < 0.7 * len(parts):
        return []
    return ["This looks like a list of tags: FLUX.2 understands whole sentences better."]


def _fit(text: str, variant: Variant) -> list[str]:
    words = len(text.split())
    if not text.strip():
        return []
    if variant.name.startswith("nano"):
        return _foreign(prompt_nano.unknown(prompt_nano.in_words(text)[0]))
    if variant.name.startswith("klein"):
        if text.lstrip().startswith("{"):
            return [
                "klein was trained on prose: JSON works, sentences of 40 to 70 words work better."
            ]
        if words < 12 and not NUMBER.search(text):  # edits are short
            many = "1 word" if words == 1 else f"{words} words"
            return [f"{many}: klein draws more of what you mean with 40 to 70 words of prose."]
    if words > 300:
        return [f"{words} words: after about 300 words single details get lost."]
    return []


def _foreign(words: list[str]) -> list[str]:
    if not words:
        return []
    some = ", ".join(words[:5]) + (" ..." if len(words) > 5 else "")
    return [f"nano does not know: {some}. It reads plain shapes, colours, places and backgrounds."]


def unconnected(text: str) -> list[str]:
    """About a resolved prompt whose references, if any, are not known here."""
    spoken = {int(n) for n in NUMBER.findall(text)}
    if not spoken:
        return []
    count = max(spoken)
    what = "picture" if count == 1 else f"{count} pictures"
    return [f"The prompt speaks of image {count}: FLUX.2 Apply References needs {what} connected."]


def _unquoted(text: str) -> str:
    """What stands in quotes is to be written, not meant."""
    return _QUOTED.sub(" ", text)
