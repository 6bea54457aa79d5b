"""Pictures of any size: continued by reflection, and cut back to the very same pixels."""

import pytest
import torch

from flux2_pack.flux2_core import sizes


@pytest.mark.parametrize(
    "width, height", [(70, 100), (17, 16), (16, 33), (5, 3), (1, 1), (2, 40), (2048, 31)]
)
def test_cut_undoes_pad(width, height):
    images = torch.rand(2, height, width, 3)
    padded = sizes.pad(images)
    assert not padded.shape[1] % 16 and not padded.shape[2] % 16
    assert padded.shape[1] - height < 16 and padded.shape[2] - width < 16
    assert torch.equal(sizes.cut(padded, (width, height)), images)


def test_a_size_that_fits_is_the_same_tensor():
    images = torch.rand(1, 32, 48, 3)
    assert sizes.pad(images) is images


def test_reflection():
    """What comes after the edge is what came before it."""
    images = torch.rand(1, 18, 20, 1)
    padded = sizes.pad(images)
    assert torch.equal(padded[:, :18, 20:], images[:, :, 7:19].flip(2))
    assert sizes.mirrored(3, 9).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]


def test_a_resized_picture_is_not_cut():
    images = torch.rand(1, 128, 96, 3)
    assert sizes.cut(images, (70, 100)) is images


def test_warnings():
    assert not sizes.too_large(2048, 2048) and not sizes.too_large(4000, 1040)
    assert "4000 pixels a side" in sizes.too_large(4016, 1024)
    assert "4 megapixels" in sizes.too_large(2560, 2048)
