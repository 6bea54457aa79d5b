"""The shipped workflows, and what the pictures that they draw should show."""

import json
from pathlib import Path

from PIL import Image

from flux2_pack.tests.hosting import verdict

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def asked(workflow: dict) -> dict:
    """What it says of itself: see hosting/verdict.py. "regions" holds the prompts of regions,
    "further" those of a batch after its first."""
    return workflow["extra"]["flux2_kit"]


def wrong(image: Image.Image, workflow: dict) -> list[str]:
    """What the picture, or each of those side by side in it, does not show as it should."""
    return [str(report) for report in verdict.reports(image, asked(workflow)) if not report.ok]
