"""Redrawing a part: the window, what is held at every step, and the way back."""

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.inpaint import extend, held, latent_mask, prepare, stitch, window
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.tests.core.test_edit_lock import photo


def masked(height=300, width=420, box=(140, 90, 200, 150)):
    mask = torch.zeros(1, height, width)
    left, top, right, bottom = box
    mask[:, top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("megapixels", [0.0, 0.05])
def test_outside_the_mask_the_picture_keeps_its_bytes(whole, megapixels):
    picture, mask = photo(300, 420)[None], masked()
    work = prepare(picture, mask, megapixels=megapixels, whole=whole)
    assert work.pictures.shape[1] % 16 == 0
    assert work.pictures.shape[2] % 16 == 0
    drawn = torch.rand(work.pictures.shape, generator=torch.Generator().manual_seed(0))
    out = stitch(drawn, work.place)
    assert out.shape == picture.shape
    assert torch.equal(out[0][mask[0] == 0], picture[0][mask[0] == 0])
    assert not torch.equal(out[0][mask[0] == 1], picture[0][mask[0] == 1])


def test_an_unchanged_window_comes_back_unchanged():
    picture, mask = photo(300, 420)[None], masked()
    work = prepare(picture, mask)
    assert (stitch(work.pictures, work.place) - picture).abs().max() < 1e-5  # seen 3e-7


def test_a_tint_of_what_was_drawn_is_matched_before_it_is_put_back():
    """An autoencoder's or a model's shift in colour does not show as a patch."""
    picture, mask = photo(300, 420)[None], masked()
    work = prepare(picture, mask)
    tinted = work.pictures * torch.tensor([0.9, 1.0, 0.95]) + 0.03
    assert (stitch(tinted, work.place) - picture).abs().max() < 0.01  # seen 2e-3
    assert (stitch(tinted, work.place, "off") - picture).abs().mean() < 0.02


def test_the_window_has_room_around_and_whole_patches():
    left, top, right, bottom = window(masked(), 0.5)
    assert left <= 140 - 29
    assert top <= 90 - 29
    assert right >= 200 + 29
    assert bottom >= 150 + 29
    assert (right - left) % 16 == 0
    assert (bottom - top) % 16 == 0


def test_a_window_at_the_picture_s_edge_stays_inside():
    left, top, right, bottom = window(masked(box=(0, 250, 60, 300)), 0.5)
    assert (left, bottom) == (0, 300)
    assert (right - left) % 16 == 0
    assert (bottom - top) % 16 == 0


def test_soft_masks_stay_soft():
    picture, mask = photo(300, 420)[None], masked() * 0.5
    work = prepare(picture, mask)
    out = stitch(torch.zeros_like(work.pictures), work.place, "off")
    inside = (mask[0] > 0)[..., None].expand(-1, -1, 3)
    halved = picture[0][inside] / 2
    assert (out[0][inside] - halved).abs().mean() < 0.1


def test_every_masked_pixel_may_change():
    mask = torch.zeros(1, 64, 64)
    mask[0, 17, 40] = 0.7
    patches = latent_mask(mask)
    assert patches.shape == (1, 1, 4, 4)
    assert patches[0, 0, 1, 2] == pytest.approx(0.7)
    assert int((patches > 0).sum()) == 1


def test_what_is_not_masked_returns_exactly():
    """Held at every step's noise level, seen by the model there, and back at the end."""
    made = torch.Generator().manual_seed(0)
    latent, noise = (torch.randn(2, 128, 4, 6, generator=made) for _ in range(2))
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, 1:3, 2:4] = 1
    seen = []

    def velocity(x, t):
        at = t[:, None, None, None]
        known = (1 - at) * latent + at * noise
        seen.append(float(((x - known) * (1 - mask)).abs().max()))
        return torch.full_like(x, 3.0)

    sigmas = torch.linspace(1, 0, 9)
    out = denoise(held(velocity, latent, noise, mask), noise, sigmas)
    still = (mask == 0).expand_as(latent)
    assert max(seen) < 1e-6  # the model sees the picture at the step's own noise
    assert (out[still] - latent[still]).abs().max() < 3e-6  # seen 1e-6
    assert (out[~still] - (noise[~still] - 3)).abs().max() < 1e-5


def test_a_full_mask_is_the_stock_run_bit_for_bit():
    made = torch.Generator().manual_seed(0)
    latent, noise = (torch.randn(1, 128, 4, 4, generator=made) for _ in range(2))
    field = lambda x, t: x * 0.5  # noqa: E731
    sigmas = torch.linspace(1, 0, 5)
    mask = torch.ones(1, 1, 4, 4)
    assert torch.equal(
        denoise(held(field, latent, noise, mask), noise, sigmas), denoise(field, noise, sigmas)
    )


def test_a_canvas_keeps_the_original_inside():
    picture = photo(64, 80)[None]
    canvas, mask = extend(picture, left=16, bottom=32)
    assert canvas.shape == (1, 96, 96, 3)
    assert torch.equal(canvas[:, :64, 16:], picture)
    assert int((mask == 0).sum()) == 64 * 80


def test_sentences():
    picture = photo(64, 64)[None]
    with pytest.raises(Flux2Error, match="mask is empty"):
        prepare(picture, torch.zeros(1, 64, 64))
    with pytest.raises(Flux2Error, match="do not belong"):
        prepare(picture, torch.ones(2, 64, 64))
    with pytest.raises(Flux2Error, match="at least one side"):
        extend(picture)
