"""A prompt in parts: subject, light, palette, lettering and the rest, as prose or as JSON.

Prose follows the order in which FLUX.2 weighs words: subject and action first, then style, setting,
light and camera; what to write stands early, in quotes. The JSON form has the fields of Black Forest
Labs' prompting guide (scene, subjects, style, color_palette, lighting, camera); both are read by
every variant. A part that is empty is left out.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from .errors import Flux2Error

HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
LETTERS = ("text", "letters", "lettering", "word", "words")  # what a palette may call a lettering


@dataclass(frozen=True)
class Color:
    """`hex` as #rrggbb, its everyday `name`, and the object that has it (empty: the whole picture)."""

    hex: str
    name: str = ""
    of: str = ""


@dataclass(frozen=True)
class Lettering:
    """The exact `text`, how its letters look, and where it stands."""

    text: str
    font: str = ""
    place: str = ""


@dataclass(frozen=True)
class Prompt:
    """The parts. `place` is where the subject stands; `change` and `keep` make it an edit; `avoid` is
    what should not be there, said as what should be (`positive`)."""

    subject: str = ""
    action: str = ""
    place: str = ""
    style: str = ""
    setting: str = ""
    light: str = ""
    camera: str = ""
    palette: tuple[Color, ...] = ()
    lettering: tuple[Lettering, ...] = ()
    change: str = ""
    keep: str = ""
    avoid: str = ""

    def __post_init__(self):
        for color in self.palette:
            check_hex(color.hex)


def check_hex(value: str) -> str:
    """The colour, if it is one. Raises Flux2Error otherwise."""
    if not HEX.fullmatch(value):
        raise Flux2Error(
            "This is no colour", repr(value)[:60], "Write it as # and six digits: #dc2828"
        )
    return value


# ------------------------------------------------------------------------------------------- prose


def prose(prompt: Prompt) -> str:
    """Plain sentences. A colour stands right behind its object where the prompt names it."""
    parts = [_edit(prompt), _subject(prompt)]
    parts += [_lettering(wanted, prompt.palette) for wanted in prompt.lettering]
    parts += [prompt.style, prompt.setting, prompt.light, prompt.camera]
    parts += [_palette(prompt), positive(prompt.avoid)]
    return " ".join(_sentence(part) for part in parts if part)


def _edit(prompt: Prompt) -> str:
    if not prompt.change:
        return f"Keep {prompt.keep} unchanged" if prompt.keep else ""
    return f"{prompt.change}; keep {prompt.keep} unchanged" if prompt.keep else prompt.change


def _subject(prompt: Prompt) -> str:
    place = PLACES.get(prompt.place, prompt.place)
    words = [_colored(prompt.subject, prompt.palette), prompt.action, place]
    return " ".join(word for word in words if word)


def _colored(subject: str, palette: Sequence[Color]) -> str:
    """The subject, each of its objects followed by its colours."""
    at: dict[int, list[Color]] = {}
    for color in palette:
        if (end := _end_of(color, subject)) is not None:
            at.setdefault(end, []).append(color)
    for end in sorted(at, reverse=True):
        subject = f"{subject[:end]} in {_and([_named(c) for c in at[end]])}{subject[end:]}"
    return subject


def _end_of(color: Color, subject: str) -> int | None:
    """Where the colour's object ends in the subject, if it is there."""
    if not color.of:
        return None
    found = re.search(rf"(?<!\w){re.escape(_object(color))}(?!\w)", subject, re.IGNORECASE)
    return found.end() if found else None


def _object(color: Color) -> str:
    """ "the car" and "car" are one object."""
    of = color.of.strip()
    return re.sub(r"^(?:the|an?)\s+", "", of, flags=re.IGNORECASE) or of


def _letters(color: Color, wanted: Lettering) -> bool:
    """Whether a colour is that of a lettering: named by its words, or as "the text"."""
    of = _object(color).strip("\"'").lower()
    return of in (*LETTERS, wanted.text.strip().lower())


