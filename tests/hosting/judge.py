"""python judge.py PICTURE WANTED: read a picture with nano's checker; exit 0 if all is right.

WANTED: JSON {"prompt": ..., "references": [a prompt for each reference picture]}.
"""

import importlib
import json
import sys
import types
from pathlib import Path

from PIL import Image


def main() -> int:
    pack = types.ModuleType("flux2_pack")
    pack.__path__ = [str(Path(__file__).resolve().parents[2])]
    sys.modules["flux2_pack"] = pack
    scenes = importlib.import_module("flux2_pack.flux2_core.nano.scenes")
    wanted = json.loads(sys.argv[2])
    references = [scenes.parse(text) for text in wanted.get("references", ())]
    report = scenes.check(Image.open(sys.argv[1]), scenes.parse(wanted["prompt"], references))
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
