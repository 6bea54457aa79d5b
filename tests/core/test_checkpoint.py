"""Loading: layouts, prefixes, dtypes, laziness, variants. Broken and foreign files: test_files.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.checkpoint import (
    check_keys,
    choose_variant,
    load_autoencoder,
    load_transformer,
    locate,
    read_state_dict,
)
from flux2_pack.flux2_core.configs import VARIANTS, AutoEncoderConfig, TransformerConfig
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.keymaps import (
    AUTOENCODER,
    TRANSFORMER,
    to_diffusers,
)
from flux2_pack.flux2_core.transformer import Flux2Transformer

TOY = TransformerConfig(256, 96, 2, 3, guidance_embed=True)
TOY_VAE = AutoEncoderConfig(32, 32, latent_channels=32)
DECODER = AutoEncoderConfig(32, 16, latent_channels=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Flux2Transformer(TOY).requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return random_vae(TOY_VAE)


def random_vae(config):
    torch.manual_seed(1)
    vae = AutoEncoder(config).requires_grad_(False)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def save(folder, state, name="model.safetensors", **metadata):
    path = folder / name
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata or None)
    return path


def same(a, b) -> bool:
    """Equal state dicts: names, shapes and values."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- layouts ---


@pytest.mark.parametrize("shard", ["10GB", "10MB"])
def test_transformer_saved_by_diffusers(tmp_path, model, shard):
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    theirs = diffusers.Flux2Transformer2DModel(
        num_layers=2, num_single_layers=3, num_attention_heads=2, joint_attention_dim=96
    )
    theirs.load_state_dict(to_diffusers(model.state_dict(), TRANSFORMER))
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    index = list((tmp_path / "transformer").glob("*.index.json"))
    assert len(index) == (shard == "10MB")
    for path in (tmp_path, tmp_path / "transformer", *index):
        assert same(load_transformer(path).state_dict(), model.state_dict())


def test_vae_saved_by_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLFlux2(block_out_channels=(32, 64, 128, 128))
    theirs.bn.running_mean.normal_()
    theirs.save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(tmp_path)
    assert ours.config == TOY_VAE
    assert same(to_diffusers(ours.state_dict(), AUTOENCODER), theirs.state_dict())


PREFIXES = [
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "net.",
    "model.",
    "transformer.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_prefixes(tmp_path, model, prefix, layout):
    state = model.state_dict()
    state = to_diffusers(state, TRANSFORMER) if layout == "diffusers" else state
    path = save(tmp_path, {prefix + key: tensor for key, tensor in state.items()})
    assert same(load_transformer(path).state_dict(), model.state_dict())


def test_all_in_one(tmp_path, model, vae):
    """Each loader takes its part, whatever else is there."""
    path = save(
        tmp_path,
        {
            **{f"model.diffusion_model.{k}": t for k, t in model.state_dict().items()},
            **{f"vae.{k}": t for k, t in vae.state_dict().items()},
            "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.gate_proj.weight": torch.ones(
                2, 2
            ),
        },
    )
    assert same(load_transformer(path).state_dict(), model.state_dict())
    assert same(load_autoencoder(path).state_dict(), vae.state_dict())


def test_norms_that_a_newer_host_saved_as_weight(tmp_path, model):
    state = {key.replace("_norm.scale", "_norm.weight"): t for key, t in model.state_dict().items()}
    assert state.keys() != model.state_dict().keys()
    assert same(load_transformer(save(tmp_path, state)).state_dict(), model.state_dict())


def test_vae_with_its_outer_convolutions_at_the_top(tmp_path, vae):
    """As the host keeps and saves it."""
    state = {
        key.replace("encoder.quant_conv", "quant_conv").replace(
            "decoder.post_quant", "post_quant"
        ): t
        for key, t in vae.state_dict().items()
    }
    assert "quant_conv.weight" in state and "post_quant_conv.weight" in state
    assert same(load_autoencoder(save(tmp_path, state)).state_dict(), vae.state_dict())


def test_small_decoder(tmp_path, vae):
    """A whole file with a narrower decoder, and the decoder alone over another file's encoder."""
    small = random_vae(DECODER)
    whole = load_autoencoder(save(tmp_path, small.state_dict(), "whole.safetensors"))
    assert whole.config == DECODER
    assert same(whole.state_dict(), small.state_dict())

    bare = {k.removeprefix("decoder."): t for k, t in small.state_dict().items() if "decoder." in k}
    path, base = save(tmp_path, bare), save(tmp_path, vae.state_dict(), "base.safetensors")
    merged = load_autoencoder(path, base=base)
    assert same(merged.decoder.state_dict(), small.decoder.state_dict())
    assert same(merged.encoder.state_dict(), vae.encoder.state_dict())
    assert same(merged.bn.state_dict(), vae.bn.state_dict())
    with pytest.raises(Flux2Error, match="decoder alone"):
        load_autoencoder(path)


def test_vae_without_the_training_counter(tmp_path, vae):
    state = {key: t for key, t in vae.state_dict().items() if "num_batches" not in key}
    assert same(load_autoencoder(save(tmp_path, state)).state_dict(), vae.state_dict())


# --- dtypes and memory ---


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32])
def test_dtypes(tmp_path, model, stored, asked):
    state = {key: tensor.to(stored) for key, tensor in model.state_dict().items()}
    loaded = load_transformer(save(tmp_path, state), dtype=asked).state_dict()
    assert same(loaded, {key: tensor.to(asked or stored) for key, tensor in state.items()})


