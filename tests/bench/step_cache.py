"""What step caching costs nano in right answers, and what it saves: the same pictures, drawn one by
one, without and with it.

A saved pass is a whole one: where the first block ran, only the share of the others counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import nano

from flux2_pack.flux2_core import latents, schedule
from flux2_pack.flux2_core.guidance import Steer, velocity
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.step_cache import StepCache
from flux2_pack.flux2_core.stream import Controls

SIDE = 128
STEPS = (8, 20)  # nano's own number, and one like base models'
SAVED, LOST = 30.0, 2.0  # per cent of the passes at least, points of right pictures at most


@dataclass
class Seen:
    """Of the pictures drawn with a cache. right and plain: right ones with it and without."""

    pictures: int = 0
    right: int = 0
    plain: int = 0
    skipped: int = 0  # blocks
    blocks: int = 0
    error: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)  # finished latents, ||a - b|| / ||b||


def measure(pipe: Pipeline, cases: int = 200, steps=STEPS, threshold: float | None = None) -> list:
    """Rows (case, metric, value, unit, bounds) over nano's five sets, `cases` of each; `bounds` are
    Report.add's. threshold None: the default."""
    rows = []
    for n in steps:
        cache = StepCache() if threshold is None else StepCache(threshold)
        seen = pooled(pipe, cases, n, cache)
        about = f"step cache, threshold {cache.threshold:g}, {n} steps, {seen.pictures} pictures"
        saved, lost = 100 * seen.skipped / seen.blocks, 100 * (seen.plain - seen.right)
        rows += [
            (about, "passes saved", saved, "%", {"at_least": SAVED}),
            (about, "all right without", 100 * seen.plain / seen.pictures, "%", {}),
            (about, "all right", 100 * seen.right / seen.pictures, "%", {}),
            (about, "points lost", lost / seen.pictures, "points", {"at_most": LOST}),
            (about, "measured error, mean", 100 * mean(seen.error), "%", {}),
            (about, "latents' difference, mean", 100 * mean(seen.apart), "%", {}),
            (about, "latents' difference, most", 100 * max(seen.apart), "%", {}),
        ]
    return rows


@torch.inference_mode()
def pooled(pipe: Pipeline, cases: int, steps: int, cache: StepCache) -> Seen:
    seen = Seen()
    sigmas = schedule.sigmas(steps, width=SIDE, height=SIDE)

    def steered(sigma: float) -> Controls:
        cache.step, cache.steps = round(schedule.share(sigmas, sigma) * steps), steps
        return Controls(steps=cache)

    for kind in nano.POOLED:
        for i, case in enumerate(nano.cases(kind, cases)):
            context, references = encoded(pipe, case)

            def draw(controls: Steer | None, c=context, r=references, seed=i) -> torch.Tensor:
                v = velocity(pipe.model, c, references=r, controls=controls)
                return denoise(v, latents.noise(seed, width=SIDE, height=SIDE), sigmas)

            cache.begin(object())
            plain, made = draw(None), draw(steered)
            seen.pictures += 1
            seen.plain += right(pipe, plain, case)
            seen.right += right(pipe, made, case)
            seen.skipped += cache.statistics.skipped_blocks
            seen.blocks += cache.statistics.all_blocks
            seen.error += cache.statistics.error
            seen.apart.append(float((made - plain).norm() / plain.norm()))
    return seen


def encoded(pipe: Pipeline, case: nano.Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Prompt and reference latents."""
    drawn: Iterator = (scenes.draw(scene, *case.reference_size) for scene in case.references)
    return pipe.text.encode([case.prompt]), [pipe.vae.encode(nano.tensor([p])) for p in drawn]


def right(pipe: Pipeline, x: torch.Tensor, case: nano.Case) -> bool:
    (picture,) = nano.pictures(pipe.vae.decode(x))
    return scenes.check(picture, case.wanted).ok


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
