"""What a file's header tells."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.checkpoint import NANO_FILES
from flux2_pack.flux2_core.configs import KLEIN_4B, VARIANTS
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.info import describe
from flux2_pack.flux2_core.keymaps import TRANSFORMER, to_diffusers
from flux2_pack.flux2_core.quantised import BLOCK_LINEARS
from flux2_pack.flux2_core.transformer import Flux2Transformer
from flux2_pack.tests.core.toys import KLEIN, toy


def sparse(path, config, dtype="BF16", size=2, **metadata):
    """A file of a released model's shapes whose data is a hole."""
    with torch.device("meta"):
        shapes = {k: list(v.shape) for k, v in Flux2Transformer(config).state_dict().items()}
    table, at = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        count = size
        for n in shape:
            count *= n
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    raw = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return path


def test_a_released_model(tmp_path):
    said = str(describe(sparse(tmp_path / "flux-2-klein-base-4b.safetensors", KLEIN_4B)))
    assert "FLUX.2 klein base 4B, told by its name; FLUX.2 klein 4B has the same shapes" in said
    assert "3.88 billion parameters, 7.75 GB" in said
    assert "Layout: Black Forest Labs." in said and "Qwen3 4B (klein 4B)" in said
    assert "Precision of double blocks: bf16." in said


def test_metadata_tells_more_than_a_name(tmp_path):
    kit = json.dumps({"variant": "klein-base-4b"})
    info = describe(sparse(tmp_path / "renamed.safetensors", KLEIN_4B, flux2_kit=kit))
    assert info.variant == VARIANTS["klein-base-4b"] and "by its metadata" in str(info)


def test_dev_has_no_double(tmp_path):
    path = sparse(tmp_path / "flux2-dev.safetensors", VARIANTS["dev"].transformer)
    info = describe(path)  # 64 GB, of which only the header exists
    assert "FLUX.2 dev, told by its shapes" in str(info) and info.bytes > 64e9


@pytest.mark.parametrize(
    "form, word",
    [
        ("float8_e4m3fn", "fp8 with scales"),
        ("nvfp4", "NVFP4"),
        ("mxfp8", "MXFP8"),
        ("int8_tensorwise", "INT8"),
    ],
)
def test_precision_of_each_group(tmp_path, form, word):
    state = {}
    for name, tensor in toy(KLEIN).state_dict().items():
        layer = name.removesuffix("weight")
        if BLOCK_LINEARS.fullmatch(layer.rstrip(".")) and "single" in name:
            state |= {layer + k: v for k, v in encode(tensor, form).parts.items()}
        else:
            state[name] = tensor.bfloat16()
    save_file(state, tmp_path / "a.safetensors")
    said = str(describe(tmp_path / "a.safetensors"))
    assert f"Precision of single blocks: {word}." in said
    assert "Precision of double blocks: bf16." in said and "Precision of the rest: bf16." in said


def test_diffusers_layout_and_prefixes(tmp_path):
    state = toy(KLEIN).state_dict()
    theirs = {k: v.contiguous() for k, v in to_diffusers(state, TRANSFORMER).items()}
    save_file(theirs, tmp_path / "a.safetensors")
    assert "Layout: diffusers." in str(describe(tmp_path / "a.safetensors"))
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "b.safetensors"
    )
    said = str(describe(tmp_path / "b.safetensors"))
    assert "Layout: Black Forest Labs, under model.diffusion_model.." in said


def test_the_other_kinds(tmp_path):
    assert describe(NANO_FILES["text_encoder"]).kind == "text encoder"
    assert "FLUX.2's VAE" in str(describe(NANO_FILES["vae"]))
    save_file({"img_in.lora_A.weight": torch.ones(2, 128)}, tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors").kind == "LoRA"
    assert "nano" in str(describe(NANO_FILES["transformer"]))


def test_what_is_nothing_of_flux2s(tmp_path):
    save_file({"joint_blocks.0.x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(Flux2Error, match="Stable Diffusion 3"):
        describe(tmp_path / "a.safetensors")