def _palette(prompt: Prompt) -> str:
    """What has found no place elsewhere."""
    bound, free = [], []
    for color in prompt.palette:
        if not color.of:
            free.append(color)
        elif _end_of(color, prompt.subject) is None and not any(
            _letters(color, wanted) for wanted in prompt.lettering
        ):
            bound.append(color)
    parts = [f"the {_object(c)} in {_named(c)}" for c in bound]
    if free:
        parts.append(f"palette of {_and([_named(c) for c in free])}")
    return _and(parts)


def _named(color: Color) -> str:
    return f"{color.name} (color {color.hex})" if color.name else f"color {color.hex}"


def _lettering(wanted: Lettering, palette: Sequence[Color]) -> str:
    own = [c for c in palette if _letters(c, wanted)]
    words = [f'The text "{wanted.text}"']
    words += [f"in {wanted.font}"] if wanted.font else []
    words += [f"in {_and([_named(c) for c in own])}"] if own else []
    words += [PLACES.get(wanted.place, wanted.place)] if wanted.place else []
    return " ".join(words)


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?", '"')) else text + "."


def _and(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


def positive(avoid: str) -> str:
    """What is not wanted, said as what is: FLUX.2 draws what a prompt names, also after "no".

    Known opposites are used; for others the plain, empty or quiet form is asked for.
    """
    wanted = []
    for thing in re.split(r"[,;\n]| and ", avoid):
        thing = re.sub(r"^(no|without|not|never|avoid)\s+", "", thing.strip().lower())
        if thing:
            wanted.append(
                OPPOSITES.get(thing.rstrip("s"), OPPOSITES.get(thing, "")) or _clear(thing)
            )
    return _and(list(dict.fromkeys(wanted)))


def _clear(thing: str) -> str:
    return f"a scene free of {thing}"


OPPOSITES = {
    "people": "an empty, deserted scene",
    "person": "an empty, deserted scene",
    "crowd": "a quiet, deserted place",
    "text": "plain surfaces and blank signs",
    "watermark": "a clean, unmarked image",
    "logo": "plain, unbranded surfaces",
    "blur": "sharp focus throughout",
    "blurry": "sharp focus throughout",
    "noise": "a clean, smooth image",
    "grain": "a clean, smooth image",
    "shadow": "even, shadowless light",
    "clutter": "a tidy, uncluttered space",
    "background": "a plain, seamless backdrop",
    "car": "an empty street",
    "cloud": "a clear sky",
    "glasse": "a bare face",
    "glasses": "a bare face",
    "beard": "a clean-shaven face",
    "makeup": "a natural, bare face",
    "color": "black and white",
    "cartoon": "a realistic photograph",
    "deformed hand": "well-formed hands",
    "extra finger": "hands with five fingers each",
    "frame": "an image that fills the whole canvas",
    "border": "an image that fills the whole canvas",
}


# -------------------------------------------------------------------------------------------- JSON


def to_json(prompt: Prompt, indent: int | None = 2) -> str:
    """The JSON form; `from_json` gives the same Prompt back."""
    subject = {
        "description": prompt.subject,
        "action": prompt.action,
        "position": prompt.place,
    }
    out = {
        "edit": {"change": prompt.change, "keep": prompt.keep},
        "scene": prompt.setting,
        "subjects": [subject],
        "text": [asdict(wanted) for wanted in prompt.lettering],
        "style": prompt.style,
        "lighting": prompt.light,
        "camera": prompt.camera,
        "color_palette": [_color(c) for c in prompt.palette],
        "instead_of": {"avoid": prompt.avoid, "show": positive(prompt.avoid)},
    }
    return json.dumps(_bare(out), indent=indent, ensure_ascii=False)


def _color(color: Color) -> dict[str, str]:
    return {"hex": color.hex, "name": color.name, "object": color.of}


def _bare(value):
    """Without what is empty."""
    if isinstance(value, dict):
        kept = {k: _bare(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v}
    if isinstance(value, list):
        return [v for v in map(_bare, value) if v]
    return value


def from_json(text: str) -> Prompt:
    """Reads what `to_json` wrote, and hand-written JSON of the same fields: a palette may be plain
    strings, a camera an object of its settings. Raises Flux2Error for anything else."""
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Flux2Error(
            "This is no JSON", str(error), "Compare commas and quotes with the node's JSON output"
        ) from error
    if not isinstance(found, dict):
        raise Flux2Error(
            "A prompt in JSON is an object of its parts",
            f"a {type(found).__name__}",
            'Begin with {"scene": ..., "subjects": [...]}',
        )
    known = {"edit", "scene", "subjects", "text", "style", "lighting", "camera", "color_palette"}
    if unknown := sorted(set(found) - known - {"instead_of"}):
        raise Flux2Error(
            "This prompt has parts that the builder does not know",
            ", ".join(unknown)[:120],
            f"Use {', '.join(sorted(known))}, or connect the JSON to FLUX.2 Prompt as it is",
        )
    subjects = _list(found, "subjects")
    first = subjects[0] if subjects and isinstance(subjects[0], dict) else {}
    if len(subjects) > 1 or (subjects and not first):
        raise Flux2Error(
            "The builder holds one subject",
            f"{len(subjects)} subjects",
            "Describe them in one, or connect the JSON to FLUX.2 Prompt as it is",
        )
    edit, instead = _dict(found, "edit"), _dict(found, "instead_of")
    palette = [*_colors(_list(first, "color_palette")), *_colors(_list(found, "color_palette"))]
    return Prompt(
        subject=_text(first, "description"),
        action=_text(first, "action"),
        place=_text(first, "position"),
        style=_text(found, "style"),
        setting=_text(found, "scene"),
        light=_text(found, "lighting"),
        camera=_text(found, "camera"),
        palette=tuple(palette),
        lettering=tuple(_lettered(v) for v in _list(found, "text")),
        change=_text(edit, "change"),
        keep=_text(edit, "keep"),
        avoid=_text(instead, "avoid"),
    )


def _colors(values: Sequence) -> list[Color]:
    out = []
    for value in values:
        if isinstance(value, str):
            out.append(Color(check_hex(value)))
        elif isinstance(value, dict):
            out.append(Color(_text(value, "hex"), _text(value, "name"), _text(value, "object")))
        else:
            raise _wrong("color_palette", value)
    return out


def _lettered(value) -> Lettering:
    if isinstance(value, str):
        return Lettering(value)
    if not isinstance(value, dict):
        raise _wrong("text", value)
    return Lettering(*(_text(value, name.name) for name in fields(Lettering)))


def _text(found: dict, name: str) -> str:
    value = found.get(name, "")
    if isinstance(value, dict) and all(isinstance(v, (str, int, float)) for v in value.values()):
        return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items())
    if not isinstance(value, str):
        raise _wrong(name, value)
    return value


def _list(found: dict, name: str) -> list:
    value = found.get(name, [])
    if not isinstance(value, list):
        raise _wrong(name, value)
    return value


def _dict(found: dict, name: str) -> dict:
    value = found.get(name, {})
    if not isinstance(value, dict):
        raise _wrong(name, value)
    return value


def _wrong(name: str, value) -> Flux2Error:
    return Flux2Error(
        f"The part '{name}' of this prompt cannot be read",
        f"{json.dumps(value)[:60]}",
        "Compare it with the node's JSON output",
    )


# ------------------------------------------------------------------------------------ widgets' text


def read_palette(text: str) -> tuple[Color, ...]:
    """Lines or commas of `#hex name: object`, name and object optional -> colours."""
    out = []
    for line in re.split(r"[\n,;]", text):
        line = line.strip()
        if not line:
            continue
        match = re.fullmatch(r"(#[^\s:]+)\s*([^:]*?)\s*(?::\s*(.+))?", line)
        if not match:
            raise Flux2Error(
                "This line of the palette has no colour",
                repr(line)[:60],
                "Write: #dc2828 red: the car",
            )
        out.append(Color(check_hex(match[1]), match[2].strip(), (match[3] or "").strip()))
    return tuple(out)
