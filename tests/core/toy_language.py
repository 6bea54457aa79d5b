"""Toy language models: transformers' own with random weights, our files of them, and a tokenizer
whose words are bytes."""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LETTERS = [*range(33, 127), *range(161, 173), *range(174, 256)]
SPECIAL = {
    "mistral": (
        *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    ),
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
}
VOCABULARY = 300
IMG = SPECIAL["mistral"].index("[IMG]")
available = importlib.util.find_spec("transformers") is not None


def tokenizer_json(family: str) -> str:
    """The text of a tokenizer.json: the special tokens, then a token for each byte."""
    special = SPECIAL[family]
    other = iter(range(256, 512))
    spelled = [chr(byte if byte in LETTERS else next(other)) for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate((*special, *spelled))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token, "special": True} | flags for i, token in enumerate(special)
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    parts = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return json.dumps(parts)


def randomise(model, seed: int = 0):
    """Weights at which activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            wide = weight[0].numel() ** 0.5 if weight.ndim > 1 else 1
            weight.copy_(1 + 0.1 * noise if weight.ndim == 1 else noise / wide)
    return model.eval().requires_grad_(False)


def mistral(layers: int = 8):
    """Mistral-3 with its vision tower."""
    import transformers

    text = {
        "model_type": "mistral", "vocab_size": VOCABULARY, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 128, "rope_theta": 1e9, "rms_norm_eps": 1e-5,
        "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 128, "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14, "image_size": 1540,
        "hidden_act": "silu", "rope_theta": 1e4,
    }  # fmt: skip
    config = transformers.Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=IMG, tie_word_embeddings=False
    )
    config._attn_implementation = "sdpa"
    return randomise(transformers.Mistral3ForConditionalGeneration(config))


def qwen(layers: int = 8, tied: bool = True):
    """Qwen3; as the small ones are, with the embedding as output head."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, rope_theta=1e6,
        rms_norm_eps=1e-6, sliding_window=None, tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )  # fmt: skip
    return randomise(transformers.Qwen3ForCausalLM(config), 1)


def write(model, family: str, path: Path, rename=lambda name: name, leave=(), dtype=None) -> Path:
    """A file as they are published: tied weights once. `leave`: beginnings of names to leave out."""
    state = {rename(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight", None)
    kept = {
        n: t.to(dtype or t.dtype).clone()
        for n, t in state.items()
        if not n.startswith(leave or ("-",))
    }
    save_file(kept, path, {"tokenizer_json": tokenizer_json(family)})
    return path


def as_published(name: str) -> str:
    """The names of Mistral-3's files, which transformers' classes no longer have."""
    for old, new in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(old):
            return name.replace(old, new, 1)
    return name
