"""What a rewritten prompt must still say to the letter: quoted words, colours, references.

FLUX.2 writes what stands in quotation marks, reads #rrggbb as that colour and "image N" as that
reference: one sign changed is another picture.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .references import NAME, NUMBER

_QUOTED = re.compile(
    r'(?<!\w)"(?=\S)([^"\n]{1,400})(?<=\S)"(?!\w)'
    r"|[\u201c\u201e]([^\u201c\u201d\u201e\n]{1,400})[\u201c\u201d]"  # curly, English and German
    r"|\u00ab\s*([^\u00ab\u00bb\n]{1,400}?)\s*\u00bb"  # angled
    r"|\u2018([^\u2018\u2019\n]{1,400})\u2019(?!\w)"  # curly, single
    r"|(?<!\w)'(?=\S)([^'\n]{1,400})(?<=\S)'(?!\w)"
)
_OPENING = r"[\"\u201c\u201e\u00ab\u2018']"
_CLOSING = r"[\"\u201c\u201d\u00bb\u2019']"
_COLOR = re.compile(r"#[0-9a-fA-F]{3,8}\b")
_LISTED = re.compile(r"\bimages\s+(\d+(?:[\s,&-]*(?:and |or |to )?\d+)*)", re.IGNORECASE)
LETTERING = "text"  # the field of a JSON prompt whose words are written in the picture


@dataclass(frozen=True)
class Protected:
    """`quotes`: words to be written. `signs`: colours and @names. `images`: {N: "image N" as it is
    spelt}; `listed`: numbers called as "images 1 and 2". `is_json`: it is a JSON object."""

    quotes: tuple[str, ...]
    signs: tuple[str, ...]
    images: dict[int, str]
    listed: tuple[int, ...]
    is_json: bool

    def __str__(self) -> str:
        """All of them in a line, as they stand in a prompt."""
        quotes = [f'"{quote}"' for quote in self.quotes]
        return ", ".join([*quotes, *self.signs, *self.images.values()])


def protected(prompt: str) -> Protected:
    """What a rewriting of this prompt has to keep."""
    found = _object(prompt)
    texts = [prompt] if found is None else [leaf for leaf, _ in _leaves(found)]
    quotes = [quote for text in texts for quote in _quotes(text)]
    if found is not None:
        quotes += [leaf for leaf, field in _leaves(found) if field == LETTERING and leaf.strip()]
    outside = _QUOTED.sub(" ", prompt) if found is None else " ".join(texts)
    signs = [*_COLOR.findall(outside), *(match[0] for match in NAME.finditer(outside))]
    images: dict[int, str] = {}
    for match in NUMBER.finditer(outside):
        images.setdefault(int(match[1]), match[0])
    return Protected(
        tuple(dict.fromkeys(quotes)),
        tuple(dict.fromkeys(signs)),
        images,
        tuple(dict.fromkeys(_listed(outside))),
        found is not None,
    )


def lost(prompt: str, written: str, references: int = 0) -> list[str]:
    """What a rewriting has lost of a prompt, in words; nothing if it may be used.

    References that neither the prompt names nor the user connected count as lost too.
    """
    kept, found = protected(prompt), _object(written)
    if kept.is_json and found is None:
        return ["the JSON form"]
    leaves = [leaf for leaf, _ in _leaves(found)] if found is not None else []
    out = [f'"{quote}"' for quote in kept.quotes if not _stands(quote, written, leaves)]
    out += [sign for sign in kept.signs if not re.search(rf"{re.escape(sign)}(?!\w)", written)]
    out += [said for said in kept.images.values() if not re.search(rf"\b{said}\b", written)]
    named = {int(n) for n in NUMBER.findall(written)} | set(_listed(written))
    out += [f"image {n}" for n in kept.listed if n not in named and n not in kept.images]
    known = {*kept.images, *kept.listed, *range(1, references + 1)}
    quoted = {int(n) for quote in kept.quotes for n in NUMBER.findall(quote)}
    strange = sorted(named - known - quoted)
    return [*out, *(f"its own count of images (it speaks of image {n})" for n in strange)]


def respelt(prompt: str, written: str) -> str:
    """A rewriting whose references are spelt as in the prompt (Image 1 -> image 1), quotes aside."""
    images = protected(prompt).images

    def own(match: re.Match) -> str:
        return images.get(int(match[1])) or str(match[0])

    out, end = [], 0
    for quote in _QUOTED.finditer(written):
        out += [NUMBER.sub(own, written[end : quote.start()]), quote[0]]
        end = quote.end()
    return "".join([*out, NUMBER.sub(own, written[end:])])


def _quotes(text: str) -> Iterator[str]:
    for match in _QUOTED.finditer(text):
        yield next(group for group in match.groups() if group is not None)


def _listed(text: str) -> list[int]:
    return [int(n) for match in _LISTED.finditer(text) for n in re.findall(r"\d+", match[1])]


def _stands(quote: str, written: str, leaves: list[str]) -> bool:
    """Whether words stand in quotation marks of any kind, or are a field of their own."""
    pattern = rf"{_OPENING}\s*{re.escape(quote)}\s*{_CLOSING}"
    if leaves:
        return any(leaf == quote or re.search(pattern, leaf) for leaf in leaves)
    return bool(re.search(pattern, written))


def _object(text: str) -> dict | None:
    """The JSON object that a text is, else None."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _leaves(value, field: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, with the field it belongs to."""
    if isinstance(value, str):
        yield value, field
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, field)
