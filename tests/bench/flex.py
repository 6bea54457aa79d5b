"""Flex on nano: solvers, drafts that are finished large, step caching, negatives.

    python3 dev.py bench flex [--json FILE] [--parts solvers,enlarge,caching,negatives] [--cases 100]
                              [--sheet FILE]

solvers: distance of eight calls of the model to a run of 400 steps. enlarge: 128 pixels drafted, 256
finished, against a whole run at 256. caching: right pictures over five sets of 2 x --cases, see
step_cache.py. negatives: how often a negative takes the second object away, and what it costs.
--sheet: one seed with several steps and guidance values, as a PNG.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import step_cache
import torch
from flex_grid import contact

import nano
import report

from flux2_pack.flux2_core import enlarge, latents, schedule
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.negatives import Negative
from flux2_pack.flux2_core.noise import composed
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.solvers import SOLVERS, draw
from flux2_pack.flux2_core.stream import Controls

SIDE, CALLS = 128, 8
PARTS = ("solvers", "enlarge", "caching", "negatives")
STRONG = {"scale": 8.0, "tau": 10.0, "alpha": 1.0}  # against an object that the prompt itself names
SPACINGS = {"flux2": "the reference's schedule", "linear": "even steps"}
PROMPT = "a red circle left and a blue square right on white background"
FREE, TAKEN = "a circle center on white background", "orange"  # a colour that nano likes to choose


def some(kind: str, count: int) -> list[nano.Case]:
    return nano.cases(kind, count)


@torch.inference_mode()
def solvers(pipe: Pipeline, count: int, out: report.Report) -> None:
    """Root mean square distance to the 400-step solution, picture by picture, and right pictures."""
    todo = some("one", count // 2) + some("two", count - count // 2)
    size = {"width": SIDE, "height": SIDE}
    field = velocity(pipe.model, pipe.text.encode([c.prompt for c in todo]))
    x = latents.noise(0, **size, batch=len(todo))
    truth = denoise(field, x, schedule.sigmas(400, **size))  # whatever the spacing, the same path
    best: dict[str, float] = {}
    for spacing, name in SPACINGS.items():
        for solver in SOLVERS.values():
            steps = CALLS // solver.calls
            sigmas = schedule.sigmas(steps, **size, spacing=spacing)
            noise = partial(draw, range(len(todo)), like=x) if solver.stochastic else None
            made = denoise(
                field, x, sigmas, solver=solver.name,
                noise=None if noise is None else (lambda i, f=noise: f(step=i)),
            )  # fmt: skip
            apart = (made - truth).square().mean((1, 2, 3)).sqrt().mean().item()
            right = sum(
                scenes.check(p, c.wanted).ok
                for p, c in zip(nano.pictures(pipe.vae.decode(made)), todo, strict=True)
            )
            case = f"{solver.label}, {CALLS} calls, {name}"
            out.add(case, "all right", 100 * right / len(todo), "%")
            if solver.stochastic:
                continue
            best[f"{solver.name}, {name}"] = apart
            out.add(case, "distance to 400 steps", apart, "RMS")
    stock = best["euler, the reference's schedule"]
    for spacing, name in SPACINGS.items():
        top = min(v for k, v in best.items() if k.endswith(name))
        bound = 0.5 if spacing == "linear" else None  # the reference's last step hides all else
        case = f"best solver over Euler, both on {name}"
        out.add(case, "distance", top / best[f"euler, {name}"], "ratio", at_most=bound)
        case = f"best solver on {name} over Euler on the reference's"
        out.add(case, "distance", top / stock, "ratio", at_most=bound)


@torch.inference_mode()
def drafts(pipe: Pipeline, count: int, out: report.Report) -> None:
    """Drafted at 128, finished at 256: right at both, and the same scene."""
    kept = whole = 0
    steps, finish = 8, enlarge.steps_for(0, 8)
    start = enlarge.start_of(0.5, 2.0)
    late = enlarge.sigmas(finish, start, width=256, height=256)
    for i, case in enumerate(some("one", count - count // 2) + some("two", count // 2)):
        field = velocity(pipe.model, pipe.text.encode([case.prompt]))
        x = composed(i, width=SIDE, height=SIDE)
        small = denoise(field, x, schedule.sigmas(steps, width=SIDE, height=SIDE))
        image = pipe.vae.decode(small)
        large = enlarge.resize((image.movedim(1, -1) + 1) / 2, 256, 256)
        clean = pipe.vae.encode(large.movedim(-1, 1) * 2 - 1)
        noise = composed(i, width=256, height=256)
        x = torch.lerp(clean, noise, float(late[0]))
        done = denoise(field, x, late)
        both = [nano.pictures(image)[0], nano.pictures(pipe.vae.decode(done))[0]]
        kept += all(scenes.check(p, case.wanted).ok for p in both)
        stock = latents.noise(i, width=256, height=256)
        done = denoise(field, stock, schedule.sigmas(steps, width=256, height=256))
        whole += scenes.check(nano.pictures(pipe.vae.decode(done))[0], case.wanted).ok
    tokens = steps * 64 + finish * 256
    case = f"128 drafted in {steps} steps, 256 finished in {finish}, {count} seeds"
    out.add(case, "right at both sizes", 100 * kept / count, "%", at_least=90)
    out.add(case, "right in a whole run at 256", 100 * whole / count, "%")
    share = 100 * tokens / (steps * 256)
    out.add(case, "token-steps of a whole run", share, "%", at_most=60)


@torch.inference_mode()
def negatives(pipe: Pipeline, count: int, out: report.Report) -> None:
    """A colour that the prompt leaves open and the negative names; a second object that the prompt
    names and the negative too; and the cost."""
    away = f"an {TAKEN} circle center on white background"
    plain, steered = (pictures_of(pipe, FREE, words, count) for words in (None, away))
    for case, found in (("no negative", plain), (f"negative '{away}'", steered)):
        taken = sum(any(t.color == TAKEN for t in r.found.things) for r in found)
        out.add(f"'{FREE}', {case}", f"{TAKEN}", 100 * taken / count, "%")
        right = 100 * sum(r.ok for r in found) / count
        out.add(f"'{FREE}', {case}", "all right", right, "%", at_least=80)
    before, after = (
        100 * sum(not any(t.color == TAKEN for t in r.found.things) for r in found) / count
        for found in (plain, steered)
    )
    out.add(f"'{FREE}'", f"less often {TAKEN}", after - before, "points", at_least=30)
    named = ((None, {}), ("blue square", {}), ("a blue square right on white background", STRONG))
    for words, how in named:
        found = pictures_of(pipe, PROMPT, words, count, **how)
        case = f"'{PROMPT}', {f'negative {words!r} {how or str()}' if words else 'no negative'}"
        gone = sum(
            not any((t.shape, t.color) == ("square", "blue") for t in r.found.things) for r in found
        )
        out.add(case, "no blue square", 100 * gone / count, "%")
        alone = sum(len(r.found.things) == 1 for r in found)
        first = sum(
            any((t.shape, t.color) == ("circle", "red") for t in r.found.things) for r in found
        )
        out.add(case, "one object alone", 100 * alone / count, "%")
        out.add(case, "first object right", 100 * first / count, "%")
    cost(pipe, away, out)


def pictures_of(
    pipe: Pipeline, prompt: str, away: str | None, count: int, **strength
) -> list[scenes.Report]:
    how = None
    if away is not None:
        how = Controls(negative=Negative(pipe.text.encode([away]), **strength))
    field = velocity(pipe.model, pipe.text.encode([prompt]), controls=how)
    sigmas, found = schedule.sigmas(8, width=SIDE, height=SIDE), []
    for seed in range(0, count, 20):
        x = latents.noise(seed, width=SIDE, height=SIDE, batch=min(20, count - seed))
        made = nano.pictures(pipe.vae.decode(denoise(field, x, sigmas)))
        found += [scenes.check(picture, prompt) for picture in made]
    return found


def cost(pipe: Pipeline, away: str, out: report.Report) -> None:
    """Of one forward, in this process' own time: others on the machine do not count."""
    times: dict[str, list[float]] = {"stock": [], "negative": []}
    text, x = pipe.text.encode([FREE]), latents.noise(0, width=256, height=256)
    how = Controls(negative=Negative(pipe.text.encode([away])))
    for _ in range(12):
        for name, steer in (("stock", None), ("negative", how)):
            begun = time.process_time()
            pipe.model(x, torch.tensor([0.5]), text, controls=steer)
            times[name].append(time.process_time() - begun)
    ratio = report.ratio(times["negative"], times["stock"])
    out.add("negative, one forward at 256 x 256", "time over stock", ratio, "ratio", at_most=1.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--sheet", type=Path, help="a PNG of steps x guidance")
    options = parser.parse_args()
    out, pipe = report.Report("flex", options), Pipeline.load("nano")
    parts = options.parts.split(",")
    if "solvers" in parts:
        solvers(pipe, min(options.cases, 12), out)
    if "enlarge" in parts:
        drafts(pipe, options.cases, out)
    if "caching" in parts:
        for case, metric, value, unit, bounds in step_cache.measure(pipe, 2 * options.cases, (8,)):
            out.add(case, metric, value, unit, **bounds)
    if "negatives" in parts:
        negatives(pipe, options.cases, out)
    if options.sheet:
        contact(pipe, PROMPT, 3).save(options.sheet)
    out.finish()


if __name__ == "__main__":
    main()
