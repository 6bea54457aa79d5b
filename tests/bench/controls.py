"""What caches and controls do to nano's pictures, read by the checker.

    python3 dev.py bench controls [--json FILE] [--parts cache,strength,regions,steps] [--cases 100]
                                  [--steps 8] [--sheet FILE]

cache: right pictures of nano's reference sets with the exact and the approximate cache, beside none.
strength: a picture follows its reference where it shows the reference's shape and colour on the
background that the prompt asks for instead of the reference's own, or its shape and place in the
colour that the prompt asks for.
regions: two references, each showing one object on both sides, are bound to the left and the right
half with a prompt for each half, then the other way round. Their objects have swapped where, in both
pictures, each half's object has more of shape and colour from the reference bound there than from
the other. Prompt and reference move together here: the same with references unbound says what the
prompts do alone, and a nano that reads numbers well swaps by them already.
steps: what is kept of a reference's layout and colour where it acts in a part of the run only.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

import report
from nano import BACKGROUNDS, COLORS, Case, batches, cases, draw, psnr, sheet, tensor, thing
from references import cached

from flux2_pack.flux2_core import schedule
from flux2_pack.flux2_core.guidance import Steer
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.references import active
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt

SETS = ("edit", "edit_among", "mix")
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
MOST_FALL = 2.0  # points, from one strength to the next, up to 1
MOST_BELOW = 5.0  # points below stock, from 1 to 3
LEAST_SWAPPED = 75.0  # per cent
RANGES = ((0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0))
BATCH = 25

Make = Callable[[], Controls | Steer | None]  # afresh for every batch: a cache starts empty


def no_controls() -> None:
    return None


def drawn(pipe: Pipeline, todo: list[Case], steps: int, make: Make = no_controls):
    """-> [(case, its picture)], the same noise for the same case whatever the controls."""
    out = []
    for start, batch in batches(list(todo), BATCH):
        out += zip(batch, draw(pipe, batch, start, steps, controls=make()), strict=True)
    return out


def share(verdicts) -> float:
    verdicts = list(verdicts)
    return 100 * sum(verdicts) / len(verdicts)


# ------------------------------------------------------------------------------------------ caches


def caches(pipe: Pipeline, options, out: report.Report) -> dict[str, list[Image.Image]]:
    rows, sigmas = {}, schedule.sigmas(options.steps, width=128, height=128)
    for kind in SETS:
        todo, case = cases(kind, options.cases), f"{kind}, {options.cases} held-back cases"
        plain = {"stock": no_controls, "KV form": lambda: Controls(kv_references=True)}
        right, found = {}, {}
        for name, make in plain.items():
            found[name] = drawn(pipe, todo, options.steps, make)
            right[name] = share(scenes.check(p, c.wanted).ok for c, p in found[name])
            out.add(case, f"right, {name}", right[name], "%")
        for peer, how in (
            ("KV form", {"mode": "exact"}),
            ("stock", {"mode": "approximate", "interval": 2}),
            ("stock", {"mode": "approximate", "interval": 4}),
        ):
            name = ", ".join(f"{k} {v}" if k != "mode" else f"{v} cache" for k, v in how.items())
            made = drawn(pipe, todo, options.steps, lambda how=how: cached(sigmas=sigmas, **how))
            ok = share(scenes.check(p, c.wanted).ok for c, p in made)
            out.add(case, f"right, {name}", ok, "%", peer=peer)
            lost = right[peer] - ok
            exact = 0.0 if how["mode"] == "exact" else None
            out.add(case, f"points lost, {name}", lost, "points", peer=peer, at_most=exact)
            pair = (tensor([p for _, p in m]) for m in (made, found[peer]))
            out.add(case, f"PSNR against {peer}, {name}", min(psnr(*pair), 99.0), "dB", peer=peer)
            rows[f"{kind}, {name}"] = [p for _, p in made]
    return rows


# ---------------------------------------------------------------------------------------- strength


def competing(n: int) -> list[Case]:
    """Edits whose prompt contradicts the reference: another background, another colour."""
    r, todo = random.Random("strength"), []
    for i in range(n):
        reference = scenes.Scene((thing(r),), r.choice(BACKGROUNDS))
        others = [b for b in BACKGROUNDS if b != reference.background]
        prompt = scenes.background_prompt(1, r.choice(others))
        if i % 2:
            others = [c for c in COLORS if c != reference.things[0].color]
            prompt = scenes.recolor_prompt(1, r.choice(others))
        todo.append(Case(prompt, scenes.parse(prompt, (reference,)), (reference,), (128, 128)))
    return todo


def follows(case: Case, picture: Image.Image) -> bool:
    verdict = scenes.check(picture, case.wanted)
    recolored = " with " in case.prompt
    return verdict.shape and (verdict.place if recolored else verdict.color)


def strengths(pipe: Pipeline, options, out: report.Report) -> dict[str, list[Image.Image]]:
    todo = competing(options.cases)
    case = f"strength, {len(todo)} prompts against their reference"

    def measure(name: str, todo: list[Case], make: Make = no_controls) -> float:
        made = drawn(pipe, todo, options.steps, make)
        rows[name] = [p for _, p in made]
        value = share(follows(c, p) for c, p in made)
        out.add(case, f"follows the reference, {name}", value, "%")
        asked = share(scenes.check(p, c.wanted).ok for c, p in made)
        out.add(case, f"reference and prompt right, {name}", asked, "%")
        return value

    rows: dict[str, list[Image.Image]] = {}
    chance = measure("without it", [replace(c, references=()) for c in todo])
    stock = measure("stock", todo)
    curve = {
        s: measure(
            f"strength {s:g}",
            todo,
            lambda s=s: Controls(references=(ReferenceControl(strength=s),)),
        )
        for s in STRENGTHS
    }
    out.add(case, "strength 0 above chance", abs(curve[0.0] - chance), "points", at_most=0)
    out.add(case, "strength 1 off stock", abs(curve[1.0] - stock), "points", at_most=0)
    rising = [curve[s] for s in STRENGTHS if s <= 1]
    fall = max(a - b for a, b in pairwise(rising))
    out.add(case, "largest fall from 0 to 1", max(fall, 0), "points", at_most=MOST_FALL)
    below = max(stock - curve[s] for s in STRENGTHS if s > 1)
    out.add(case, "most below stock from 1 to 3", max(below, 0), "points", at_most=MOST_BELOW)
    return rows


# ----------------------------------------------------------------------------------------- regions


def pairs(n: int) -> list[Case]:
    """Two references of different shapes and colours, each object there left and right."""
    r, todo = random.Random("regions"), []
    while len(todo) < n:
        a, b = (replace(thing(r, "left", (0.30, 0.33)), offset=(0.0, 0.0)) for _ in range(2))
        if a.shape != b.shape and a.color != b.color:
            both = (
                scenes.Scene((t, replace(t, place="right")), r.choice(BACKGROUNDS)) for t in (a, b)
            )
            todo.append(Case("", scenes.parse(""), tuple(both), (128, 128)))
    return todo


def halves(pipe: Pipeline, swapped: bool, bound: bool = True) -> Controls:
    """Reference 1 left and 2 right, or the other way round, each with a prompt that names it."""
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    places = (1 - left, left) if swapped else (left, 1 - left)
    texts = [pipe.text.encode([scenes.background_prompt(i, "white")]) for i in (1, 2)]
    return Controls(
        references=tuple(ReferenceControl(region=p if bound else None) for p in places),
        regions=tuple(RegionPrompt(t, p, base=0.0) for t, p in zip(texts, places, strict=True)),
    )


def sides(picture: Image.Image) -> dict[str, scenes.Thing]:
    """What stands left and what right, where there are just these two."""
    things = scenes.check(picture, "").found.things
    found = {t.place: t for t in things}
    return found if len(things) == 2 and set(found) == {"left", "right"} else {}


def alike(a: scenes.Thing, b: scenes.Thing) -> int:
    return (a.shape == b.shape) + (a.color == b.color)


def at_home(case: Case, picture: Image.Image, swapped: bool) -> tuple[bool, bool]:
    """Is each half's object more like the reference bound there than like the other? The same?"""
    first, second = (reference.things[0] for reference in case.references)
    left, right = (second, first) if swapped else (first, second)
    found = sides(picture)
    if not found:
        return False, False
    near = (alike(found["left"], left), alike(found["right"], right))
    far = (alike(found["left"], right), alike(found["right"], left))
    return near[0] > far[0] and near[1] > far[1], near == (2, 2)


