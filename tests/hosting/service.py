"""The hosted service in miniature, drawing nano's world: what the demo and the workflow tests order
pictures from, without a key and without the internet.

    with Service(python, folder) as service: ... service.environment ...

Standard library only; `python` is one with aiohttp, NumPy and Pillow. Run as a program it is the
service itself: python service.py SECONDS, the least time that a picture takes.
"""

import contextvars
import importlib
import io
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """`environment` is what a ComfyUI must be started with to order from it: `folder` keeps its
    journal, and nothing of the user's own settings is read."""

    def __init__(self, python, folder, seconds: float = 0.0):
        self.command = [str(python), __file__, str(seconds)]
        self.folder, self.process, self.environment = Path(folder), None, {}

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The local service did not start: {' '.join(self.command)}")
        said = json.loads(line)
        self.environment = {
            "BFL_API_KEY": said["key"],
            "FLUX2KIT_HOSTED_GATEWAY": said["url"],
            "FLUX2KIT_HOSTED_ADDRESS": "",
            "FLUX2KIT_HOSTED_SETTINGS": "",
            "FLUX2KIT_HOSTED_STATE": str(self.folder / "hosted"),
        }
        return self

    def __exit__(self, *_):
        self.process.stdin.close()  # it ends when this does, also if we are killed
        self.process.wait(10)


def main(seconds: float) -> int:
    pack = types.ModuleType("flux2_pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["flux2_pack"] = pack
    server = importlib.import_module("flux2_pack.tests.hosted.server")
    with painter(server, seconds) as running:
        sys.stdout.write(json.dumps({"url": running.url, "key": server.KEY}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    return 0


def painter(server, seconds: float):
    """A server whose pictures are what the prompt asks for, references looked at."""
    sent = contextvars.ContextVar("sent")

    class Painter(server.Server):
        async def _submit(self, request):
            fields = await request.json()
            sent.set([v for n, v in sorted(fields.items()) if n.startswith("input_image")])
            return await super()._submit(request)

    waits = ("Pending",) * round(2 * seconds)  # polls are at least half a second apart
    return Painter(paint=lambda fields: paint(fields, sent.get()), states=(*waits, "Ready"))


def paint(fields: dict, references: list[str]) -> bytes:
    """A PNG, JPEG or WebP of the scene that the prompt wants."""
    import base64

    from PIL import Image

    scenes = importlib.import_module("flux2_pack.flux2_core.nano.scenes")
    seen = [Image.open(io.BytesIO(base64.b64decode(data))) for data in references]
    looked = [scenes.check(picture, scenes.Scene((), anything=True)).found for picture in seen]
    wanted = scenes.parse(fields["prompt"], looked)
    things = tuple(
        replace(t, shape=t.shape or "circle", color=t.color or "red", place=t.place or "center")
        for t in wanted.things
    )
    scene = scenes.Scene(things, wanted.background or "white")
    out = io.BytesIO()
    picture = scenes.draw(scene, fields["width"], fields["height"])
    picture.save(out, fields["output_format"].upper())
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.0))
