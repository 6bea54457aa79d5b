"""nano's score: held-back prompts drawn, decoded and read by the checker.

    python3 dev.py bench nano [--json FILE] [--sheet FILE] [--sets one,edit] [--steps 8] [--cases 200]

A set is 200 cases by default, each a prompt that training never showed (the edit forms have few,
so they come back) with references drawn anew. A picture is right when every attribute is. The
autoencoder is measured on scenes of its own; with --taef2 FOLDER, TAEF2's decoder reads our
latents too.
"""

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import report

from flux2_pack.flux2_core import latents, schedule, taef2
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.transformer import Controls

COLORS, PLACES, BACKGROUNDS = map(list, (scenes.COLORS, scenes.PLACES, scenes.BACKGROUNDS))
# per cent right; the other sets are reported
REQUIRED = {"one": 98.0, "two": 92.0, "edit": 94.0, "edit_among": 94.0, "mix": 90.0, "pick": 75.0}
KV_LOSS = 3.0  # points that the KV form may lie below the plain form
SETS = (
    "one",
    "two",
    "free",
    "large",
    "edit",
    "edit_among",
    "mix",
    "pick",
    "edit_kv",
    "mix_kv",
    "pick_kv",
)
ATTRIBUTES = ("count", "shape", "color", "place", "background")


@dataclass(frozen=True)
class Case:
    prompt: str
    wanted: scenes.Scene
    references: tuple[scenes.Scene, ...] = ()
    reference_size: tuple[int, int] = (64, 64)


def thing(r: random.Random, place: str | None = None, sizes=scenes.SIZES) -> scenes.Thing:
    offset = (r.uniform(-0.02, 0.02), r.uniform(-0.02, 0.02))
    place = place or r.choice(PLACES)
    return scenes.Thing(r.choice(scenes.SHAPES), r.choice(COLORS), place, r.uniform(*sizes), offset)


def reference(r: random.Random) -> scenes.Scene:
    return scenes.Scene((thing(r),), r.choice(BACKGROUNDS))


def case(kind: str, r: random.Random) -> Case:
    """One random case of a set; its prompt may be any."""
    place, background = r.choice(PLACES), r.choice(BACKGROUNDS)
    references: tuple[scenes.Scene, ...] = ()
    if kind in ("one", "large"):
        prompt = scenes.describe(scenes.Scene((thing(r),), background))
    elif kind == "two":
        place = r.choice(list(scenes.OPPOSITE))
        pair = (thing(r, place), thing(r, scenes.OPPOSITE[place]))
        prompt = scenes.describe(scenes.Scene(pair, background))
    elif kind == "free":
        full = thing(r)
        out = r.choice(("shape", "color", "place", "background"))
        kept = {a: None if a == out else getattr(full, a) for a in ("shape", "color", "place")}
        prompt = scenes.describe(
            scenes.Scene((scenes.Thing(**kept),), None if out == "background" else background)
        )
    elif kind == "edit":
        references = (reference(r),)
        recolor = scenes.recolor_prompt(1, r.choice(COLORS))
        prompt = r.choice((recolor, scenes.background_prompt(1, background)))
    elif kind == "edit_among":  # the last of two to four references is edited
        references = tuple(reference(r) for _ in range(r.randint(2, 4)))
        n = len(references)
        recolor = scenes.recolor_prompt(n, r.choice(COLORS))
        prompt = r.choice((recolor, scenes.background_prompt(n, background)))
    elif kind == "mix":
        references = (reference(r), reference(r))
        first = r.choice((1, 2))
        prompt = scenes.mix_prompt(first, 3 - first, place, background)
    else:
        references = tuple(reference(r) for _ in range(10))
        place = r.choice(list(scenes.OPPOSITE))
        first, second = r.sample(range(1, 11), 2)
        prompt = scenes.pick_prompt([(first, place), (second, scenes.OPPOSITE[place])], background)
    size = (128, 128) if kind.startswith("edit") else (64, 64)
    return Case(prompt, scenes.parse(prompt, references), references, size)


def cases(kind: str, n: int) -> list[Case]:
    """n held-back cases of a set, always the same."""
    r = random.Random(kind.removesuffix("_kv"))
    found: list[Case] = []
    while len(found) < n:
        made = case(kind.removesuffix("_kv"), r)
        if scenes.held_back(made.prompt):
            found.append(made)
    return found


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5
        - 1
    )


def pictures(x: torch.Tensor) -> list[Image.Image]:
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


