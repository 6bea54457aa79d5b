"""Quantised files: exact in their codes, read by others' readers, never over another file."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open

from flux2_pack.flux2_core.checkpoint import load_transformer
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import Packed, encode
from flux2_pack.flux2_core.info import describe
from flux2_pack.flux2_core.quantised import ALIASES, BLOCK_LINEARS, QuantLinear
from flux2_pack.flux2_core.save import save_quantized
from flux2_pack.tests.core.toys import KLEIN, toy

LINEAR = "double_blocks.0.img_attn.qkv.weight"
FORMS = ["fp8", "fp8_rows", "int8", "nvfp4", "mxfp8"]


@pytest.fixture(scope="module")
def state():
    return {name: tensor.bfloat16() for name, tensor in toy(KLEIN).state_dict().items()}


def saved(state, path, form="fp8", **about):
    return save_quantized({k: partial(state.get, k) for k in state}, path, form, about)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_has_the_codes_that_were_written(tmp_path, state, form):
    model = load_transformer(saved(state, tmp_path / "a.safetensors", form))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    blocks = {n.removesuffix(".weight") for n in state if n.endswith(".weight")}
    assert layers.keys() == {n for n in blocks if BLOCK_LINEARS.fullmatch(n)}
    for name, layer in layers.items():
        weight = state[f"{name}.weight"].float()
        if form == "fp8":
            scale = weight.abs().max() / 448
            parts = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        else:
            parts = encode(weight, ALIASES.get(form.removesuffix("_rows"), form)).parts
        for part, wanted in parts.items():
            found = getattr(layer, part)
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            assert torch.equal(
                found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
            )
    plain = model.state_dict()
    assert all(
        torch.equal(plain[n], t) for n, t in state.items() if n in plain and "blocks" not in n
    )


def test_another_reader_finds_both_declarations(tmp_path, state):
    kit = json.dumps({"variant": "klein-base-4b"})
    with safe_open(saved(state, tmp_path / "a.safetensors", flux2_kit=kit), "pt") as file:
        said = json.loads(file.metadata()["_quantization_metadata"])
        note = json.loads(bytes(file.get_tensor(LINEAR.replace("weight", "comfy_quant")).tolist()))
        assert file.metadata()["flux2_kit"] == kit
        assert file.get_tensor(LINEAR.replace("weight", "weight_scale")).shape == ()
    assert said["format_version"] == "1.0"
    assert said["layers"][LINEAR.removesuffix(".weight")] == note == {"format": "float8_e4m3fn"}


def test_weights_are_asked_for_one_at_a_time(tmp_path, state):
    """Only one weight is alive at any moment: a large model is never in memory twice."""
    alive, most = 0, 0

    class Counted:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def get(name):
        tensor = state[name].clone()
        tensor.counted = Counted()
        return tensor

    save_quantized({k: partial(get, k) for k in state}, tmp_path / "a.safetensors", "int8")
    assert most <= 2  # the one being made, and the one just written


def test_codes_stay_where_the_scales_are_those_asked_for(tmp_path, state):
    packed = {
        n: encode(t, "float8_e4m3fn") if BLOCK_LINEARS.fullmatch(n.removesuffix(".weight")) else t
        for n, t in state.items()
    }
    for form, scales in (("fp8_rows", state[LINEAR].shape[0]), ("fp8", 1)):
        model = load_transformer(saved(packed, tmp_path / f"{form}.safetensors", form))
        layer = model.get_submodule(LINEAR.removesuffix(".weight"))
        same = torch.equal(layer.weight.float(), packed[LINEAR].parts["weight"].float())
        assert layer.weight_scale.numel() == scales and same == (form == "fp8_rows")


def test_a_straight_cast_gets_the_scale_one(tmp_path, state):
    codes = state[LINEAR].to(torch.float8_e4m3fn)
    cast = Packed("float8_e4m3fn", tuple(codes.shape), {"weight": codes})
    layer = load_transformer(saved(dict(state, **{LINEAR: cast}), tmp_path / "a.safetensors"))
    layer = layer.get_submodule(LINEAR.removesuffix(".weight"))
    assert layer.weight_scale == 1 and torch.equal(layer.weight.float(), codes.float())


def test_refusals_leave_nothing_behind(tmp_path, state):
    path = saved(state, tmp_path / "a.safetensors")
    with pytest.raises(Flux2Error, match="A file of this name exists"):
        saved(state, path)
    with pytest.raises(Flux2Error, match="not written here"):
        saved(state, tmp_path / "b.safetensors", "gguf Q8_0")

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(Flux2Error, match="No space left on device"):
        save_quantized({**{k: partial(state.get, k) for k in state}, LINEAR: full}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == [path]


def test_info_of_a_saved_file(tmp_path, state):
    said = str(describe(saved(state, tmp_path / "a.safetensors", "fp8")))
    assert "Precision of double blocks, MLP: fp8 with scales." in said