def regions(pipe: Pipeline, options, out: report.Report) -> dict[str, list[Image.Image]]:
    todo, rows = pairs(options.cases), {}
    case = f"region swap, {len(todo)} seeds"
    for name, bound in (("bound", True), ("prompts alone, references unbound", False)):
        verdicts = []
        for swapped in (False, True):
            made = drawn(pipe, todo, options.steps, lambda s=swapped, b=bound: halves(pipe, s, b))
            verdicts.append([at_home(c, p, swapped) for c, p in made])
            rows[f"{name}, {swapped}"] = [p for _, p in made]
        both = [(a[0] and b[0], a[1] and b[1]) for a, b in zip(*verdicts, strict=True)]
        least = LEAST_SWAPPED if bound else None
        out.add(case, f"objects swap, {name}", share(v[0] for v in both), "%", at_least=least)
        out.add(
            case, f"and all shapes and colours are right, {name}", share(v[1] for v in both), "%"
        )
    return rows


# ------------------------------------------------------------------------------------------- steps


def steps(pipe: Pipeline, options, out: report.Report) -> dict[str, list[Image.Image]]:
    """What an edit of the background keeps of its reference, by the steps in which that acts."""
    todo = [c for c in competing(2 * options.cases) if " on " in c.prompt]
    sigmas = schedule.sigmas(options.steps, width=128, height=128)
    rows = {"reference": [scenes.draw(c.references[0], 128, 128) for c in todo]}
    for start, end in RANGES:

        def at(sigma: float, start=start, end=end) -> Controls:
            acts = active(start, end, schedule.share(sigmas, sigma))
            return Controls(references=(ReferenceControl(active=acts),))

        made = drawn(pipe, todo, options.steps, lambda at=at: at)
        found = [scenes.check(p, c.wanted) for c, p in made]
        case = f"steps, {len(todo)} edits of the background, {start:.0%} to {end:.0%}"
        out.add(case, "shape and place kept", share(v.shape and v.place for v in found), "%")
        out.add(case, "colour kept", share(v.color for v in found), "%")
        rows[case] = [p for _, p in made]
    return rows


PARTS = {"cache": caches, "strength": strengths, "regions": regions, "steps": steps}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sheet", type=Path, help="a PNG of the first ten pictures of each")
    options = parser.parse_args()
    out = report.Report("controls", options)
    pipe, rows = Pipeline.load("nano"), {}
    for part in options.parts.split(","):
        rows |= PARTS[part](pipe, options, out)
    if options.sheet:
        sheet(rows, options.sheet)
    out.finish()


if __name__ == "__main__":
    main()
