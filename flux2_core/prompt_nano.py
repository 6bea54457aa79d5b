"""Prompts for nano: what the builder writes for large models, in the words that nano has.

nano's vocabulary is that of its small world. A hex colour becomes the nearest of its colour words,
a quoted text the word or letter to write, and JSON the prose of it.
"""

import re

from .errors import Flux2Error
from .nano.vocabulary import WORDS
from .nano.world import BACKGROUNDS, COLORS
from .prompting import from_json, prose

_CODE = r"(?:colou?r|hex)\s+(#[0-9a-f]{6})\b"
_LEAD = r"(?:\b(?:in|of|and)|,)\s+"  # what stands before a colour's own name
_NOT = r"(?!(?:in|of|and|with|an?|the)\b)"  # and what is no part of it
# "in dark red (color #8b0000)", "(color #8b0000)", "color #8b0000", "#8b0000"
_COLOR = re.compile(
    rf"({_LEAD})(?:{_NOT}[^\W\d_][\w'-]*\s+){{1,3}}\({_CODE}\)"
    rf"|\({_CODE}\)|{_CODE}|(#[0-9a-f]{{6}})\b",
    re.IGNORECASE,
)
_TEXT = re.compile(r"\b(?:the )?text [\"“]([a-z]{1,4})[\"”]", re.IGNORECASE)
_WORD = re.compile(r"@\S+|[^\W\d_]+|\d+")  # as nano's tokenizer splits


def in_words(prompt: str) -> tuple[str, list[str]]:
    """-> the prompt in nano's words, and a sentence about each kind of thing that was put so."""
    text, said = _as_prose(prompt)
    named: dict[str, str] = {}

    def word(match: re.Match) -> str:
        code = next(group for group in match.groups()[1:] if group)
        ground = re.match(r"\s+background\b", text[match.end() :], re.IGNORECASE)
        named[code] = nearest(code, BACKGROUNDS if ground else COLORS)
        return (match[1] or "") + named[code]

    out = _TEXT.sub(_written, _COLOR.sub(word, text))
    if named:
        pairs = ", ".join(f"{code} as {color}" for code, color in named.items())
        said.append(f"nano knows colours by name: it reads {pairs}.")
    return out, said


def _as_prose(prompt: str) -> tuple[str, list[str]]:
    if not prompt.lstrip().startswith("{"):
        return prompt, []
    try:
        return prose(from_json(prompt)), ["nano knows no JSON: it reads the prose of it."]
    except Flux2Error:
        return prompt, []


def _written(match: re.Match) -> str:
    return f"a letter {match[1]}" if len(match[1]) == 1 else f'the word "{match[1]}"'


def nearest(code: str, palette: dict[str, tuple[int, int, int]]) -> str:
    """The colour word of a palette that lies nearest to #rrggbb, in RGB as nano's checker has it."""
    wanted = [int(code[i : i + 2], 16) for i in (1, 3, 5)]

    def far(name: str) -> int:
        return sum((a - b) ** 2 for a, b in zip(wanted, palette[name], strict=True))

    return min(palette, key=far)


def unknown(prompt: str) -> list[str]:
    """The words of a prompt that nano does not have, each once; what is quoted is spelled."""
    bare = re.sub(r"[\"“][^\"“”]*[\"”]", " ", prompt.lower())
    return list(dict.fromkeys(word for word in _WORD.findall(bare) if word not in WORDS))
