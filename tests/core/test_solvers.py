"""Solvers: orders on an ODE with a known solution, runs in parts, their noise, what is stock."""

import math
from itertools import pairwise

import pytest
import torch

from flux2_pack.flux2_core import latents, schedule
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.sampling import advance, denoise
from flux2_pack.flux2_core.solvers import SOLVERS, draw, get_solver

MEAN, WIDTH = 0.7, 0.5  # of the Gaussian whose flow is known
SLOPES = {  # between so many steps: asked, and observed
    "euler": (256, 1024, 0.95),  # 1.00
    "heun": (256, 1024, 1.9),  # 2.00
    "dpmpp_2m": (256, 1024, 1.75),  # 1.82: both ends of a run are infinite in its own time
    "unipc": (32, 128, 2.9),  # 3.26, falling to 3
    "sde": (256, 1024, 0.95),  # 1.00, at eta 0
}
SIGMAS = schedule.sigmas(6, width=64, height=48)
SEEDS = (7, 8)


def gaussian(x, sigma):
    """The velocity whose flow carries N(0, 1) at sigma 1 to N(MEAN, WIDTH^2)."""
    variance = (1 - sigma) ** 2 * WIDTH**2 + sigma**2
    off = (x - (1 - sigma) * MEAN) / variance
    return sigma * off - (MEAN + (1 - sigma) * WIDTH**2 * off)


def end(name, x, sigmas, eta=0.0, noise=None):
    history = ()
    for now, after in pairwise(sigmas):
        x, history = SOLVERS[name].step(gaussian, x, now, after, history, noise, eta)
    return x


def error(name, steps):
    """RMS distance in float64 from the exact end of the flow, MEAN + WIDTH x."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return float((end(name, x, sigmas) - MEAN - WIDTH * x).square().mean().sqrt())


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name):
    few, many, least = SLOPES[name]
    slope = math.log(error(name, few) / error(name, many)) / math.log(many / few)
    assert slope > least, f"{name}: {slope:.2f}"
    assert slope < SOLVERS[name].order + 0.5


def field(x, t):
    """A velocity that is neither linear nor the same for all pictures."""
    sigma = t.view(-1, 1, 1, 1)
    return torch.tanh(x * (2 - sigma)) - sigma * torch.roll(x, 1, -1) ** 2 / 3


def start(batch=2):
    return latents.noise(SEEDS[0], width=64, height=48, batch=batch)


def noise_of(seeds, like):
    return lambda step: draw(seeds, step, like)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_run_in_parts_is_the_whole_run(name, cut):
    x, noise = start(), noise_of(SEEDS, start())
    whole = denoise(field, x, SIGMAS, solver=name, noise=noise)
    first = advance(field, x, SIGMAS, name, 0, cut, noise=noise)
    rest = denoise(
        field, first.x, SIGMAS, solver=name, start=cut, history=first.history, noise=noise
    )
    assert torch.equal(whole, rest)


def test_the_history_matters():
    """The test above can fail: without it, solvers that remember draw something else."""
    for name in ("dpmpp_2m", "unipc"):
        first = advance(field, start(), SIGMAS, name, 0, 3)
        with_it = denoise(field, first.x, SIGMAS, solver=name, start=3, history=first.history)
        without = denoise(field, first.x, SIGMAS, solver=name, start=3)
        assert not torch.equal(with_it, without), name


def test_euler_is_the_sum_that_it_always_was():
    x = start()
    for now, after in pairwise(SIGMAS.tolist()):
        x = x + (after - now) * field(x, torch.full((2,), now))
    assert torch.equal(denoise(field, start(), SIGMAS), x)


def test_eta_0_is_euler_and_needs_no_noise():
    stock = denoise(field, start(), SIGMAS)
    assert torch.equal(denoise(field, start(), SIGMAS, solver="sde", eta=0.0), stock)
    noisy = denoise(field, start(), SIGMAS, solver="sde", noise=noise_of(SEEDS, start()))
    assert not torch.equal(noisy, stock)


def test_noise_of_a_batch_is_its_pictures_noise():
    both = denoise(field, start(), SIGMAS, solver="sde", noise=noise_of(SEEDS, start()))
    for i, seed in enumerate(SEEDS):
        alone = start()[i : i + 1]
        single = denoise(field, alone, SIGMAS, solver="sde", noise=noise_of([seed], alone))
        assert torch.equal(single[0], both[i])


def test_noise_differs_by_seed_and_step_and_from_the_start_noise():
    like = start(1)
    draws = [draw([seed], step, like) for seed in (0, 1) for step in (0, 1, -1)]
    draws.append(latents.noise(0, width=64, height=48))
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float((a * b).mean())) < 0.1  # observed at most 0.05: 1536 numbers
    with pytest.raises(Flux2Error, match="a seed of its own"):
        draw([1, 2], 0, like)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_keeps_the_distribution(eta):
    """A Gaussian target, many steps: mean and width are right whatever part of the noise is new."""
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    x = end("sde", noise(), torch.linspace(1, 0, 401, dtype=torch.float64).tolist(), eta, noise)
    assert abs(float(x.mean()) - MEAN) < 0.02  # observed 0.008
    assert abs(float(x.std()) / WIDTH - 1) < 0.03  # observed 0.007


def test_calls_of_the_model():
    for name, solver in SOLVERS.items():
        calls = []
        denoise(
            lambda x, t, c=calls: c.append(float(t[0])) or x, start(), SIGMAS, solver=name, eta=0
        )
        assert len(calls) == (solver.calls * 6) - (solver.calls - 1), name
        assert min(calls) > 0  # nothing is asked at sigma 0, where nothing is left to see


def test_estimates_are_shown_once_a_step():
    seen = []
    denoise(field, start(), SIGMAS, solver="heun", on_step=lambda *values: seen.append(values))
    assert [(step, steps) for step, steps, _ in seen] == [(i, 6) for i in range(6)]
    assert torch.equal(seen[0][2], start() - field(start(), torch.ones(2)))


def test_the_pipeline_takes_a_solver():
    pipe = Pipeline.load("nano")
    prompt, how = "a red circle left on white background", {"steps": 3, "seed": 4}
    drawn = {name: pipe.sample(prompt, solver=name, **how) for name in SOLVERS}
    assert torch.equal(drawn["euler"], pipe.sample(prompt, **how))
    assert torch.equal(drawn["sde"], pipe.sample(prompt, solver="sde", **how))
    assert torch.equal(drawn["euler"], pipe.sample(prompt, solver="sde", eta=0.0, **how))
    for name in ("heun", "unipc", "sde"):
        assert not torch.equal(drawn[name], drawn["euler"]), name


def test_equal_sigmas_are_steps_of_no_length():
    doubled = torch.tensor([1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.0])
    once = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    for name in SOLVERS:
        x = denoise(field, start(), doubled, solver=name, eta=0.0)
        assert float((x - denoise(field, start(), once, solver=name, eta=0.0)).abs().max()) < 0.5


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"solver": "magic"}, "no such solver"),
        ({"solver": "sde"}, "draws noise at every step"),
        ({"start": 4, "stop": 2}, "not part of the run"),
        ({"stop": 7}, "not part of the run"),
    ],
)
def test_refusals(how, sentence):
    with pytest.raises(Flux2Error, match=sentence):
        denoise(field, start(), SIGMAS, **how)
    assert get_solver("heun").calls == 2
