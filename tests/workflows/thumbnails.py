"""The workflows' thumbnails, from the pictures that the demo drew.

    python3 dev.py demo --workflow NAME ... --out FOLDER
    .venv/bin/python tests/workflows/thumbnails.py FOLDER [--into workflows]

FOLDER holds NAME.png for some or all workflows; for each one NAME.jpg is written beside NAME.json.
Reference pictures stand in a row above what was made of them, which may be several pictures side by
side.
"""

import argparse
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
verdict = importlib.import_module("flux2_pack.tests.hosting.verdict")

SIDE = 512
GAP = 8
LARGEST_REFERENCE = 112
GROUND = (38, 38, 42)


def compose(picture: Image.Image, references: list[Image.Image], many: int = 1) -> Image.Image:
    """The picture, or `many` in one, with its references in a row above: 512 x 512."""
    sheet = Image.new("RGB", (SIDE, SIDE), GROUND)
    side = cell(len(references))
    left = (SIDE - len(references) * (side + GAP) + GAP) // 2
    for i, reference in enumerate(references):
        sheet.paste(reference.resize((side, side)), (left + i * (side + GAP), GAP))
    place = box(len(references), many)
    sheet.paste(picture.resize(_size(place), Image.Resampling.LANCZOS), place[:2])
    return sheet


def cell(count: int) -> int:
    """The side of each of `count` references."""
    return min(LARGEST_REFERENCE, (SIDE - GAP) // max(1, count) - GAP)


def box(count: int, many: int = 1) -> tuple[int, int, int, int]:
    """Where the picture is under `count` references: left, top, right, bottom. `many` squares in a
    row, a sixteenth of one between two, are as large as fits, in the middle of what is left."""
    if not count and many == 1:
        return 0, 0, SIDE, SIDE
    top, bottom = (cell(count) + 2 * GAP if count else GAP), SIDE - GAP
    ratio = many + (many - 1) / 16
    height = min(bottom - top, (SIDE - 2 * GAP) / ratio)
    width = round(height * ratio)
    left, top = (SIDE - width) // 2, round((top + bottom - height) / 2)
    return left, top, left + width, top + round(height)


def _size(area: tuple[int, int, int, int]) -> tuple[int, int]:
    return area[2] - area[0], area[3] - area[1]


def write(picture: Path, into: Path) -> Path:
    """NAME.png -> NAME.jpg in `into`."""
    workflow = json.loads((ROOT / "workflows" / f"{picture.stem}.json").read_text("utf-8"))
    asked = workflow["extra"]["flux2_kit"]
    references = [scenes.draw(scenes.parse(text), 256, 256) for text in asked["references"]]
    file, many = into / f"{picture.stem}.jpg", verdict.across(asked)
    with Image.open(picture) as image:
        compose(image.convert("RGB"), references, many).save(file, quality=90, subsampling=0)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds NAME.png")
    parser.add_argument("--into", type=Path, default=ROOT / "workflows")
    options = parser.parse_args()
    names = {file.stem for file in (ROOT / "workflows").glob("*.json")}
    pictures = [p for p in sorted(options.folder.glob("*.png")) if p.stem in names]
    if not pictures:
        sys.exit(f"{options.folder} holds no picture with a workflow's name.")
    sys.stdout.writelines(f"{write(picture, options.into)}\n" for picture in pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
