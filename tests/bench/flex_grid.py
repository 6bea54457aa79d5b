"""A contact sheet of nano's: one prompt and seed, steps down, guidance across.

    python3 dev.py bench flex_grid --sheet FILE [--form guided] [--prompt TEXT] [--seed 0]
                                   [--steps "2 4 8 20"] [--guidance "1 2 4 8"]

A picture that the checker finds wrong has a red frame.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from nano import Case, draw

from flux2_pack.flux2_core import schedule
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.references import from_pil, to_pil
from flux2_pack.flux2_core.sheet import GAP, boxes, sheet

PROMPT = "a cyan triangle left and an orange circle right on gray background"
STEPS, GUIDANCE = (1, 2, 4, 8, 20), (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
SIDE, WRONG = 192, (220, 40, 40)


def contact(
    pipe: Pipeline,
    prompt: str = PROMPT,
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    guidance: Sequence[float] = GUIDANCE,
) -> Image.Image:
    """`prompt` is of nano's world and names no reference. 0 is what the pipeline's variant wants."""
    case, variant = Case(prompt, scenes.parse(prompt)), pipe.variant
    rows = [n or variant.steps for n in steps]
    made = [draw(pipe, [case], seed, n, g)[0] for n in rows for g in guidance]
    down = [f"{n} step{'s' * (n > 1)}" for n in rows]
    across = [f"guidance {g or variant.guidance:g}" for g in guidance]
    title = f"{variant.label}, seed {seed}: {prompt}"
    page = to_pil(sheet([from_pil(picture) for picture in made], down, across, title, SIDE))
    mark(page, [scenes.check(picture, case.wanted).ok for picture in made], len(down), len(across))
    return page


def mark(page: Image.Image, right: Sequence[bool], rows: int, columns: int) -> None:
    """A red frame in the gap around each wrong picture."""
    pen, wide = ImageDraw.Draw(page), round(GAP * SIDE / 3)
    places = boxes(page.width, rows, columns)
    for ok, (left, top, after, below) in zip(right, places, strict=True):
        if not ok:
            around = (left - wide, top - wide, after + wide - 1, below + wide - 1)
            pen.rectangle(around, None, WRONG, wide)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sheet", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--form", choices=("", "distilled", "guided"), default="")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default=" ".join(map(str, STEPS)))
    parser.add_argument("--guidance", default=" ".join(f"{g:g}" for g in GUIDANCE))
    options = parser.parse_args()
    rows = schedule.numbers(options.steps, "The list of steps", least=1, low=0, high=200)
    columns = schedule.numbers(options.guidance, "The list of guidance", least=1, low=0, high=30)
    pipe = Pipeline.load(f"nano-{options.form}" if options.form else "nano")
    page = contact(pipe, options.prompt, options.seed, [round(n) for n in rows], columns)
    page.save(options.sheet)


if __name__ == "__main__":
    main()
