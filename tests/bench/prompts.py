"""Do the builder's fields draw what they say? Counted on nano by its checker.

    python3 dev.py bench prompts [--json FILE] [--cases 200] [--sheet FILE]

Each case fills in the builder's fields as a user would: a subject, where it stands, a palette of hex
codes bound to objects (some with a colour name of their own, most not exactly nano's colour),
lettering. The prose is put into nano's words, as FLUX.2 Prompt does it for a nano text encoder, and
drawn by the base at 8 steps. Required is what the two fields say of one subject. Told, not required:
"two" subjects of different shapes, beside the same wishes in nano's own wording; "free", a palette
that names no object; words and letters, of which nano knows most.
"""

import argparse
import random
from pathlib import Path

from PIL import Image

import report
from nano import BACKGROUNDS, COLORS, PLACES, Case, draw, sheet

from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.nano.glyphs import STROKES
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.prompt_nano import in_words, nearest
from flux2_pack.flux2_core.prompting import PLACES as WHERE
from flux2_pack.flux2_core.prompting import Lettering, Prompt, prose, read_palette

OWN_NAMES = {"red": "crimson", "blue": "royal blue", "green": "leaf green", "orange": "amber"}
NEAR = 20  # levels of 255 that a code may lie beside nano's own colour, a channel
REQUIRED = {"one": 95.0}  # per cent of the cases, palette and placement
FIELDS = {"palette": "color", "placement": "place", "shape": "shape", "all": "ok"}
Made = tuple[Prompt, scenes.Scene]


def code(color: str, r: random.Random) -> str:
    """A hex code that is nearer to `color` than to any other of nano's."""
    while True:
        near = (max(0, min(255, c + r.randint(-NEAR, NEAR))) for c in scenes.COLORS[color])
        found = "#" + "".join(f"{c:02x}" for c in near)
        if nearest(found, scenes.COLORS) == color:
            return found


def line(color: str, of: str, r: random.Random) -> str:
    """A line of the palette's field."""
    name = r.choice(("", color, OWN_NAMES.get(color, color)))
    return f"{code(color, r)} {name}" + (f": {of}" if of else "")


def one(r: random.Random, bound: bool = True) -> Made:
    shape, color = r.choice(scenes.SHAPES), r.choice(COLORS)
    place, background = r.choice(PLACES), r.choice(BACKGROUNDS)
    prompt = Prompt(
        subject=f"a {shape}",
        place=place,
        setting=f"on {background} background",
        palette=read_palette(line(color, r.choice(("", "the ")) + shape if bound else "", r)),
    )
    return prompt, scenes.Scene((scenes.Thing(shape, color, place),), background)


def two(r: random.Random) -> Made:
    shapes, background = r.sample(scenes.SHAPES, 2), r.choice(BACKGROUNDS)
    first = r.choice(list(scenes.OPPOSITE))
    places, colors = (first, scenes.OPPOSITE[first]), r.choices(COLORS, k=2)
    said = [WHERE[place] for place in places]
    prompt = Prompt(
        subject=f"a {shapes[0]} {said[0]} and a {shapes[1]} {said[1]}",
        setting=f"on {background} background",
        palette=read_palette("\n".join(map(line, colors, shapes, (r, r)))),
    )
    things = tuple(map(scenes.Thing, shapes, colors, places))
    return prompt, scenes.Scene(things, background)


def free(r: random.Random) -> Made:
    return one(r, bound=False)


def lettered(r: random.Random, count: int, places) -> Made:
    text, color = "".join(r.choices(list(STROKES), k=count)), r.choice(COLORS)
    place, background = r.choice(places), r.choice(BACKGROUNDS)
    prompt = Prompt(
        setting=f"on {background} background",
        palette=read_palette(line(color, "the text", r)),
        lettering=(Lettering(text.upper(), place=place),),
    )
    kind = scenes.LETTER if count == 1 else scenes.WORD
    return prompt, scenes.Scene((scenes.Thing(kind + text, color, place),), background)


def letters(r: random.Random) -> Made:
    return lettered(r, 1, PLACES)


def words(r: random.Random) -> Made:
    return lettered(r, 3, scenes.WORD_PLACES)


SETS = {make.__name__: make for make in (one, two, free, letters, words)}


def cases(name: str, n: int) -> list[Case]:
    """n cases of a set, always the same."""
    r = random.Random(name)
    made = [SETS[name](r) for _ in range(n)]
    return [Case(in_words(prose(prompt))[0], wanted) for prompt, wanted in made]


def drawn(pipe: Pipeline, todo: list[Case]) -> tuple[list[Image.Image], list[scenes.Report]]:
    pictures: list[Image.Image] = []
    for start in range(0, len(todo), 25):
        pictures += draw(pipe, todo[start : start + 25], start)
    return pictures, [scenes.check(p, c.wanted) for p, c in zip(pictures, todo, strict=True)]


def share(found: list[scenes.Report], field: str) -> float:
    return 100 * sum(getattr(f, field) for f in found) / max(1, len(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--sheet", type=Path, help="a PNG of the first ten of each set")
    options = parser.parse_args()
    out, pipe, rows = report.Report("prompts", options), Pipeline.load("nano"), {}
    for name in options.sets.split(","):
        todo = cases(name, options.cases)
        rows[name], found = drawn(pipe, todo)
        plain = [Case(scenes.describe(c.wanted), c.wanted) for c in todo]
        peers = drawn(pipe, plain)[1] if name == "two" else []
        case = f"{name}, {len(todo)} cases of {len({c.prompt for c in todo})} prompts, 8 steps"
        for told, field in FIELDS.items():
            value, peer = share(found, field), share(peers, field)
            out.add(
                case,
                f"{told} as asked",
                value,
                "%",
                peer="nano's own wording" if peers else None,
                ratio=value / peer if peers else None,
                at_least=REQUIRED.get(name) if told in ("palette", "placement") else None,
            )
    if options.sheet:
        sheet(rows, options.sheet)
    out.finish()


if __name__ == "__main__":
    main()
