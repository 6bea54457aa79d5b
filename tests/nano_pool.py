"""The pictures that nano is trained on, drawn and encoded once by TAEF2's encoder.

    python tests/nano_pool.py --teacher FOLDER --pool FOLDER [--threads N]

A pool file holds {"labels": int16 (N, 8), "latents": bfloat16 (N, 128, h, w), and for some
"pixels": uint8 (N, 3, H, W)}. A label row is shape, color, place of the first and second object
(-1: none), background, jitter: the same jitter means the same size and offset of the first object.
In the files of the wider world (letter_128, word_128, count_128, size_128) a row is a seed and a -1
in every other column: `wider_scene` makes the picture and the wish of it.
"""

import argparse
import importlib
import random
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
if "flux2_pack" not in sys.modules:
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    pack = types.ModuleType("flux2_pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["flux2_pack"] = pack
scenes = importlib.import_module("flux2_pack.flux2_core.nano.scenes")
wider = importlib.import_module("flux2_pack.flux2_core.nano.wider")
taef2 = importlib.import_module("flux2_pack.flux2_core.taef2")

COLORS, PLACES, BACKGROUNDS = (list(t) for t in (scenes.COLORS, scenes.PLACES, scenes.BACKGROUNDS))
SHAPES = list(scenes.SHAPES)
JITTERS = 12
WIDER = {"letter": 4000, "word": 4000, "count": 1600, "size": 1600}


def jitter(index: int) -> tuple[float, tuple[float, float]]:
    """Size and offset number `index`; the same for every picture that carries the number."""
    r = random.Random(index * 7919 + 1)
    return r.uniform(*scenes.SIZES), (r.uniform(-0.02, 0.02), r.uniform(-0.02, 0.02))


def scene(label) -> "scenes.Scene":
    """A label row -> the scene it stands for."""
    s1, c1, p1, s2, c2, p2, background, j = (int(v) for v in label)
    size, offset = jitter(j)
    if s2 < 0:
        things = (scenes.Thing(SHAPES[s1], COLORS[c1], PLACES[p1], size, offset),)
    else:
        other, offset2 = jitter(j + 1000)
        low, high = scenes.PAIR_SIZES
        size, other = min(size, high), min(max(other, low), high)
        things = (
            scenes.Thing(SHAPES[s1], COLORS[c1], PLACES[p1], size, offset),
            scenes.Thing(SHAPES[s2], COLORS[c2], PLACES[p2], other, offset2),
        )
    return scenes.Scene(things, BACKGROUNDS[background])


def every_single(jitters: int) -> np.ndarray:
    """All one-object scenes, in the order of (shape, color, place, background, jitter)."""
    sides = [range(len(t)) for t in (SHAPES, COLORS, PLACES, BACKGROUNDS)] + [range(jitters)]
    rows = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 5)
    none = np.full((len(rows), 3), -1)
    return np.concatenate((rows[:, :3], none, rows[:, 3:]), 1).astype(np.int16)


def single_index(shape, color, place, background, j):
    """Where `every_single` has a scene."""
    index = shape
    for value, size in (
        (color, len(COLORS)),
        (place, len(PLACES)),
        (background, len(BACKGROUNDS)),
        (j, JITTERS),
    ):
        index = index * size + value
    return index


def some(n: int, pairs: float, seed: int) -> np.ndarray:
    """n random scenes, a share of them with two objects at opposite places."""
    r = random.Random(seed)
    rows = []
    for _ in range(n):
        place = r.choice(PLACES)
        row = [r.randrange(len(SHAPES)), r.randrange(len(COLORS)), PLACES.index(place), -1, -1, -1]
        if r.random() < pairs:
            place = r.choice(list(scenes.OPPOSITE))
            row[2] = PLACES.index(place)
            other = PLACES.index(scenes.OPPOSITE[place])
            row[3:] = [r.randrange(len(SHAPES)), r.randrange(len(COLORS)), other]
        rows.append([*row, r.randrange(len(BACKGROUNDS)), r.randrange(500)])
    return np.array(rows, np.int16)


def wider_scene(kind: str, seed: int):
    """-> the scene to draw and the wish, of one row of a wider file."""
    return wider.some(kind, random.Random(f"{kind} {seed}"))


