"""Windows: they cover, they blend to one picture, and one window is the model itself."""

from itertools import pairwise

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt
from flux2_pack.flux2_core.windows import Windowed, blend, weight, windows
from flux2_pack.tests.core.toys import KLEIN, toy


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (5, 33), (128, 96)])
@pytest.mark.parametrize(("side", "overlap"), [(16, 4), (12, 0), (9, 8)])
def test_windows_cover_and_overlap(height, width, side, overlap):
    every = windows(height, width, side, overlap)
    count = torch.zeros(height, width)
    for window in every:
        assert window.top + window.height <= height
        assert window.left + window.width <= width
        window.cut(count).add_(1)
    assert bool((count > 0).all())
    tops = sorted({w.top for w in every})
    assert all(b - a <= side - overlap for a, b in pairwise(tops))


def test_what_all_windows_agree_on_is_kept():
    """A field that is the same seen from everywhere comes back as it is."""
    x = torch.randn(1, 8, 20, 28, generator=torch.Generator().manual_seed(0))
    for side, overlap in ((8, 3), (12, 6), (16, 0)):
        out = blend(x, windows(20, 28, side, overlap), overlap, lambda w: w.cut(x))
        assert (out - x).abs().max() < 1e-6  # seen 4.8e-7


def test_weights_fall_towards_neighbours_only():
    first, last = windows(8, 24, 16, 8)
    left, right = weight(first, 8), weight(last, 8)
    assert bool((left[:, :8] == 1).all())
    assert bool((left[0].diff()[8:] < 0).all())
    assert torch.equal(left.flip(1), right)


def model():
    return toy(KLEIN)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(4, 6), (6, 6)])
def test_one_window_is_the_model_itself_bit_for_bit(size):
    net, t = model(), torch.tensor([0.5])
    x, text = noise(1, 128, *size), noise(1, 5, KLEIN.context_dim, seed=1)
    with torch.inference_mode():
        assert torch.equal(Windowed(net, side=6, overlap=2)(x, t, text), net(x, t, text))


def test_each_window_stands_at_its_place_in_the_whole():
    """Positions are the whole picture's: a window is not the picture's corner."""
    net, t = model(), torch.tensor([0.5])
    text = noise(1, 5, KLEIN.context_dim, seed=1)
    x = noise(1, 128, 6, 4).repeat(1, 1, 1, 3)  # the same content thrice
    with torch.inference_mode():
        corner = net(x[..., :4], t, text)
        moved = net(x[..., 4:8], t, text, controls=Controls(origin=(0, 4)))
        out = Windowed(net, side=6, overlap=0)(x, t, text)
    assert not torch.allclose(corner, moved, atol=1e-4)
    assert out.shape == x.shape
    with torch.inference_mode():
        left = net(x[..., :6], t, text)
    assert torch.equal(out[..., :6], left)


def test_regions_are_cut_with_the_window():
    """What a window sees of a region is what lies in it: one outside does nothing there."""
    net, t = model(), torch.tensor([0.5])
    x, text = noise(1, 128, 4, 12), noise(1, 5, KLEIN.context_dim, seed=1)
    region = torch.zeros(4, 12)
    region[:, 8:] = 1
    prompt = RegionPrompt(noise(1, 5, KLEIN.context_dim, seed=2), region)
    reference = noise(1, 128, 2, 2, seed=3)
    bound = ReferenceControl(region=region)
    with torch.inference_mode():
        net_in = Windowed(net, side=6, overlap=0)
        plain = net_in(x, t, text)
        bent = net_in(x, t, text, controls=Controls(regions=(prompt,)))
        tied = net_in(x, t, text, None, [reference], Controls(references=(bound,)))
    assert torch.allclose(plain[..., :6], bent[..., :6], atol=1e-5)  # seen 1e-6
    assert not torch.allclose(plain[..., 6:], bent[..., 6:], atol=1e-3)
    assert torch.allclose(plain[..., :6], tied[..., :6], atol=1e-5)
    assert not torch.allclose(plain[..., 6:], tied[..., 6:], atol=1e-3)


def test_impossible_windows_are_one_sentence():
    with pytest.raises(Flux2Error, match="larger than their overlap"):
        Windowed(model(), side=8, overlap=8)
