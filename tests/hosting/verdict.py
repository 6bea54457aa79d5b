"""python verdict.py PNG WANTED [PNG WANTED ...]: does each picture show what was wanted?

WANTED is what a shipped workflow says of itself under extra.flux2_kit, as JSON: "prompt", a sentence
of nano's world, and "references", a sentence for each picture that the prompt speaks of by number.
Prints a verdict per picture; exit 0 only if all are right.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from flux2_core.nano import scenes


def main(arguments: list[str]) -> int:
    good = True
    for file, wanted in zip(arguments[::2], arguments[1::2], strict=True):
        wanted = json.loads(wanted)
        references = [scenes.parse(text) for text in wanted["references"]]
        with Image.open(file) as image:
            report = scenes.check(image, scenes.parse(wanted["prompt"], references))
        good &= report.ok
        print(f"{file}\n    asked for: {wanted['prompt']}\n    {report}")
    return 0 if good and arguments else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
