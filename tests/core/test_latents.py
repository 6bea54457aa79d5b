"""Packing, tokens, noise and sizes of the 128-channel latent."""

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.latents import check_size, grid, noise, pack, tokens, unpack

SHAPES = [(1, 32, 2, 2), (2, 32, 6, 10), (3, 32, 14, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_is_the_inverse_of_pack(shape):
    z = torch.randn(shape)
    b, _, h, w = shape
    assert pack(z).shape == (b, 128, h // 2, w // 2)
    assert torch.equal(unpack(pack(z)), z)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_is_torch_s_pixel_unshuffle(shape):
    z = torch.randn(shape)
    assert torch.equal(pack(z), torch.nn.functional.pixel_unshuffle(z, 2))
    c, i, j = 5, 1, 0
    assert torch.equal(pack(z)[:, 4 * c + 2 * i + j], z[:, c, i::2, j::2])


def test_grid_is_the_inverse_of_tokens():
    x = torch.randn(2, 128, 3, 5)
    assert torch.equal(grid(tokens(x), 3, 5), x)
    assert torch.equal(tokens(x)[1, 5 * 2 + 4], x[1, :, 2, 4])


def test_noise_of_a_batch_is_its_pictures_one_by_one():
    batch = noise(7, width=96, height=64, batch=3)
    assert batch.shape == (3, 128, 4, 6) and batch.dtype == torch.float32
    for i in range(3):
        assert torch.equal(batch[i : i + 1], noise(7 + i, width=96, height=64))
    assert not torch.equal(batch[0], batch[1])
    assert batch.std().item() == pytest.approx(1, abs=0.05)  # 0.997


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    noise(0, width=16, height=16)
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((100, 64), "96 x 64"),
        ((0, 32), "16 x 32"),
        ((64, -16), "64 x 16"),
        ((1023, 1025), "1024 x 1024"),
    ],
)
def test_sizes_that_do_not_fit(size, nearest):
    with pytest.raises(Flux2Error, match=f"multiples of 16.*{nearest}"):
        check_size(*size)


def test_sizes_that_fit():
    check_size(16, 16)
    check_size(4096, 144)
