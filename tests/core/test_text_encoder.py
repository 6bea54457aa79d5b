"""Our text encoder against transformers' Mistral and Qwen3 with the same random weights.

Errors are max |a - b| / std(b) in float32 and ||a - b|| / ||b|| in bfloat16.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.checkpoint import load_text_encoder
from flux2_pack.flux2_core.configs import (
    MISTRAL3_24B,
    NANO_TEXT,
    QWEN3_4B,
    TEXT_ENCODERS,
    TextEncoderConfig,
)
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.nano.vocabulary import tokenizer_json
from flux2_pack.flux2_core.text_encoder import TextEncoder, detect_text_encoder

transformers = pytest.importorskip("transformers", reason="pip install transformers")

TOY = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, heads=4, kv_heads=2, head_dim=24,
    layers_out=(1, 2, 4), text_length=12,
)  # fmt: skip
MISTRAL = replace(MISTRAL3_24B, **TOY)
QWEN = replace(QWEN3_4B, **TOY, pad_id=0)
FAMILIES = pytest.mark.parametrize("config", [MISTRAL, QWEN], ids=["mistral", "qwen"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])


def reference(config: TextEncoderConfig, layers: int = 5):
    """transformers' model with random weights that keep activations near 1, sdpa attention."""
    family = "Qwen3" if config.qk_norm else "Mistral"
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        sliding_window=None,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = getattr(transformers, f"{family}ForCausalLM")(settings).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.1 * noise if weight.ndim == 1 else noise / weight.shape[1] ** 0.5)
    return model


def ours(config: TextEncoderConfig, model) -> TextEncoder:
    encoder = TextEncoder(config).eval().requires_grad_(False)
    state = model.state_dict()
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    return encoder


def batch(side: str, lengths=(12, 7, 1), total: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 100, (len(lengths), total), generator=generator)
    slots = torch.arange(total).expand(len(lengths), -1)
    n = torch.tensor(lengths)[:, None]
    mask = slots >= total - n if side == "left" else slots < n
    return ids.where(mask, 0), mask


def stacked(model, config, ids, mask) -> torch.Tensor:
    """What diffusers' FLUX.2 pipelines read: the hidden states, side by side on channels."""
    out = model(ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[k] for k in config.layers_out], -1)


@FAMILIES
@SIDES
def test_rows_equal_transformers(config, side):
    model = reference(config)
    ids, mask = batch(side)
    expected = stacked(model, config, ids, mask)
    error = (ours(config, model)(ids, mask) - expected).abs().amax(-1) / expected.std()
    assert error[mask].max() < 1e-5  # observed 2.3e-6 at most
    assert error[~mask].max() < 1e-5  # observed 1.7e-6 at most


@FAMILIES
def test_padding_before_the_text_sees_nothing(config):
    """Such a row keeps its own embedding, whatever stands after it, and is a finite number."""
    encoder = ours(config, reference(config))
    ids, mask = batch("left")
    other = ids.clone()
    other[mask] = 5
    before = ~mask
    assert torch.equal(encoder(ids, mask)[before], encoder(other, mask)[before])
    assert encoder(ids, torch.zeros_like(mask)).isfinite().all()


@FAMILIES
def test_no_row_sees_padding_or_what_comes_later(config):
    encoder = ours(config, reference(config))
    ids, mask = batch("right", (7,))
    out = encoder(ids, mask)
    ids[:, 6:] = 9
    changed = encoder(ids, mask)
    assert torch.equal(out[:, :6], changed[:, :6])
    assert not torch.equal(out[:, 6], changed[:, 6])


@FAMILIES
@SIDES
def test_bfloat16_equals_transformers(config, side):
    model = reference(config).bfloat16()
    ids, mask = batch(side)
    expected = stacked(model, config, ids, mask).float()
    out = ours(config, model).bfloat16()(ids, mask)
    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 2e-2  # observed 1.3e-2: transformers rounds once more in each norm


def test_positions_may_be_given():
    encoder = ours(QWEN, reference(QWEN))
    ids, mask = batch("right")
    slots = torch.arange(12)
    out = encoder(ids, mask)
    assert torch.equal(encoder(ids, mask, slots), out)
    assert torch.equal(encoder(ids, mask, slots.expand(3, -1)), out)
    assert not torch.allclose(encoder(ids, mask, 2 * slots), out, atol=1e-3)


def test_only_the_layers_that_are_read_are_built():
    names = TextEncoder(QWEN).state_dict().keys()
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1", "2", "3"}
    assert "model.norm.weight" not in names
    assert len(TextEncoder(MISTRAL).state_dict()) == 1 + 4 * 9


