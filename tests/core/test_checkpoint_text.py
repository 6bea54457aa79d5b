"""Loading text encoders: the layouts they come in, what is left in the file, where words are from."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.checkpoint import load_text_encoder, load_transformer, read_text_encoder
from flux2_pack.flux2_core.configs import NANO_TEXT
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.nano.vocabulary import tokenizer_json
from flux2_pack.flux2_core.quantised import QuantLinear
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.tokenizer import nano_tokenizer

PREFIXES = [
    "model.",
    "",
    "model.language_model.",
    "language_model.model.",
    "text_encoders.qwen3_4b.transformer.model.",
]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TextEncoder(NANO_TEXT).requires_grad_(False)


def save(folder, state, name="text.safetensors", **metadata):
    save_file(dict(state), folder / name, metadata or None)
    return folder / name


def under(prefix, encoder):
    """The encoder's weights with another prefix."""
    return {prefix + k.removeprefix("model."): t for k, t in encoder.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(tmp_path, encoder, prefix):
    path = save(tmp_path, under(prefix, encoder), tokenizer_json=tokenizer_json())
    loaded = load_text_encoder(path)
    assert loaded.config == NANO_TEXT
    assert same(loaded.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("prefix", PREFIXES[1:])
def test_what_is_not_read_stays_in_the_file(tmp_path, encoder, prefix):
    """Deeper layers, the final norm, an output head, a tower that sees, a tokenizer."""
    state = under(prefix, encoder)
    deeper = {
        k.replace("layers.2.", "layers.3."): t * 2 for k, t in state.items() if "layers.2." in k
    }
    extra = {
        f"{prefix}norm.weight": torch.ones(128),
        "lm_head.weight": torch.ones(192, 128),
        "vision_tower.transformer.layers.0.attention.q_proj.weight": torch.ones(4, 4),
        "tokenizer_of_somebody": torch.ones(4),
    }
    path = save(tmp_path, {**state, **deeper, **extra}, tokenizer_json=tokenizer_json())
    weights, config, _ = read_text_encoder(path)
    assert same(weights, encoder.state_dict()) and config == NANO_TEXT


def test_saved_by_transformers(tmp_path, encoder):
    """A folder in diffusers form: text_encoder and tokenizer side by side, weights in shards."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=192,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
        )
    )
    theirs.load_state_dict(encoder.state_dict(), strict=False)
    theirs.save_pretrained(tmp_path / "text_encoder", max_shard_size="1MB")
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(tokenizer_json())
    for path in (tmp_path, tmp_path / "text_encoder"):
        loaded = load_text_encoder(path)
        assert same(loaded.state_dict(), encoder.state_dict())
        assert loaded.encode("a red circle").shape == (1, 32, 384)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dtype(tmp_path, encoder, dtype):
    path = save(tmp_path, encoder.state_dict(), tokenizer_json=tokenizer_json())
    loaded = load_text_encoder(path, dtype=dtype).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {dtype or torch.float32}


def test_tokenizer_from_elsewhere(tmp_path, encoder):
    path = save(tmp_path, encoder.state_dict())
    with pytest.raises(Flux2Error, match="No tokenizer was found"):
        load_text_encoder(path)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(tokenizer_json())
    given = load_text_encoder(path, tmp_path / "words")
    _, _, found = read_text_encoder(path, folders=[tmp_path / "words"])
    assert given.tokenizer.tokens("a red circle") == found.tokens("a red circle")


def refusal(path) -> str:
    with pytest.raises(Flux2Error) as error:
        load_text_encoder(path)
    return str(error.value)


def test_missing_weights_are_named(tmp_path, encoder):
    state = encoder.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.1.mlp.side_proj.weight"] = torch.ones(3)
    text = refusal(save(tmp_path, state))
    assert "1 missing: model.layers.1.mlp.up_proj.weight" in text
    assert "1 unknown: model.layers.1.mlp.side_proj.weight" in text


def test_missing_layers(tmp_path, encoder):
    state = {k: t for k, t in encoder.state_dict().items() if "layers.2." not in k}
    assert "Layers are missing from this text encoder. Seen: 2 of 3" in refusal(
        save(tmp_path, state)
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("double_stream_modulation_img.lin.weight", "a FLUX.2 transformer"),
        ("decoder.conv_in.weight", "a VAE"),
        ("lora_te_layers_0.lora_down.weight", "a LoRA"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP or T5 text encoder"),
    ],
)
def test_strangers(tmp_path, name, what):
    text = refusal(save(tmp_path, {name: torch.ones(2, 2)}))
    assert text.startswith(f"text.safetensors is not a FLUX.2 text encoder. Seen: {what}")
    assert "text_encoders folder" in text


def test_of_the_wrong_width(tmp_path, encoder):
    """A language model of another size is no FLUX.2 text encoder, whatever else fits."""
    state = {k: torch.zeros(2, 2) for k in encoder.state_dict()}
    state["model.embed_tokens.weight"] = torch.zeros(7, 3584)
    state["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(18944, 1)
    assert "This is not a FLUX.2 text encoder. Seen: a language model of width 3584" in refusal(
        save(tmp_path, state)
    )


def test_a_quantised_one(tmp_path, encoder):
    state = encoder.state_dict()
    name = "model.layers.0.mlp.up_proj"
    packed = encode(state[f"{name}.weight"].float(), "float8_e4m3fn")
    state |= {f"{name}.{part}": tensor for part, tensor in packed.parts.items()}
    loaded = load_text_encoder(save(tmp_path, state, tokenizer_json=tokenizer_json()))
    assert isinstance(loaded.get_submodule(name), QuantLinear)
    assert torch.equal(loaded.get_submodule(name).packed.decode(), packed.decode())


LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_llama_cpp(weight, heads):
    """What llama.cpp's converter does to query and key rows of the Llama family."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gguf(tmp_path, family):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    config = NANO_TEXT
    if family == "llama":
        config = replace(config, qk_norm=False, heads=2, kv_heads=1, head_dim=128)
    torch.manual_seed(0)
    state = TextEncoder(config).state_dict()
    writer, wanted = gguf.GGUFWriter(tmp_path / "text.gguf", family), {}
    for name, tensor in state.items():
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
        form = gguf.GGMLQuantizationType["Q8_0" if tensor.ndim == 2 else "F32"]
        codes = gguf.quants.quantize(tensor.numpy(), form)
        wanted[name] = torch.from_numpy(gguf.quants.dequantize(codes, form))
        if family == "llama" and heads:
            codes = gguf.quants.quantize(as_llama_cpp(tensor, heads).contiguous().numpy(), form)
        for ours, theirs in LLAMA.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, codes, raw_dtype=form)
    writer.add_tensor("output_norm.weight", torch.ones(128).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_text_encoder(tmp_path / "text.gguf", nano_tokenizer(), dtype=torch.float32)
    plain = TextEncoder(model.config).requires_grad_(False)
    plain.load_state_dict(wanted)
    plain.tokenizer = model.tokenizer
    prompt = ["a red circle left on white background"]
    assert torch.equal(model.encode(prompt), plain.encode(prompt))


def test_as_a_transformer(tmp_path, encoder):
    with pytest.raises(Flux2Error, match=r"not a FLUX.2 transformer. Seen: a text encoder"):
        load_transformer(save(tmp_path, encoder.state_dict()))
