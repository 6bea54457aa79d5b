"""Blocks that pass through two buffers give what the whole model gives."""

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.checkpoint import load_transformer
from flux2_pack.flux2_core.kv_cache import ReferenceCache
from flux2_pack.flux2_core.quantised import quantize
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.streaming import ALIGN, stream
from flux2_pack.tests.core.toys import DEV, KLEIN, inputs, toy


@pytest.mark.parametrize("form", ["", "fp8", "nvfp4"])
@pytest.mark.parametrize("config", [KLEIN, DEV], ids=["klein", "dev"])
def test_bit_for_bit(config, form):
    """Twice, so that the second forward begins with the buffers that the first one left."""
    whole, streamed = toy(config), toy(config)
    if form:
        quantize(whole, form)
        quantize(streamed, form)
    stream(streamed, "cpu")
    i = inputs(2, batch=2, guidance=4.0 if config is DEV else None)
    for _ in range(2):
        assert torch.equal(streamed(**i), whole(**i))


def test_with_a_reference_cache():
    whole, streamed = toy(KLEIN), stream(toy(KLEIN), "cpu")
    i, controls = inputs(2), Controls(True, cache=ReferenceCache())
    for _ in range(2):
        assert torch.equal(streamed(**i, controls=controls), whole(**i, controls=Controls(True)))


def test_two_buffers_of_the_largest_block():
    model = toy(KLEIN)
    sizes = [
        sum(-(-p.numel() * 4 // ALIGN) * ALIGN for p in block.parameters())
        for block in (*model.double_blocks, *model.single_blocks)
    ]
    buffers = stream(model, "cpu").double_blocks[0].shelf
    assert [len(memory) for memory in buffers.memory] == [max(sizes)] * 2


def test_names_stay_the_checkpoints(tmp_path):
    model, state = toy(KLEIN), toy(KLEIN).state_dict()
    streamed = stream(model, "cpu").state_dict()
    assert streamed.keys() == state.keys()
    assert all(torch.equal(streamed[k], state[k]) for k in state)


def test_weights_stay_mapped(tmp_path):
    """Blocks are read from the file's own pages, block by block."""
    save_file(toy(KLEIN).state_dict(), tmp_path / "a.safetensors")
    model = load_transformer(tmp_path / "a.safetensors")
    before = model.single_blocks[0].linear1.weight.data_ptr()
    streamed = stream(model, "cpu").to(torch.float32)
    assert streamed.single_blocks[0].shelf.tensors[2]["linear1.weight"].data_ptr() == before
    whole = load_transformer(tmp_path / "a.safetensors")
    assert torch.equal(streamed(**inputs(1)), whole(**inputs(1)))
