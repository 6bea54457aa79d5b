"""What a file's header tells."""

import json
import re
import struct
import time

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.checkpoint import NANO_FILES
from flux2_pack.flux2_core.configs import KLEIN_4B, VARIANTS
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.info import describe, verdict
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
    assert "Precision of double blocks, attention: bf16." in said


def test_metadata_tells_more_than_a_name(tmp_path):
    kit = json.dumps({"variant": "klein-base-4b"})
    info = describe(sparse(tmp_path / "renamed.safetensors", KLEIN_4B, flux2_kit=kit))
    assert info.variant == VARIANTS["klein-base-4b"] and "by its metadata" in str(info)


def test_dev_has_no_double(tmp_path):
    path = sparse(tmp_path / "flux2-dev.safetensors", VARIANTS["dev"].transformer)
    describe(path)  # 64 GB, of which only the header exists; imports are done from here on
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        info = describe(path)
        taken.append(time.perf_counter() - begun)
    assert min(taken) < 0.1  # seconds; seen 0.054 on a busy machine
    assert "FLUX.2 dev, told by its shapes" in str(info) and info.bytes > 64e9


def test_the_verdict_in_a_sentence(tmp_path):
    path = sparse(tmp_path / "flux-2-klein-4b.safetensors", KLEIN_4B)
    others = "FLUX.2 klein base 4B has the same shapes."
    assert verdict(path) == f"{path.name} is FLUX.2 klein 4B, told by its name; {others}"
    chosen = verdict(path, "klein-base-4b")
    assert "is FLUX.2 klein base 4B, as you chose; FLUX.2 klein 4B has" in chosen
    with pytest.raises(Flux2Error, match=r"This file is not FLUX\.2 dev"):
        verdict(path, "dev")


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
    assert "Precision of double blocks, attention: bf16." in said
    assert "Precision of double blocks, MLP: bf16." in said
    assert "Precision of the rest: bf16." in said


def test_diffusers_layout_and_prefixes(tmp_path):
    state = toy(KLEIN).state_dict()
    theirs = {k: v.contiguous() for k, v in to_diffusers(state, TRANSFORMER).items()}
    save_file(theirs, tmp_path / "a.safetensors")
    assert "Layout: diffusers." in str(describe(tmp_path / "a.safetensors"))
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "b.safetensors"
    )
    said = str(describe(tmp_path / "b.safetensors"))
    assert "Layout: Black Forest Labs, under model.diffusion_model." in said


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


def test_dev_in_mixed_precision(tmp_path):
    """As the released fp8mixed file: attention of the double blocks in bf16, their MLP in fp8."""
    state = {}
    for name, tensor in toy(KLEIN).state_dict().items():
        layer = name.removesuffix("weight")
        if re.match(r"double_blocks\..*mlp|single_blocks\..*linear", name):
            state |= {layer + k: v for k, v in encode(tensor, "float8_e4m3fn").parts.items()}
        else:
            state[name] = tensor.bfloat16()
    save_file(state, tmp_path / "a.safetensors")
    said = str(describe(tmp_path / "a.safetensors"))
    assert "Precision of double blocks, attention: bf16." in said
    assert "Precision of double blocks, MLP: fp8 with scales." in said


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    for name, tensor in toy(KLEIN).state_dict().items():
        block = BLOCK_LINEARS.fullmatch(name.removesuffix(".weight"))
        form = gguf.GGMLQuantizationType["Q8_0" if block else "F32"]
        codes = gguf.quants.quantize(tensor.float().numpy(), form)
        writer.add_tensor(name, codes, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = describe(tmp_path / "a.gguf")
    assert "Precision of single blocks: GGUF Q8_0." in str(info)
    assert "Precision of the rest: GGUF F32." in str(info)
    assert info.bytes == sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors)


def test_shards(tmp_path):
    state = toy(KLEIN).state_dict()
    halves = list(state)[::2], list(state)[1::2]
    index = {}
    for i, names in enumerate(halves):
        save_file({n: state[n] for n in names}, tmp_path / f"part-{i}.safetensors")
        index |= dict.fromkeys(names, f"part-{i}.safetensors")
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    for given in (path, tmp_path):
        info = describe(given)
        assert info.bytes == sum(t.numel() * t.element_size() for t in state.values())
