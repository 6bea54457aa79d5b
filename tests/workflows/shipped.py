"""The shipped workflows, and what the pictures that they draw should show."""

import json
from pathlib import Path

from flux2_pack.flux2_core.nano import scenes

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def wanted(workflow: dict) -> scenes.Scene:
    """What its `extra.flux2_kit` asks for: a prompt, and one for each reference picture."""
    asked = workflow["extra"]["flux2_kit"]
    return scenes.parse(asked["prompt"], [scenes.parse(text) for text in asked["references"]])
