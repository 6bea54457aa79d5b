"""Noise: whiteness, seeds, sizes, variations; and what a draft's finish begins with."""

import pytest
import torch

from flux2_pack.flux2_core import enlarge, latents, schedule
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.noise import between, composed
from flux2_pack.flux2_core.pipeline import Pipeline

SIZES = [(128, 128), (256, 256), (512, 512), (768, 1024), (1024, 1024), (240, 400)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_composed_noise_is_white_and_standard_normal(width, height):
    x = composed(3, width=width, height=height).double()
    n = x.numel()
    assert x.shape == (1, 128, height // 16, width // 16)
    assert abs(float(x.mean())) < 4 / n**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    for shifts in ((0, 1), (1, 0), (1, 1), (2, 0)):  # neighbours know nothing of each other
        moved = torch.roll(x, shifts, (2, 3))
        assert abs(float((x * moved).mean())) < 4 / n**0.5


def coarse(x: torch.Tensor, waves: int = 3) -> torch.Tensor:
    """The coefficients of up to `waves` waves across the picture."""
    index = torch.arange(-waves, waves + 1)
    rows, columns = index % x.shape[2], index % x.shape[3]
    return torch.fft.fft2(x.double(), norm="ortho")[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_coarse_part_is_the_same_at_every_size(width, height):
    draft = coarse(composed(5, width=128, height=128))
    assert (coarse(composed(5, width=width, height=height)) - draft).abs().max() < 1e-5
    other = coarse(composed(6, width=width, height=height))
    assert (other - draft).abs().max() > 1


def test_the_rest_is_not():
    small, large = (composed(5, width=side, height=side) for side in (512, 1024))
    assert (small - large[:, :, :32, :32]).abs().mean() > 0.5


@pytest.mark.parametrize("make", [latents.noise, composed])
def test_a_batch_is_its_pictures_one_by_one(make):
    batch = make(7, width=256, height=128, batch=3)
    for i in range(3):
        assert torch.equal(batch[i : i + 1], make(7 + i, width=256, height=128))


def test_seeds_differ_and_repeat():
    one, two = (composed(seed, width=256, height=256) for seed in (1, 2))
    assert torch.equal(one, composed(1, width=256, height=256))
    assert abs(float((one * two).mean())) < 0.05


def test_variation_between_two_seeds():
    one, two = (latents.noise(seed, width=256, height=256, batch=2) for seed in (1, 10))
    assert torch.equal(between(one, two, 0.0), one)
    assert torch.equal(between(one, two, 1.0), two)
    middle = between(one, two, 0.5)
    assert abs(float(middle.std()) - 1) < 0.02  # a plain mean has 0.71
    near = between(one, two, 0.1)
    assert (near - one).norm() < 0.25 * (two - one).norm()
    assert torch.allclose(between(one, one, 0.3), one)
    with pytest.raises(Flux2Error, match="between two seeds"):
        between(one, two, 1.5)


def test_pictures_of_a_batch_are_its_single_runs():
    """Not only the noise: the finished latents too."""
    from flux2_pack.flux2_core.guidance import velocity
    from flux2_pack.flux2_core.sampling import denoise

    pipe = Pipeline.load("nano")
    with torch.inference_mode():
        text = pipe.text.encode(["a red circle left on white background"])
        field = velocity(pipe.model, text)
        sigmas = schedule.sigmas(4, width=128, height=128)
        batch = denoise(field, latents.noise(3, width=128, height=128, batch=3), sigmas)
        for i in range(3):
            alone = denoise(field, latents.noise(3 + i, width=128, height=128), sigmas)
            assert (batch[i : i + 1] - alone).abs().max() < 1e-4  # seen 3e-6


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("change", [0.0, 0.3, 0.6, 1.0])
def test_where_a_finish_begins(change, scale):
    """Averaged over the draft's cells the noise is as strong, beside the picture, as asked."""
    start = enlarge.start_of(change, scale)
    if 0 < change < 1:
        ratio = (start / scale) / (1 - start)
        assert ratio == pytest.approx(change / (1 - change))
    if scale == 1 or change in (0, 1):
        assert start == pytest.approx(change)


def test_sigmas_of_a_finish():
    got = enlarge.sigmas(5, 0.6, width=1024, height=1024)
    assert len(got) == 6 and got[-1] == 0
    assert float(got[0]) == pytest.approx(0.6, abs=1e-6)
    assert bool((got.diff() < 0).all())
    whole = enlarge.sigmas(8, 1.0, width=1024, height=1024)
    assert torch.allclose(whole, schedule.sigmas(8, width=1024, height=1024), atol=1e-6)
    assert len(enlarge.sigmas(4, 0.0, width=256, height=256)) == 0
