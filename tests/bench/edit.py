"""Edits on nano: what was asked is drawn, and nothing else changes.

    python3 dev.py bench edit [--json FILE] [--parts inpaint,references,outpaint,chain,upscale]
                              [--cases 200]

inpaint: one of two objects gets another colour inside a mask. references: an object from a reference
is drawn into the masked half, beside what was there. outpaint: the canvas grows by half a side.
chain: five edits in a row. Outside the mask every byte must be the original's; what was asked is read
by nano's checker. Prompts are held back from training.
upscale: drafts of 128 pixels, finished at 256 through windows of 192 that share 64. Seam energy is the
mean step from one pixel to the next beyond what its neighbours have, at the windows' borders and at
all other borders of latent cells. Objects stand somewhere, so the same columns of the same picture
drawn whole are measured too: windows may add no more at their borders than elsewhere, beyond three
standard errors.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import report
from nano import BACKGROUNDS, COLORS, Case, cases, reference, thing

from flux2_pack.flux2_core import enlarge, latents, schedule
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.inpaint import extend, held, latent_mask, prepare, stitch
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.references import to_pil
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.windows import Windowed, windows

PARTS = ("inpaint", "references", "outpaint", "chain", "upscale")
STEPS, SIDE = 8, 128
Edit = tuple[np.ndarray, np.ndarray, Case]  # picture, mask, what is asked


def array(scene: scenes.Scene, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    return np.array(scenes.draw(scene, width, height))


def box_of(wanted: scenes.Thing, margin: float = 0.05) -> np.ndarray:
    """A mask around one object of a 128 x 128 picture."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    x, y = np.add(scenes.PLACES[str(wanted.place)], wanted.offset)
    half = wanted.size / 2 + margin
    left, right = (round(SIDE * v) for v in (max(0, x - half), min(1, x + half)))
    top, bottom = (round(SIDE * v) for v in (max(0, y - half), min(1, y + half)))
    mask[top:bottom, left:right] = 1
    return mask


def pair(r: random.Random) -> scenes.Scene:
    place = r.choice(list(scenes.OPPOSITE))
    both = (thing(r, place, (0.30, 0.36)), thing(r, scenes.OPPOSITE[place], (0.30, 0.36)))
    return scenes.Scene(both, r.choice(BACKGROUNDS))


def recolored(scene: scenes.Scene, i: int, r: random.Random) -> scenes.Scene:
    old = scene.things[i].color
    color = r.choice([c for c in COLORS if c != old])
    things = list(scene.things)
    things[i] = replace(things[i], color=color)
    return replace(scene, things=tuple(things))


def inpaint(r: random.Random) -> Edit:
    scene = pair(r)
    i = r.randrange(2)
    wanted = recolored(scene, i, r)
    return array(scene), box_of(scene.things[i]), Case(scenes.describe(wanted), wanted)


def references(r: random.Random) -> Edit:
    """The picture has one object; another, from a reference, is drawn into the other half."""
    there = replace(pair(r), things=pair(r).things[:1])
    old, new = there.things[0], reference(r)
    place = scenes.OPPOSITE[str(old.place)]
    mask = box_of(replace(new.things[0], place=place, offset=(0, 0), size=0.44))
    shown = scenes.Scene((replace(old, place="center", offset=(0, 0)),), there.background)
    picks = [(1, str(old.place)), (2, place)]
    prompt = scenes.pick_prompt(picks, str(there.background))
    return array(there), mask, Case(prompt, scenes.parse(prompt, (shown, new)), (shown, new))