def test_gradients_are_finite_with_padding_on_either_side():
    encoder = TextEncoder(replace(NANO_TEXT, vocab_size=100))
    for side in ("left", "right"):
        encoder(*batch(side, (12, 1, 0))).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())


def shapes(config: TextEncoderConfig, layers: int = 0, **change) -> dict[str, tuple[int, ...]]:
    config = replace(config, layers_out=(1, 2, layers or config.layers), **change)
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in TextEncoder(config).state_dict().items()}


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_released_encoders_are_known_by_their_shapes(name):
    """Whole files hold more layers than are read; one that is pruned to those is as good."""
    known = TEXT_ENCODERS[name]
    whole = shapes(known, known.layers + 9) | {"model.norm.weight": (known.hidden_size,)}
    assert detect_text_encoder(whole) == known
    assert detect_text_encoder(shapes(known)) == known
    assert detect_text_encoder(shapes(known, vocab_size=200_000)).vocab_size == 200_000


@pytest.mark.parametrize("base", [MISTRAL3_24B, QWEN3_4B], ids=["mistral", "qwen"])
def test_a_small_encoder_of_any_shape_is_read(base):
    toy = replace(base, **TOY | {"head_dim": 128, "layers_out": (2, 4, 6), "text_length": 512})
    found = detect_text_encoder(shapes(toy, 8))
    assert found == replace(toy, pad_id=found.pad_id)
    assert found.pad_id == (11 if base is MISTRAL3_24B else 0)  # Qwen's pad is not among 100 words


LLAMA = replace(MISTRAL3_24B, hidden_size=4096, intermediate_size=14336, layers_out=(1, 2, 32))
FOREIGN = {
    "clip": ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "no 'model.embed"),
    "llama 8B": (shapes(LLAMA), "width 4096"),
    "qwen 2.5": (
        shapes(NANO_TEXT, 4) | {"model.layers.0.self_attn.q_proj.bias": (128,)},
        "width 128",
    ),
    "odd heads": (shapes(NANO_TEXT, kv_heads=2), "128 key rows"),
    "cut short": (shapes(QWEN3_4B, 20), "20 of 27"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_language_models_are_refused(kind):
    found, seen = FOREIGN[kind]
    with pytest.raises(Flux2Error, match=seen):
        detect_text_encoder(found)


def save(path, prefix: str, extra: dict | None = None, metadata: dict | None = None):
    """nano's encoder, random, under `prefix`, with what other files hold besides."""
    torch.manual_seed(0)
    encoder = TextEncoder(NANO_TEXT)
    state = {prefix + name.removeprefix("model."): t for name, t in encoder.state_dict().items()}
    row = next(name for name in state if name.endswith("layers.0.mlp.down_proj.weight"))
    more = {prefix + "norm.weight": torch.ones(128), "lm_head.weight": torch.zeros(2, 2)}
    more[row.replace("layers.0", "layers.3")] = state[row].clone()
    save_file(state | more | (extra or {}), path, metadata or {"tokenizer_json": tokenizer_json()})
    return encoder


PREFIXES = (
    "model.",
    "language_model.model.",
    "model.language_model.",
    "text_encoders.qwen3_4b.transformer.model.",
    "",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_files_of_every_layout_load(tmp_path, prefix):
    saved = save(tmp_path / "text.safetensors", prefix)
    loaded = load_text_encoder(tmp_path / "text.safetensors")
    assert loaded.config == NANO_TEXT
    assert all(torch.equal(t, saved.state_dict()[n]) for n, t in loaded.state_dict().items())
    out = loaded.encode(["a red circle left", ""])
    assert out.shape == (2, 32, 384)
    assert torch.equal(loaded.encode("a red circle left")[0], out[0])


def test_a_weight_that_nothing_reads_is_named(tmp_path):
    name = "model.layers.1.self_attn.q_proj.extra"
    save(tmp_path / "text.safetensors", "model.", {name: torch.zeros(1)})
    with pytest.raises(Flux2Error, match=f"unknown: {name}"):
        load_text_encoder(tmp_path / "text.safetensors")


def test_without_a_tokenizer_the_places_are_named(tmp_path):
    path = tmp_path / "text.safetensors"
    save(path, "model.", metadata={"format": "pt"})
    with pytest.raises(Flux2Error, match=f"No tokenizer was found.*weight file.*{tmp_path}"):
        load_text_encoder(path)
    beside = tmp_path / "text"
    beside.mkdir()
    (beside / "tokenizer.json").write_text(tokenizer_json())
    assert load_text_encoder(path).encode("a").shape == (1, 32, 384)


def test_encode_without_a_tokenizer_says_so():
    with pytest.raises(Flux2Error, match="no tokenizer"):
        TextEncoder(NANO_TEXT).encode("a red circle")