def test_statistics_stay_float32(tmp_path, vae):
    loaded = load_autoencoder(save(tmp_path, vae.state_dict()), dtype=torch.bfloat16)
    assert loaded.encoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.bn.running_var, vae.bn.running_var)


def test_a_file_of_several_dtypes_gets_the_most_common(tmp_path, model):
    state = {
        key: tensor.bfloat16() if tensor.ndim > 1 else tensor
        for key, tensor in model.state_dict().items()
    }
    loaded = load_transformer(save(tmp_path, state)).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}


def test_weights_are_mapped_not_copied(tmp_path, model):
    """Two loads of one file share the file's pages, so the bytes are in memory once, or not yet."""
    path = save(tmp_path, model.state_dict())
    mapped = mapped_bytes(path)
    loaded = load_transformer(path)
    assert mapped == 0 and mapped_bytes(path) >= path.stat().st_size
    inside = [inside_mapping(path, parameter) for parameter in loaded.parameters()]
    assert all(inside) and inside


def mappings(path):
    """(first, end) of every piece of memory that maps the file."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        pytest.skip("needs /proc to see what is mapped")
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [(int(first, 16), int(end, 16)) for first, end in spans]


def mapped_bytes(path):
    return sum(end - first for first, end in mappings(path))


def inside_mapping(path, tensor):
    return any(first <= tensor.data_ptr() < end for first, end in mappings(path))


def test_training_never_writes_to_the_file(tmp_path, model):
    path = save(tmp_path, model.state_dict())
    before = path.read_bytes()
    load_transformer(path).img_in.weight.data.zero_()
    assert path.read_bytes() == before
    assert same(load_transformer(path).state_dict(), model.state_dict())


def test_what_a_loader_returns(tmp_path, model):
    loaded = load_transformer(save(tmp_path, model.state_dict()))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config == TOY and loaded.variant.transformer == TOY


def test_read_state_dict(tmp_path, model):
    path = save(tmp_path, to_diffusers(model.state_dict(), TRANSFORMER), who="me")
    state, metadata, config = read_state_dict(path, "transformer")
    assert same(state, model.state_dict())
    assert metadata == {"who": "me"} and config == TOY


# --- keys ---


def test_missing_and_unknown_weights_are_named(tmp_path, model):
    state = model.state_dict()
    for key in [k for k in state if k.startswith("single_blocks.1.")]:
        del state[key]
    state["single_blocks.0.linear9.weight"] = torch.ones(2)
    state["single_blocks.1.x"] = torch.ones(2)
    state["img_in.bias"] = torch.ones(3)
    state["final_layer.linear.weight"] = torch.ones(128, 255)
    with pytest.raises(Flux2Error) as error:
        load_transformer(save(tmp_path, state))
    text = str(error.value)
    assert "4 missing: single_blocks.1.linear1.weight, single_blocks.1.linear2.weight, " in text
    assert "..." in text
    assert "3 unknown: " in text and "img_in.bias" in text and "linear9" in text
    assert "1 of a wrong shape: final_layer.linear.weight (128, 255) instead of (128, 256)" in text


def test_a_lonely_q_is_named(tmp_path, model):
    state = to_diffusers(model.state_dict(), TRANSFORMER)
    del state["transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(Flux2Error) as error:
        load_transformer(save(tmp_path, state))
    assert "1 missing: double_blocks.0.img_attn.qkv.weight" in str(error.value)
    assert "2 unknown: transformer_blocks.0.attn.to_q.weight" in str(error.value)


def test_check_keys_passes_what_fits(model):
    check_keys(model.state_dict(), model.state_dict(), "file")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("shape", [(), (3,), (0, 0), (256, 128, 2), (128, 128)])
@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_transformer, "img_in.weight"),
        (load_transformer, "txt_in.weight"),
        (load_autoencoder, "encoder.conv_in.weight"),
        (load_autoencoder, "encoder.quant_conv.weight"),
        (load_autoencoder, "decoder.conv_out.weight"),
        (load_autoencoder, "encoder.down.1.block.0.conv2.weight"),
    ],
)
def test_marks_of_absurd_shapes(tmp_path, model, vae, load, name, shape):
    state = (model if load is load_transformer else vae).state_dict() | {name: torch.zeros(shape)}
    with pytest.raises(Flux2Error):
        load(save(tmp_path, state))


# --- variants ---


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("flux-2-klein-4b.safetensors", "klein-4b"),
        ("flux-2-klein-base-4b.safetensors", "klein-base-4b"),
        ("flux-2-klein-9b.safetensors", "klein-9b"),
        ("flux-2-klein-base-9b-fp8.safetensors", "klein-base-9b"),
        ("flux-2-klein-9b-kv.safetensors", "klein-9b-kv"),
        ("FLUX.2-Klein-9B-KV/transformer/diffusion_pytorch_model.safetensors", "klein-9b-kv"),
        ("base/my-klein-9b/transformer", "klein-9b"),
        (
            "models--x--FLUX.2-klein-base-4B/snapshots/ab12/transformer/x.safetensors",
            "klein-base-4b",
        ),
        ("my_base_9b.safetensors", "klein-base-9b"),
        ("database-9b.safetensors", "klein-9b"),
        ("flux2-dev.safetensors", "dev"),
        ("anything-4b.safetensors", "klein-4b"),
    ],
)
def test_variant_from_the_name(path, wanted):
    size = next((s for s in ("4b", "9b") if s in path.lower()), None)
    config = VARIANTS[f"klein-{size}" if size else "dev"].transformer
    assert choose_variant(path, config, {}) is VARIANTS[wanted]


def test_variant_from_metadata_and_argument():
    config = VARIANTS["klein-9b"].transformer
    metadata = {"flux2_kit": json.dumps({"variant": "klein-base-9b"})}
    assert choose_variant("klein-9b-kv", config, metadata).name == "klein-base-9b"
    assert choose_variant("klein-9b-kv", config, metadata, "klein-9b").name == "klein-9b"
    for broken in ("{", "[]", '{"variant": 3}', "{}"):
        assert choose_variant("klein-9b-kv", config, {"flux2_kit": broken}).name == "klein-9b-kv"


@pytest.mark.parametrize("wrong", ["klein-4b", "flux3"])
def test_variant_against_the_shapes(wrong):
    config = VARIANTS["klein-9b"].transformer
    for metadata, argument in (({"flux2_kit": json.dumps({"variant": wrong})}, None), ({}, wrong)):
        with pytest.raises(Flux2Error) as error:
            choose_variant("x", config, metadata, argument)
        assert (
            VARIANTS[wrong].label in str(error.value)
            if wrong in VARIANTS
            else wrong in str(error.value)
        )
        assert "width 4096" in str(error.value)
        assert "klein-9b, klein-base-9b, klein-9b-kv" in str(error.value)


def test_variant_of_unknown_shapes():
    variant = choose_variant("x", TOY, {})
    assert (variant.name, variant.guidance_kind, variant.transformer) == ("custom", "embedded", TOY)
    klein = choose_variant("x", replace(TOY, guidance_embed=False, context_dim=7680), {})
    assert (klein.guidance_kind, klein.text_encoder) == ("cfg", "qwen3-4b")
    with pytest.raises(Flux2Error, match="no released model"):
        choose_variant("x", TOY, {}, "dev")


def test_nano_variant_from_a_file(tmp_path):
    torch.manual_seed(0)
    nano = VARIANTS["nano"]
    loaded = load_transformer(save(tmp_path, Flux2Transformer(nano.transformer).state_dict()))
    assert loaded.variant is nano and loaded.config.text_length == 32


def test_the_name_nano():
    assert locate("nano", "vae").name == "nano_vae.safetensors"
    assert str(locate("a/nano", "vae")).endswith("nano") and not locate("a/nano", "vae").suffix