@torch.inference_mode()
def draw(
    pipe: Pipeline,
    batch: list[Case],
    seed: int,
    steps: int = 8,
    guidance: float = 1.0,
    side: int = 128,
    controls: Controls | None = None,
) -> list[Image.Image]:
    """A batch of cases of one set -> their pictures. Noise i is that of seed + i alone."""
    refs = []
    for i in range(len(batch[0].references)):
        drawn = [scenes.draw(c.references[i], *batch[0].reference_size) for c in batch]
        refs.append(pipe.vae.encode(tensor(drawn)))
    field = velocity(
        pipe.model,
        pipe.text.encode([c.prompt for c in batch]),
        negative=pipe.text.encode([""] * len(batch)) if guidance != 1 else None,
        scale=guidance,
        references=refs,
        controls=controls,
    )
    x = latents.noise(seed, width=side, height=side, batch=len(batch))
    x = denoise(field, x, schedule.sigmas(steps, width=side, height=side))
    return pictures(pipe.vae.decode(x))


def batches(todo: list[Case], size: int):
    """(number of the first case, cases) with as many references each."""
    todo.sort(key=lambda c: len(c.references))
    start = 0
    for _, same in groupby(todo, key=lambda c: len(c.references)):
        group = list(same)
        for i in range(0, len(group), size):
            yield start + i, group[i : i + size]
        start += len(group)


def score(
    pipe: Pipeline, kind: str, options, out: report.Report
) -> tuple[list[Image.Image], float]:
    """-> the pictures of a set, and how many per cent of them are right."""
    side = 256 if kind == "large" else 128
    controls = Controls(kv_references=True) if kind.endswith("_kv") else None
    todo, seen, right, drawn = cases(kind, options.cases), Counter(), 0, []
    for start, batch in batches(todo, 8 if kind.startswith(("pick", "large")) else 25):
        made = draw(pipe, batch, start, options.steps, options.guidance, side, controls)
        for picture, wish in zip(made, batch, strict=True):
            verdict = scenes.check(picture, wish.wanted)
            right += verdict.ok
            seen.update(a for a in ATTRIBUTES if getattr(verdict, a))
        drawn += made
    prompts = len({c.prompt for c in todo})
    case = f"{kind}, {len(todo)} held-back cases of {prompts} prompts, {options.steps} steps"
    for attribute in ATTRIBUTES:
        out.add(case, f"{attribute} right", 100 * seen[attribute] / len(todo), "%")
    share = 100 * right / len(todo)
    out.add(case, "all right", share, "%", at_least=REQUIRED.get(kind))
    return drawn, share


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean PSNR of pictures (B, 3, H, W) in [-1, 1], in dB."""
    error = (a - b).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


@torch.inference_mode()
def autoencoder(pipe: Pipeline, folder: Path | None, out: report.Report) -> None:
    r = random.Random("autoencoder")
    x = tensor([scenes.draw(reference(r)) for _ in range(64)])
    z = pipe.vae.encode(x)
    y = pipe.vae.decode(z).clamp(-1, 1)
    out.add("autoencoder, 64 scenes", "PSNR", psnr(x, y), "dB", at_least=32.0)
    if not folder:
        print("TAEF2's decoder is not measured: name its folder with --taef2", file=sys.stderr)
    else:
        from safetensors.torch import load_file

        net = taef2.decoder()
        net.load_state_dict(load_file(folder / "taef2_decoder.safetensors"))
        out.add(
            "TAEF2's decoder on our latents",
            "PSNR",
            psnr(x, taef2.decode(net, z)),
            "dB",
            at_least=28.0,
        )


def speed(pipe: Pipeline, steps: int, out: report.Report) -> None:
    """Seconds for one picture through the pipeline: text, steps, decode."""
    times = []
    for seed in range(6):
        begun = time.perf_counter()
        pipe("a red circle left on white background", seed=seed, steps=steps)
        times.append(time.perf_counter() - begun)
    out.add(f"one picture, {steps} steps", "time", sorted(times[1:])[2], "s", at_most=3.0)


def sheet(rows: dict[str, list[Image.Image]], file: Path, columns: int = 10) -> None:
    """The first pictures of every set, a row each."""
    page = Image.new("RGB", (columns * 132 + 4, len(rows) * 132 + 4), "white")
    for y, row in enumerate(rows.values()):
        for x, picture in enumerate(row[:columns]):
            page.paste(picture.resize((128, 128)), (4 + 132 * x, 4 + 132 * y))
    page.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="a PNG of each set's first ten pictures")
    parser.add_argument("--taef2", type=Path, help="folder of taef2_decoder.safetensors")
    options = parser.parse_args()
    out = report.Report("nano", options)
    pipe = Pipeline.load("nano")
    autoencoder(pipe, options.taef2, out)
    speed(pipe, options.steps, out)
    scores = {kind: score(pipe, kind, options, out) for kind in options.sets.split(",")}
    for kind, (_, share) in scores.items():
        plain = kind.removesuffix("_kv")
        if plain != kind and plain in scores:
            loss = scores[plain][1] - share
            out.add(f"{kind} against {plain}", "points lost", loss, "points", at_most=KV_LOSS)
    if options.sheet:
        sheet({kind: drawn for kind, (drawn, _) in scores.items()}, options.sheet)
    out.finish()


if __name__ == "__main__":
    main()