def outpaint(r: random.Random) -> Edit:
    """An object in the middle: after the canvas has grown it stands at one of its sides."""
    one, ground = thing(r, "center", (0.32, 0.40)), r.choice(BACKGROUNDS)
    side = r.choice(list(scenes.OPPOSITE))
    picture = array(scenes.Scene((one,), ground))
    canvas, mask = extend(torch.from_numpy(picture)[None] / 255, **{side: SIDE // 2})
    wanted = scenes.Scene((replace(one, place=scenes.OPPOSITE[side]),), ground)
    grown = (canvas[0] * 255).round().byte().numpy()
    return grown, mask[0].numpy(), Case(scenes.describe(wanted), wanted)


def edits(make, count: int) -> list[Edit]:
    r, found = random.Random(make.__name__), []
    while len(found) < count:
        edit = make(r)
        if scenes.held_back(edit[2].prompt):
            found.append(edit)
    return found


@torch.inference_mode()
def redraw(pipe: Pipeline, edit: Edit, seed: int) -> np.ndarray:
    """One edit through window, held sampling and stitch -> the picture's bytes."""
    picture, mask, case = edit
    work = prepare(
        torch.from_numpy(picture.copy())[None] / 255, torch.from_numpy(mask)[None], whole=True
    )
    latent = pipe.vae.encode(work.pictures.movedim(-1, 1) * 2 - 1)
    height, width = work.pictures.shape[1:3]
    noise = latents.noise(seed, width=width, height=height)
    pictures = [scenes.draw(s, 64, 64) for s in case.references]
    shown = [torch.from_numpy(np.asarray(p).copy()).movedim(-1, 0)[None] for p in pictures]
    refs = [pipe.vae.encode(p / 127.5 - 1) for p in shown]
    field = velocity(pipe.model, pipe.encode_text(case.prompt), references=refs)
    sigmas = schedule.sigmas(STEPS, width=width, height=height)
    x = denoise(held(field, latent, noise, latent_mask(work.masks)), noise, sigmas)
    drawn = ((pipe.vae.decode(x).movedim(1, -1) + 1) / 2).clamp(0, 1)
    return np.asarray(to_pil(stitch(drawn, work.place)[0]))


def outcomes(pipe: Pipeline, make, count: int) -> Iterator[tuple[bool, bool, np.ndarray]]:
    """Of each edit: right, every byte outside the mask kept, the picture."""
    for seed, edit in enumerate(edits(make, count)):
        out = redraw(pipe, edit, seed)
        kept = (out == edit[0])[edit[1] == 0].all()
        yield scenes.check(Image.fromarray(out), edit[2].wanted).ok, bool(kept), out


def chain(pipe: Pipeline, count: int) -> tuple[int, int]:
    """Five recolours in a row, objects taking turns: (all five right, untouched bytes kept)."""
    right = kept = 0
    for seed in range(count):
        r = random.Random(f"chain {seed}")
        scene = pair(r)
        first = now = array(scene)
        touched, good = np.zeros((SIDE, SIDE), bool), True
        for step in range(5):
            mask = box_of(scene.things[step % 2])
            scene = recolored(scene, step % 2, r)
            now = redraw(pipe, (now, mask, Case(scenes.describe(scene), scene)), 5 * seed + step)
            touched |= mask > 0
            good &= scenes.check(Image.fromarray(now), scene).ok
        right += good
        kept += bool((now == first)[~touched].all())
    return right, kept


WINDOW, SHARED = 12, 4  # latent cells


@torch.inference_mode()
def upscaled(pipe: Pipeline, case: Case, seed: int) -> dict[str, torch.Tensor]:
    """A draft finished at twice its size, through windows and whole: (H, W, 3) in [0, 1] each."""
    text, side = pipe.encode_text(case.prompt), 2 * SIDE
    draft = pipe.vae.decode(pipe.sample(case.prompt, seed=seed)).movedim(1, -1)
    large = enlarge.resize((draft + 1) / 2, side, side)
    latent = pipe.vae.encode(large.movedim(-1, 1) * 2 - 1)
    sigmas = enlarge.sigmas(4, enlarge.start_of(0.5, 2), width=side, height=side)
    x = torch.lerp(latent, latents.noise(seed, width=side, height=side), float(sigmas[0]))
    out = {}
    for name, net in (("windows", Windowed(pipe.model, WINDOW, SHARED)), ("whole", pipe.model)):
        drawn = pipe.vae.decode(denoise(velocity(net, text), x, sigmas))
        out[name] = ((drawn[0].movedim(0, -1) + 1) / 2).clamp(0, 1)
    return out


def seams(picture: torch.Tensor) -> tuple[float, float]:
    """Seam energy at the windows' borders and at the other borders of cells, in levels of 255."""
    cells = picture.shape[0] // latents.PIXELS
    every = windows(cells, cells, WINDOW, SHARED)
    edges = {w.left for w in every} | {w.left + w.width for w in every}
    at = torch.tensor([latents.PIXELS * c for c in range(1, cells)])
    border = torch.tensor([c in edges for c in range(1, cells)])
    found = []
    for p in (picture, picture.transpose(0, 1)):
        step = (p[:, 1:] - p[:, :-1]).abs().mean((0, 2)) * 255  # step[i]: from column i to i + 1
        found.append(step[at - 1] - (step[at - 2] + step[at]) / 2)
    energy = torch.stack(found).mean(0)
    return energy[border].mean().item(), energy[~border].mean().item()


def upscale(pipe: Pipeline, count: int, out: report.Report) -> list[np.ndarray]:
    right, energies, shown = {"windows": 0, "whole": 0}, {"windows": [], "whole": []}, []
    for seed, case in enumerate(cases("two", count)):
        for name, picture in upscaled(pipe, case, seed).items():
            image = to_pil(picture)
            right[name] += scenes.check(image, case.wanted).ok
            energies[name].append(seams(picture))
            shown += [np.asarray(image)] if name == "windows" else []
    for name, found in energies.items():
        at, elsewhere = np.mean(found, 0)
        out.add(f"upscale, {name}", "right", 100 * right[name] / count, "%")
        out.add(f"upscale, {name}", "seam energy at window borders", at, "levels")
        out.add(f"upscale, {name}", "seam energy elsewhere", elsewhere, "levels")
    # what the picture itself has there is in both: windows may add no more at their borders
    added = np.subtract(energies["windows"], energies["whole"])
    excess = added[:, 0] - added[:, 1]
    noise = 3 * excess.std() / count**0.5
    metric = "seam energy that windows add at their borders, over elsewhere"
    out.add("upscale", metric, excess.mean(), "levels", at_most=noise)
    return shown[:20]


def sheet(rows: list[np.ndarray], file) -> None:
    """Results side by side, ten in a row."""
    height, width = max(a.shape[0] for a in rows), max(a.shape[1] for a in rows)
    out = Image.new("RGB", (10 * (width + 4), -(-len(rows) // 10) * (height + 4)), (38, 38, 42))
    for i, picture in enumerate(rows):
        out.paste(Image.fromarray(picture), (i % 10 * (width + 4), i // 10 * (height + 4)))
    out.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--sheet", metavar="FILE", help="the first pictures of each part as a PNG")
    options = parser.parse_args()
    out, pipe, shown = report.Report("edit", options), Pipeline.load("nano"), []
    needed = {"inpaint": 85.0}
    for part in options.parts.split(","):
        if part == "chain":
            count = max(1, options.cases // 10)
            right, kept = chain(pipe, count)
            out.add("chain of five", "untouched bytes kept", 100 * kept / count, "%", at_least=100)
            out.add("chain of five", "all five right", 100 * right / count, "%")
            continue
        if part == "upscale":
            shown += upscale(pipe, options.cases, out)
            continue
        found = list(outcomes(pipe, globals()[part], options.cases))
        right, kept = (100 * sum(f[i] for f in found) / len(found) for i in (0, 1))
        out.add(part, "right", right, "%", at_least=needed.get(part))
        out.add(part, "bytes outside the mask kept", kept, "%", at_least=100)
        shown += [f[2] for f in found[:20]]
    if options.sheet and shown:
        sheet(shown, options.sheet)
    out.finish()


if __name__ == "__main__":
    main()
