"""The example pictures of the shipped workflows, read back by nano's checker."""

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.references import to_pil

pytestmark = pytest.mark.host


def picture(host, text, size=128):
    node = host.mappings["Flux2KitExamplePicture"]
    return node.execute(text, size).result[0]


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(
    "text",
    [
        "a red circle left on white background",
        "a black cross top on pink background",
        "a cyan ring left and an orange triangle right on tan background",
        "a small blue square top on gray background",
        "a red letter k left on white background",
        'the word "cat" in blue center on tan background',
        "three green crosses on pink background",
    ],
)
def test_what_the_text_says(host, text, size):
    image = picture(host, text, size)
    assert image.shape == (1, size, size, 3) and image.dtype == torch.float32
    assert scenes.check(to_pil(image[0]), text).ok


@pytest.mark.parametrize(
    "text, drawn",
    [
        ("a shape", "a red circle center on white background"),
        ("a blue square on gray background", "a blue square center on gray background"),
        ("a ring and a shape", "a red ring left and a red circle right on white background"),
    ],
)
def test_what_the_text_leaves_open(host, text, drawn):
    assert scenes.check(to_pil(picture(host, text)[0]), drawn).ok


def test_the_picture_is_shown_in_the_node(host):
    node = {"class_type": "Flux2KitExamplePicture", "inputs": {"text": "a red ring", "size": 64}}
    result = host.run({"1": node}, {"image": ("1", 0)})
    assert [shown["type"] for shown in result.outputs["1"]["images"]] == ["temp"]


@pytest.mark.parametrize(
    "text", ["a cat on a sofa", "image 1 with a blue shape", "a red circle on sofa"]
)
def test_text_that_is_not_about_shapes(host, text):
    with pytest.raises(Flux2Error, match="cannot read this") as error:
        picture(host, text)
    assert text in str(error.value) and "Load Image" in str(error.value)
