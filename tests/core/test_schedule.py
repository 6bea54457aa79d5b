"""The noise schedule against published values and against diffusers' own."""

import numpy as np
import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.schedule import mu, share, shift, sigmas

# (picture tokens, steps): mu, of the reference implementation; any count above the token limit
MU = {
    (4096, 4): 2.29118,
    (4096, 8): 2.26789,
    (4096, 20): 2.19802,
    (4096, 28): 2.15140,
    (4096, 50): 2.02335,
    (1024, 4): 2.0307,
    (16384, 4): 3.22999,
    (16384, 50): 3.22999,
    (4300, 4): 2.3085,
    (4301, 4): 1.1847,
}
SIGMAS = {1024: (1, 0.96738, 0.90814, 0.76720, 0), 512: (1, 0.95809, 0.88398, 0.71750, 0)}
# fal's eight-step list before the shift, and after it at 1024 x 1024
TURBO = (
    (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031, 0),
    (1.0, 0.94739, 0.88248, 0.80027, 0.69282, 0.54619, 0.33467, 0.00299, 0),
)
CASES = [
    (1024, 1024, 4), (1024, 1024, 8), (1024, 1024, 28), (1024, 1024, 50), (512, 512, 4),
    (768, 1360, 20), (2048, 2048, 4), (2048, 2048, 50), (128, 128, 8), (64, 256, 12),
    (1040, 1056, 4), (1040, 1072, 4), (1024, 1024, 1), (16, 16, 200),
]  # fmt: skip


@pytest.mark.parametrize("case", MU, ids=str)
def test_mu(case):
    assert mu(*case) == pytest.approx(
        MU[case], abs=5e-5
    )  # 4.3e-5: 28 steps are given to four places


@pytest.mark.parametrize("side", SIGMAS)
def test_four_steps(side):
    wanted = torch.tensor(SIGMAS[side])
    assert (sigmas(4, width=side, height=side) - wanted).abs().max() < 6e-6  # 4.7e-6


def test_shift_of_a_list():
    before, after = (torch.tensor(values, dtype=torch.float64) for values in TURBO)
    assert (shift(before, mu(4096, 8)) - after).abs().max() < 6e-6  # 4.4e-6


@pytest.mark.parametrize(("width", "height", "steps"), CASES)
def test_like_diffusers(width, height, steps):
    pytest.importorskip("diffusers", reason="pip install diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(
        sigmas=np.linspace(1, 1 / steps, steps),
        mu=compute_empirical_mu(width * height // 256, steps),
    )
    ours = sigmas(steps, width=width, height=height)
    assert (ours - scheduler.sigmas).abs().max() < 2e-7  # 1.2e-7, two roundings


@pytest.mark.parametrize(("width", "height", "steps"), CASES)
def test_falls_from_one_to_zero(width, height, steps):
    s = sigmas(steps, width=width, height=height)
    assert s.dtype == torch.float32 and s.shape == (steps + 1,)
    assert s[0] == 1 and s[-1] == 0 and (s.diff() < 0).all()


def test_no_steps():
    with pytest.raises(Flux2Error, match=r"at least one step. Seen: 0 steps"):
        sigmas(0, width=64, height=64)


def test_share_of_a_run():
    run = sigmas(4, width=512, height=512)
    assert [share(run, s) for s in run[:-1].tolist()] == [0, 0.25, 0.5, 0.75]
    between = [(a + b) / 2 for a, b in zip(run.tolist(), run[1:].tolist(), strict=False)]
    assert [share(run, s) for s in between] == [0, 0.25, 0.5, 0.75]
    assert share(run, 1.1) == 0
    part = run[2:]  # a run that begins later counts its own steps
    assert [share(part, s) for s in part[:-1].tolist()] == [0, 0.5]
