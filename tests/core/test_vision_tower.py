"""Mistral-3's vision tower against transformers' with the same weights, and its view of a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.vision_tower import (
    LONGEST_SIDE,
    MOST_PIXELS,
    Vision,
    VisionConfig,
    detect_vision,
    pixels_of,
    place_of,
    shown_size,
)
from flux2_pack.tests.core import toy_language

transformers = pytest.importorskip("transformers", reason="pip install transformers")

CONFIG = VisionConfig(128, 80, 3, 2, text_size=64)


@pytest.fixture(scope="module")
def pair():
    model = toy_language.mistral()
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    vision = Vision(CONFIG).eval().requires_grad_(False)
    vision.load_state_dict({name: state[name] for name in vision.state_dict()})
    return vision, model


def picture(seed: int, width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(56, 28), (28, 84), (56, 140)])
def test_words_equal_transformers(pair, size):
    vision, model = pair
    pixels = pixels_of(picture(1, *size), CONFIG.cell)
    (expected,) = model.model.get_image_features(
        pixels, torch.tensor([pixels.shape[-2:]]), output_attentions=False
    )
    found = vision(pixels)
    assert found.shape == (size[0] * size[1] // 28**2, 64)
    assert (found - expected).abs().max() / expected.std() < 1e-5  # observed 2.1e-6 at most


@pytest.mark.parametrize("size", [(100, 70), (28, 300), (57, 57)])
def test_pixels_equal_transformers(size):
    """As its processor makes them of a picture that need not shrink."""
    processor = transformers.PixtralImageProcessor(
        size={"longest_edge": LONGEST_SIDE}, patch_size={"height": 28, "width": 28}
    )
    shown = picture(2, *size)
    (expected,) = processor(shown, return_tensors="pt")["pixel_values"]
    found = pixels_of(shown, 28)[0]
    assert found.shape == expected.shape and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((1, 1), (28, 28)),
        ((768, 768), (784, 784)),
        ((4096, 4096), (784, 784)),
        ((1536, 384), (1540, 392)),
        ((100_000, 20), (1540, 28)),
        ((2000, 1000), (1092, 560)),
    ],
)
def test_a_picture_is_shown_in_whole_cells_and_bounded(size, shown):
    found = shown_size(*size, 28)
    assert found == shown
    assert all(side % 28 == 0 and side < LONGEST_SIDE + 28 for side in found)
    assert (found[0] - 27) * (found[1] - 27) <= MOST_PIXELS


def test_a_picture_stands_in_the_text_row_by_row():
    row = "[IMG][IMG][IMG]"
    assert place_of(torch.zeros(1, 3, 56, 84), 28) == f"{row}[IMG_BREAK]{row}[IMG_END]"
    assert place_of(torch.zeros(1, 3, 28, 28), 28) == "[IMG][IMG_END]"


def test_transparent_and_gray_pictures_are_seen():
    for mode in ("L", "RGBA", "P"):
        assert pixels_of(picture(1, 30, 30).convert(mode), 28).shape == (1, 3, 56, 56)


def test_the_released_tower_is_known_by_its_shapes():
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in Vision(VisionConfig()).state_dict().items()}
    assert detect_vision(shapes, 1e-5) == VisionConfig()
    with pytest.raises(Flux2Error, match="vision tower"):
        detect_vision({"vision_tower.patch_conv.weight": (1, 3, 14, 14)}, 1e-5)
