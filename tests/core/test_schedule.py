"""The noise schedule against published values and against diffusers' own."""

import numpy as np
import pytest
import torch

from flux2_pack.flux2_core.configs import VARIANTS
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.schedule import (
    SPACINGS,
    explicit,
    monotone,
    mu,
    numbers,
    preset,
    share,
    shift,
    sigmas,
)

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


STOCK = {case: sigmas(case[2], width=case[0], height=case[1]) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_defaults_are_the_reference_s_bit_for_bit(case):
    width, height, steps = case
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    wanted = shift(u, mu((height // 16) * (width // 16), steps)).float()
    flat = sigmas(steps, width=width, height=height, spacing="flux2", start=0.0, end=1.0)
    assert torch.equal(STOCK[case], wanted)
    assert torch.equal(flat, wanted)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 30, 200])
def test_every_spacing_falls_from_one_to_zero(spacing, steps):
    got = sigmas(steps, width=1024, height=1024, spacing=spacing)
    assert got.dtype == torch.float32 and len(got) == steps + 1
    assert got[0] == 1 and got[-1].abs() < 1e-7
    assert bool((got.diff() < 0).all())


def test_beta_is_its_quantile():
    scipy = pytest.importorskip("scipy.stats", reason="comes with ComfyUI")
    u = torch.linspace(1, 0, 41, dtype=torch.float64)
    wanted = torch.from_numpy(scipy.beta.ppf(u.numpy(), 0.6, 0.6))
    assert (SPACINGS["beta"].place(u, 40) - wanted).abs().max() < 1e-5  # seen 1.6e-6


def test_karras_by_its_formula():
    """The noise levels n = sigma / (1 - sigma) are evenly spaced in their seventh root."""
    got = sigmas(10, width=512, height=512, spacing="karras").double()[1:-1]
    low, high = 0.02 / 1.02, 80 / 81
    sigma = low + got * (high - low)
    root = (sigma / (1 - sigma)) ** (1 / 7)
    assert root.diff().std() < 1e-6


def test_a_drawn_curve():
    drawn = torch.tensor([1.0, 0.9, 0.2, 0.0])
    got = sigmas(3, width=512, height=512, curve=drawn, shift_by=0.0)
    assert torch.allclose(got, drawn)
    even = sigmas(9, width=512, height=512, curve=torch.tensor([0.0, 1.0]))  # rising is as good
    assert torch.allclose(even, sigmas(9, width=512, height=512), atol=1e-6)


def test_mu_can_be_set():
    got = sigmas(4, width=64, height=64, shift_by=mu(4096, 4))
    assert torch.equal(got, sigmas(4, width=1024, height=1024))


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.4, 1.0), (0.25, 0.75), (0.9, 1.0)])
def test_a_part_of_the_way_in_as_many_steps(start, end):
    got = sigmas(6, width=512, height=512, start=start, end=end)
    assert len(got) == 7 and bool((got.diff() < 0).all())
    assert (got[0] == 1) == (start == 0)
    assert (got[-1] == 0) == (end == 1)
    total = round(6 / (end - start))
    whole = sigmas(total, width=512, height=512)
    at = int((whole == got[0]).nonzero()[0])
    assert torch.equal(whole[at : at + 7], got)  # a part of a schedule, not another one


def test_two_parts_are_one_run():
    first = sigmas(5, width=512, height=512, end=0.5)
    second = sigmas(5, width=512, height=512, start=0.5)
    assert first[-1] == second[0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sigmas(4, width=64, height=64, start=0.6, end=0.4), "begin before it ends"),
        (lambda: sigmas(4, width=64, height=64, spacing="cubic"), "no such spacing"),
        (lambda: numbers("1 0.5 x", "The curve"), "no number"),
        (lambda: numbers("1", "The curve"), "at least 2 numbers"),
        (lambda: numbers("1 2", "The curve", low=0, high=1), "out of range"),
        (lambda: numbers("1 nan", "The curve"), "out of range"),
        (lambda: monotone([1.0, 0.5, 0.6, 0.0], "The curve"), "up and down"),
        (lambda: monotone([0.0, 0.0], "The curve"), "up and down"),
        (lambda: explicit([1.0, 0.5, 0.0], 4), "another length"),
        (lambda: explicit([1.0, 0.5, 0.5, 0.0]), "must fall"),
        (lambda: explicit([2.0, 0.0]), "must fall"),
    ],
)
def test_what_is_typed_wrong_is_one_sentence(call, said):
    with pytest.raises(Flux2Error, match=said):
        call()


def test_what_is_typed_right():
    assert numbers("1, 0.8;0.3\n0", "x") == [1, 0.8, 0.3, 0]
    assert torch.equal(explicit([1, 0.5, 0.0], 2), torch.tensor([1, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("name", "variant", "wanted"),
    [
        ("standard", "dev", (50, 0.0)),
        ("draft", "dev", (12, 0.0)),
        ("fine type", "dev", (50, 7.0)),
        ("art", "klein-base-4b", (30, 4.0)),
        ("fine type", "klein-4b", (4, 0.0)),  # distilled: its own
        ("draft", "klein-4b", (2, 0.0)),
    ],
)
def test_presets(name, variant, wanted):
    assert preset(name, VARIANTS[variant]) == wanted
