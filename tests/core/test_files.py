"""Files that are broken, dangerous or of another kind: each gives one plain sentence."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.checkpoint import load_autoencoder, load_transformer
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.files import MAX_HEADER, Entry, open_checkpoint, read_header


def good(folder, names=("a", "b"), name="model.safetensors"):
    path = folder / name
    save_file({n: torch.arange(6.0).reshape(2, 3) for n in names}, path, {"who": "me"})
    return path


def craft(folder, header, data=b"", length=None):
    """A file of this header (a table, or bytes as they are) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refusal(path, load=load_transformer, **kw) -> str:
    with pytest.raises(Flux2Error) as error:
        load(path, **kw)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


# --- the header ---


def test_header_of_a_good_file(tmp_path):
    header = read_header(good(tmp_path))
    assert header.tensors == {"a": Entry("F32", (2, 3)), "b": Entry("F32", (2, 3))}
    assert header.metadata == {"who": "me"}


def test_tensors_of_a_good_file(tmp_path):
    loaded = open_checkpoint(good(tmp_path)).load({"x": "b"})
    assert loaded.keys() == {"x"} and torch.equal(loaded["x"], torch.arange(6.0).reshape(2, 3))


def test_no_file(tmp_path):
    assert "There is no such file" in refusal(tmp_path / "gone.safetensors")


def test_empty_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    assert "model.safetensors is empty" in refusal(path)


@pytest.mark.parametrize("missing", [1, 5, 24, 60])
def test_truncated_file(tmp_path, missing):
    path = good(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-missing])
    text = refusal(path)
    assert "cut short" in text or "damaged" in text
    assert ("of 48 bytes" in text) == (missing < 48)
    assert "Download it again" in text


def test_every_truncation_is_refused(tmp_path):
    path = good(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refusal(path, read_header)


def test_trailing_bytes(tmp_path):
    path = good(tmp_path)
    path.write_bytes(path.read_bytes() + b"12345")
    assert "5 bytes too many at its end" in refusal(path)


def test_random_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 8, 9, 100, 10_000):
        path.write_bytes(bytes(torch.randint(0, 256, (size,), generator=generator).tolist()))
        assert "is not a safetensors file, or damaged" in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 10**6, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_header_lengths_that_cannot_be(tmp_path, length):
    assert "is not a safetensors file" in refusal(craft(tmp_path, {"a": entry()}, b"1234", length))


HEADERS = {
    "no table": b"[1, 2]  ",
    "no json": b"{abcdefg",
    "no text": b"{\xff\xfe\xfd\xfc}}",
    "nested": b'{"a":' + b"[" * 100_000,
    "a number": {"a": 3},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "unknown dtype": {"a": entry("F31")},
    "dtype is a list": {"a": entry(["F32"])},
    "negative shape": {"a": entry(shape=(-1, -1))},
    "shape of words": {"a": entry(shape=("1",))},
    "shape of fractions": {"a": entry(shape=(1.0,))},
    "shape is a number": {"a": entry() | {"shape": 1}},
    "true": {"a": entry(shape=(True,))},
    "three offsets": {"a": entry(offsets=(0, 4, 4))},
    "backwards": {"a": entry(offsets=(4, 0))},
    "too few bytes": {"a": entry(shape=(2,))},
    "huge shape": {"a": entry(shape=(2**40, 2**40))},
    "a digit too many": b'{"a":{"dtype":"F32","shape":['
    + b"9" * 5000
    + b'],"data_offsets":[0,4]}}',
    "a gap": {"a": entry(), "b": entry(offsets=(8, 12))},
    "overlap": {"a": entry(), "b": entry(offsets=(0, 4))},
    "no tensors": {"__metadata__": {"a": "b"}},
    "metadata is a list": {"__metadata__": ["a"], "a": entry()},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path, case):
    text = refusal(craft(tmp_path, HEADERS[case], b"1234"))
    assert "model.safetensors is damaged" in text or "is not a safetensors file" in text


