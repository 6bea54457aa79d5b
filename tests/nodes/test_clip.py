"""Our CLIP object, and the prompt node."""

import logging

import pytest
import torch

from flux2_pack.flux2_core import configs
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.tokenizer import nano_tokenizer
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
TEXT = "a red circle left on white background"


@pytest.fixture(scope="module")
def clip(host):
    return toy.clip()


@pytest.fixture(scope="module")
def core():
    net = TextEncoder(configs.NANO_TEXT)
    net.load_state_dict(toy.text_state())
    return net.eval()


def want(core, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return core(*nano_tokenizer().encode(text))


@pytest.mark.parametrize("node", ["CLIPTextEncode", "Flux2KitPrompt"])
def test_rows(host, clip, core, node):
    """The same rows as the core's, 32 of them, and no pooled text."""
    ((rows, options),) = host.call(node, clip=clip, text=TEXT)[0]
    assert rows.shape == (1, 32, 384) and rows.dtype == torch.float32
    assert toy.difference(rows, want(core, TEXT)) < 1e-5  # observed 0
    assert options["pooled_output"] is None


def test_words_make_a_difference(host, clip):
    rows = [host.call("CLIPTextEncode", clip=clip, text=t)[0][0][0] for t in ("red", "blue")]
    assert toy.difference(*rows) > 0.1


def test_weights_are_plain_text(host, clip):
    """(word:1.2) is not a weight here: the model never learned weights."""
    tokens = clip.tokenize("(red:1.5)")["flux2kit"][0]
    assert {weight for _, weight in tokens} == {0.0, 1.0}


def test_clone_and_word_ids(clip):
    copy = clip.clone()
    assert copy.tokenizer is clip.tokenizer and copy.patcher is not clip.patcher
    assert copy.patcher.model is clip.patcher.model
    assert len(clip.tokenize("red", return_word_ids=True)["flux2kit"][0][0]) == 3


def test_names(host, clip, core):
    pictures = toy.images(1, (64, 64), (64, 64))
    (chain,) = host.call("Flux2KitReference", image=pictures[0], name="ball")
    (chain,) = host.call("Flux2KitReference", image=pictures[1], name="@tile", references=chain)
    ((rows, _),) = host.call("Flux2KitPrompt", clip=clip, text="the @tile", references=chain)[0]
    assert toy.difference(rows, want(core, "the image 2")) < 1e-5  # observed 0
    with pytest.raises(Flux2Error, match=r"No reference is called @bike"):
        host.call("Flux2KitPrompt", clip=clip, text="@bike", references=chain)


def test_warnings(host, clip, caplog):
    caplog.set_level(logging.WARNING)
    (chain,) = host.call("Flux2KitReference", image=toy.images(1, (64, 64))[0])
    host.call("Flux2KitPrompt", clip=clip, text="image 3 " + "red " * 40, references=chain)
    assert "The prompt speaks of image 3, but 1 reference is connected." in caplog.text
    assert "The prompt has 43 tokens, the model reads 32: its end is cut off." in caplog.text


def test_every_attribute_of_the_hosts_own(host, clip):
    """The host's constructor is skipped: its clone() lists what a CLIP must have."""
    import inspect

    source = inspect.getsource(type(clip).clone)
    names = {
        line.split("=")[0].strip()[2:]
        for line in source.splitlines()
        if "n." in line and "=" in line
    }
    names = {name for name in names if name.isidentifier()}
    assert len(names) >= 6 and names <= vars(clip).keys()


def test_lazy_weights(host):
    """As in test_model.py: no weight is touched before the file's arrives."""
    memory = pytest.importorskip("comfy.memory_management", reason="needs ComfyUI 0.16 or newer")
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no lazy weights")
    from flux2_pack.nodes.host_text import Encoder

    memory.aimdo_enabled = True
    try:
        encoder = Encoder(configs.NANO_TEXT, torch.float32)
        assert encoder.flux2.model.layers[0].mlp.up_proj.weight is None
        state = {f"flux2.{name}": tensor for name, tensor in toy.text_state().items()}
        encoder.load_state_dict(state, assign=True)
    finally:
        memory.aimdo_enabled = False
    ids, mask = nano_tokenizer().encode(TEXT)
    with torch.inference_mode():
        assert torch.equal(encoder.flux2(ids, mask), toy.clip().cond_stage_model.flux2(ids, mask))