def seeds(count: int) -> np.ndarray:
    rows = np.full((count, 8), -1, np.int16)
    rows[:, 0] = np.arange(count)
    return rows


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Widths and heights from 64 to 256 in multiples of 16, mostly not square."""
    r = random.Random(seed)
    return [(16 * r.randint(4, 16), 16 * r.randint(4, 16)) for _ in range(count)]


def plan() -> dict[str, tuple[np.ndarray, int, int]]:
    """Pool file -> labels, width, height."""
    singles = every_single(JITTERS)
    files = {
        "one_64": (singles, 64, 64),
        "one_128": (singles, 128, 128),
        "two_64": (some(5000, 1.0, 1), 64, 64),
        "two_128": (some(5000, 1.0, 1), 128, 128),
    }
    for i, (width, height) in enumerate(sizes(16, 3)):
        files[f"any_{width}x{height}"] = (some(100, 0.5, 100 + i), width, height)
    files["any_256"] = (some(1600, 0.5, 2), 256, 256)
    for kind, count in WIDER.items():
        files[f"{kind}_128"] = (seeds(count), 128, 128)
    return files


@torch.inference_mode()
def encode(net, drawn: list, width, height, keep: int):
    latents, pixels = [], []
    for start in range(0, len(drawn), 32):
        pictures = np.stack(
            [np.asarray(scenes.draw(s, width, height)) for s in drawn[start : start + 32]]
        )
        batch = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        latents.append(taef2.encode(net, batch.bfloat16() / 127.5 - 1).bfloat16())
        if start < keep:
            pixels.append(batch.contiguous())
    return torch.cat(latents), torch.cat(pixels) if pixels else None


def build(teacher: Path, pool: Path, part: int = 0, parts: int = 1) -> None:
    """Make the files that are missing; several processes may share the work by `part`."""
    pool.mkdir(parents=True, exist_ok=True)
    net = taef2.encoder()
    net.load_state_dict(load_file(teacher / "taef2_encoder.safetensors"))
    net = net.bfloat16().to(memory_format=torch.channels_last)
    for name, (labels, width, height) in plan().items():
        if complete(pool, name):
            continue
        cuts = np.array_split(np.arange(len(labels)), parts if len(labels) > 500 else 1)
        for i, cut in enumerate(cuts):
            file = pool / (f"{name}.{i}of{len(cuts)}.pt")
            if (i if len(cuts) > 1 else hash_of(name)) % parts != part or file.exists():
                continue
            begun = time.time()
            keep = len(cut) if "256" not in name else 256
            kind = name.split("_")[0]
            drawn = [
                wider_scene(kind, int(row[0]))[0] if kind in WIDER else scene(row)
                for row in labels[cut]
            ]
            latents, pixels = encode(net, drawn, width, height, keep)
            torch.save(
                {"labels": torch.from_numpy(labels[cut]), "latents": latents, "pixels": pixels},
                file.with_suffix(".tmp"),
            )
            file.with_suffix(".tmp").rename(file)
            print(f"{file.name}: {len(cut)} pictures in {time.time() - begun:.0f} s", flush=True)


def hash_of(name: str) -> int:
    return sum(name.encode())


def complete(pool: Path, name: str) -> list[Path]:
    """The files of a set in order, if all its parts are there; however many parts it was cut into."""
    for last in pool.glob(f"{name}.*.pt"):
        count = int(last.name.split(".")[1].split("of")[1])
        parts = [pool / f"{name}.{i}of{count}.pt" for i in range(count)]
        if all(part.exists() for part in parts):
            return parts
    return []


def load(pool: Path, name: str) -> dict[str, torch.Tensor]:
    """A pool set, its parts joined; pixels left on disk."""
    parts = complete(pool, name)
    data = [torch.load(p, mmap=True) for p in parts]
    return {key: torch.cat([d[key] for d in data]) for key in ("labels", "latents")}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--teacher", type=Path, required=True)
    arguments.add_argument("--pool", type=Path, required=True)
    arguments.add_argument("--part", type=int, default=0)
    arguments.add_argument("--parts", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    build(options.teacher, options.pool, options.part, options.parts)