# --- dangerous and misnamed files ---


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PTH"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"img_in.weight": torch.ones(2)}, path)
    for load in (load_transformer, load_autoencoder):
        assert "not opened: they can run any program on your computer" in refusal(path, load)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"GGUF\3\0\0\0" + bytes(40), "a GGUF file"),
        (b"PK\3\4" + bytes(range(50, 99)), "a pickle file, which can run programs"),
        (b"<!doctype html><title>Log in</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a placeholder that git left"),
    ],
)
def test_other_files_called_safetensors(tmp_path, start, what):
    path = tmp_path / "model.safetensors"
    path.write_bytes(start)
    assert what in refusal(path)


# --- folders and shards ---


def shards(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards(tmp_path):
    good(tmp_path, ["a"], "one.safetensors")
    good(tmp_path, ["b"], "two.safetensors")
    index = shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    for path in (index, tmp_path):
        assert open_checkpoint(path).load({"a": "a", "b": "b"}).keys() == {"a", "b"}


@pytest.mark.parametrize(
    "outside",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "sub/x.safetensors",
    ],
)
def test_shards_outside_the_folder(tmp_path, outside):
    (tmp_path / "in").mkdir()
    good(tmp_path, ["a"], "x.safetensors")
    assert "points out of its own folder" in refusal(shards(tmp_path / "in", {"a": outside}))


@pytest.mark.parametrize("name", ["..", "", "gone.safetensors"])
def test_shards_that_are_no_files(tmp_path, name):
    assert "There is no such file" in refusal(shards(tmp_path, {"a": name}))


def test_a_pickled_shard(tmp_path):
    assert "can run any program" in refusal(shards(tmp_path, {"a": "x.bin"}))


def test_a_shard_that_lacks_a_tensor(tmp_path):
    good(tmp_path, ["a"], "one.safetensors")
    index = shards(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    assert "1 tensors it lists are in no shard, b the first" in refusal(index)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}'],
)
def test_an_index_that_is_none(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert "it is no list of shards" in refusal(index)


def test_a_folder_without_one_model(tmp_path):
    assert "no .safetensors file" in refusal(tmp_path)
    good(tmp_path, name="one.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]
    good(tmp_path, name="two.safetensors")
    assert "one.safetensors, two.safetensors" in refusal(tmp_path)
    good(tmp_path, ["stock"], name="diffusion_pytorch_model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["stock"]


# --- other models ---

STRANGERS = [
    ("a LoRA", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"),
    ("a LoRA", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
    ("a LoRA", "lycoris_double_blocks_0_img_attn_qkv.lokr_w1"),
    ("a LoRA", "transformer_blocks.0.attn.to_q.hada_w1_a"),
    ("a ControlNet", "control_transformer_blocks.0.attn.to_q.weight"),
    ("a FLUX.1 model", "double_blocks.0.img_mod.lin.weight"),
    ("a FLUX.1 model", "single_transformer_blocks.0.norm.linear.weight"),
    ("a Stable Diffusion or SDXL model", "model.diffusion_model.input_blocks.0.0.weight"),
    ("a Stable Diffusion or SDXL model", "down_blocks.0.resnets.0.time_emb_proj.weight"),
    ("a Stable Diffusion 3 model", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    ("a model of another family", "noise_refiner.0.attention.qkv.weight"),
    ("a VAE", "decoder.conv_in.weight"),
    ("a text encoder", "model.layers.0.mlp.gate_proj.weight"),
    ("a CLIP or T5 text encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ("a tiny autoencoder", "decoder.layers.0.weight"),
    ("2 tensors, img_in.weight the first", "some.thing"),
]


@pytest.mark.parametrize(("what", "name"), STRANGERS)
def test_strangers(tmp_path, what, name):
    text = refusal(good(tmp_path, ["img_in.weight", name]))
    assert text.startswith(f"model.safetensors is not a FLUX.2 transformer. Seen: {what}")
    assert "diffusion_models folder" in text


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["double_stream_modulation_img.lin.weight"], "a FLUX.2 transformer"),
        (["model.layers.0.mlp.gate_proj.weight"], "a text encoder"),
        (["lora_unet_x.lora_up.weight"], "a LoRA"),
    ],
)
def test_strangers_as_vae(tmp_path, names, what):
    text = refusal(good(tmp_path, names), load_autoencoder)
    assert text.startswith(f"model.safetensors is not a FLUX.2 VAE. Seen: {what}")


def test_another_model_s_vae(tmp_path):
    names = ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"]
    assert "This is not a FLUX.2 VAE" in refusal(good(tmp_path, names), load_autoencoder)
