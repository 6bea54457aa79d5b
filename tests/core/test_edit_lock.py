"""Edits that stay put: colours, motion and the original's bytes outside the mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flux2_pack.flux2_core.color import ciede2000, lab
from flux2_pack.flux2_core.edit_lock import COLOR, lock, seam
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.quality import distance
from flux2_pack.flux2_core.registration import Motion, _warp, measure, undo

# Lab pairs and their CIEDE2000 as published by Sharma, Wu and Dalal (2005)
PUBLISHED = [
    ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
    ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
    ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0009), 7.1792),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0011), 7.2195),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0009, -2.4900), 4.8045),
    ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]

MOVED = Motion(3.4, -1.2, 1.004)


def photo(height: int = 384, width: int = 512, seed: int = 0) -> torch.Tensor:
    """Something with detail at every scale, (H, W, 3)."""
    made = torch.Generator().manual_seed(seed)
    out = torch.zeros(3, height, width)
    for k in (4, 8, 16, 32, 64, 128):
        noise = torch.randn(1, 3, height // k + 2, width // k + 2, generator=made)
        out += F.interpolate(noise, (height, width), mode="bicubic")[0] * (k / 128) ** 0.7
    return ((out - out.min()) / (out.max() - out.min())).movedim(0, -1)


def moved(picture: torch.Tensor, motion: Motion) -> torch.Tensor:
    inverse = Motion(-motion.dx / motion.scale, -motion.dy / motion.scale, 1 / motion.scale)
    return _warp(picture.movedim(-1, 0)[None], inverse, "bicubic")[0].movedim(0, -1)


def an_edit(picture, motion=MOVED):
    """Moved, off in colour, and with a red patch inside the mask."""
    tint = torch.tensor([[0.9, 0.06, 0.0], [0.02, 0.95, 0.02], [0.0, 0.05, 0.85]])
    edited = (moved(picture, motion) @ tint.T + torch.tensor([0.04, 0.02, -0.01])).clamp(0, 1)
    mask = torch.zeros(picture.shape[:2])
    mask[100:250, 120:300] = 1
    edited[110:240, 130:290] = torch.tensor([0.8, 0.1, 0.1])
    return edited, mask


@pytest.mark.parametrize(("one", "two", "wanted"), PUBLISHED)
def test_colour_difference_as_published(one, two, wanted):
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (one, two))
    assert ciede2000(a, b).item() == pytest.approx(wanted, abs=1e-4)  # seen 4.2e-5
    assert ciede2000(b, a).item() == pytest.approx(wanted, abs=1e-4)


def test_lab_of_white_and_red():
    assert lab(torch.ones(3)).tolist() == pytest.approx([100, 0, 0], abs=2e-3)  # seen 1e-4
    red = lab(torch.tensor([1.0, 0.0, 0.0])).tolist()
    assert red == pytest.approx([53.24, 80.09, 67.20], abs=0.02)


@pytest.mark.parametrize("known", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize(
    "motion",
    [Motion(3.4, 0.0), Motion(0.0, -3.4), Motion(-2.3, 1.7, 1.01), Motion(6.0, -9.0, 0.985)],
)
def test_a_motion_is_found_within_a_fifth_of_a_pixel(motion, known):
    """Through another colour, noise and an edited patch."""
    picture = photo()
    edited, mask = an_edit(picture, motion)
    noise = torch.randn(edited.shape, generator=torch.Generator().manual_seed(1))
    found = measure(edited + 0.01 * noise, picture, mask == 0 if known else None)
    assert found.measurable
    assert abs(found.dx - motion.dx) < 0.2  # seen 0.02
    assert abs(found.dy - motion.dy) < 0.2
    assert abs(found.scale - motion.scale) < 5e-4  # seen 6e-5


def test_a_motion_is_undone():
    picture = photo()
    back = undo(moved(picture, Motion(3.4, -1.2)), Motion(3.4, -1.2))
    inner = (slice(16, -16), slice(16, -16))
    before = distance(moved(picture, Motion(3.4, -1.2))[inner], picture[inner]).psnr
    assert distance(back[inner], picture[inner]).psnr > before + 20


def test_nothing_to_measure_on_a_plain_picture():
    assert not measure(torch.full((64, 64, 3), 0.5), torch.full((64, 64, 3), 0.5)).measurable


@pytest.mark.parametrize("given", [True, False], ids=["mask", "no mask"])
def test_a_lock_brings_everything_back(given):
    picture = photo()
    edited, mask = an_edit(picture)
    locked = lock(picture, edited, mask if given else None)
    assert locked.aligned
    assert locked.drift > 5
    assert locked.left < 2  # seen 0.07
    untouched = locked.alpha == 0
    assert torch.equal(locked.image[untouched], picture[untouched])
    assert untouched.float().mean() > 0.8
    red = locked.image[180, 210]
    assert red[0] > 0.6 > 0.4 > red[1]


def test_an_area_that_was_found_leaves_room_for_the_seam():
    """What changed shows whole: the seam lies around it, not in it."""
    picture = photo()
    edited = picture.clone()
    edited[110:240, 130:290] = torch.tensor([0.8, 0.1, 0.1])
    out = lock(picture, edited, align=False, color="off", feather=8)
    assert bool((out.alpha[112:238, 132:288] > 0.99).all())


def test_outside_the_mask_every_value_is_the_originals():
    picture = photo()
    edited, mask = an_edit(picture)
    for color in COLOR:
        for feather in (0.0, 8.0, 40.0):
            out = lock(picture, edited, mask, color=color, feather=feather)
            assert torch.equal(out.image[mask == 0], picture[mask == 0])


def test_each_part_can_be_off():
    picture = photo()
    edited, mask = an_edit(picture)
    off = lock(picture, edited, mask, align=False, color="off", restore=False)
    assert torch.equal(off.image, edited)
    assert not off.aligned
    only = lock(picture, edited, mask, align=False, color="off")
    assert torch.equal(only.image[170, 200], edited[170, 200])


def test_a_large_motion_is_reported_not_undone():
    picture = photo()
    edited, mask = an_edit(picture, Motion(24.0, 0.0))
    out = lock(picture, edited, mask, limit=16)
    assert not out.aligned
    assert "more than 16 px" in str(out)
    assert out.motion.dx == pytest.approx(24, abs=0.3)


def test_an_edit_of_another_size_is_scaled_and_said():
    picture = photo()
    edited, mask = an_edit(picture, Motion())
    small = F.interpolate(edited.movedim(-1, 0)[None], (192, 256), mode="area")[0].movedim(0, -1)
    out = lock(picture, small, mask)
    assert "scaled from 256 x 192" in str(out)
    assert torch.equal(out.image[mask == 0], picture[mask == 0])


def test_an_unknown_way_of_colour_is_one_sentence():
    with pytest.raises(Flux2Error, match="match colours"):
        lock(photo(64, 64), photo(64, 64), color="histogram")


def test_the_seam_lies_inside():
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    alpha = seam(mask, 6)
    assert bool((alpha[mask == 0] == 0).all())
    assert alpha[32, 32] == 1
    across = alpha[32, 16:32]
    assert bool((across.diff() >= 0).all())
    assert 0 < across[2] < 1
    assert torch.equal(seam(mask, 0), mask)


def test_ssim_and_colour_difference_are_those_of_scikit_image():
    """scikit-image 0.26: structural_similarity(gaussian_weights=True, use_sample_covariance=False)
    of the luma, and the mean of deltaE_ciede2000, on these very numbers."""
    made = np.random.default_rng(7)
    a = made.random((60, 80, 3))
    b = 0.8 * a + 0.2 * made.random((60, 80, 3))
    found = distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found.ssim == pytest.approx(0.9516883, abs=1e-5)  # seen 3e-9
    assert found.delta_e == pytest.approx(7.9081105, abs=1e-3)  # seen 1.8e-5


def test_distances_of_equal_and_of_shifted_pictures():
    picture = photo(96, 96)
    same = distance(picture, picture)
    assert same.psnr == float("inf")
    assert same.ssim == pytest.approx(1, abs=1e-5)
    assert same.delta_e == 0
    half = distance(picture, (picture + 0.1).clamp(0, 1))
    assert half.psnr == pytest.approx(20, abs=0.6)
    assert 0 < half.delta_e < half.delta_e_95
    with pytest.raises(Flux2Error, match="different sizes"):
        distance(picture, picture[:50])
