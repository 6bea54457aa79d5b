"""python verdict.py PNG WANTED [PNG WANTED ...]: does each picture show what was wanted?

WANTED is what a shipped workflow says of itself under extra.flux2_kit, as JSON: "prompt", a sentence
of nano's world, and "references", a sentence for each picture that the prompt speaks of by number.
"shows", where the prompt alone does not say it, holds a sentence for each of the square pictures that
stand side by side in the file, or row by row on a labelled sheet of "grid" rows and columns. Prints a verdict per picture; exit 0 only if all are right.
"""

import importlib
import json
import sys
import types
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
if "flux2_pack" not in sys.modules:
    pack = types.ModuleType("flux2_pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["flux2_pack"] = pack
scenes = importlib.import_module("flux2_pack.flux2_core.nano.scenes")
sheet = importlib.import_module("flux2_pack.flux2_core.sheet")


def sentences(asked: dict) -> list[str]:
    """What is to be seen, a sentence for each picture from left to right."""
    return asked.get("shows", [asked["prompt"]])


def across(asked: dict) -> int:
    """How many pictures stand side by side in the file; a labelled sheet is one."""
    return 1 if "grid" in asked else len(sentences(asked))


def panels(image: Image.Image, count: int) -> list[Image.Image]:
    """`count` square pictures that stand side by side, with even gaps or none -> each alone."""
    width, side = image.size
    lefts = [round(i * (width - side) / max(1, count - 1)) for i in range(count)]
    return [image.crop((left, 0, left + side, side)) for left in lefts]


def cells(image: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """The pictures of a labelled sheet, which may have been scaled."""
    high = (sheet.TOP + rows * (1 + sheet.GAP)) / (sheet.LEFT + columns * (1 + sheet.GAP))
    image = image.resize((1000, round(1000 * high)))
    return [image.crop(box) for box in sheet.boxes(1000, rows, columns)]


def reports(image: Image.Image, asked: dict) -> list:
    """A scenes.Report for each picture in `image`."""
    references = [scenes.parse(text) for text in asked["references"]]
    wanted = [scenes.parse(text, references) for text in sentences(asked)]
    parts = panels(image, len(wanted)) if len(wanted) > 1 else [image]
    if "grid" in asked:
        parts = cells(image, *asked["grid"])
    return [scenes.check(part, scene) for part, scene in zip(parts, wanted, strict=True)]


def main(arguments: list[str]) -> int:
    good = True
    for file, wanted in zip(arguments[::2], arguments[1::2], strict=True):
        asked = json.loads(wanted)
        print(file)
        with Image.open(file) as image:
            found = reports(image, asked)
        for sentence, report in zip(sentences(asked), found, strict=True):
            good &= report.ok
            print(f"    asked for: {sentence}\n    {report}")
    return 0 if good and arguments else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
