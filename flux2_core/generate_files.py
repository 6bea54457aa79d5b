"""Which files can write, and the rest of their language model.

Many files of text encoders are cut to what FLUX.2 reads. Whether one is whole is told from its
header, before anything is loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files_gguf
from .checkpoint import (
    check_keys,
    load_text_encoder,
    locate,
    select,
    text_encoder_config,
    usual_dtype,
)
from .configs import TextEncoderConfig
from .errors import Flux2Error
from .files import Checkpoint, open_checkpoint
from .formats import Packed
from .generate import CHATS, Rest, Writer
from .quantised import gather, install
from .vision_tower import VisionConfig, detect_vision

WHOLE = {"mistral3": 40, "qwen3": 36}  # layers of the released models
TIED_WIDTH = 2560  # Qwen3 of this width and below has no head: its embedding serves
TOWER = "vision_tower.patch_conv.weight"
ELSEWHERE = (
    "Choose a whole file of this text encoder, or set up a chat endpoint: see the node's help"
)


@dataclass(frozen=True)
class RestConfig:
    """How much stands above the text encoder in a file, and under which names: {ours: the file's}."""

    layers: int
    vision: VisionConfig | None
    names: Mapping[str, str]


def rest_of(path: str | Path) -> RestConfig:
    """`rest_in` of a file, a folder or an index of shards."""
    checkpoint = open_checkpoint(locate(path, "text_encoder"), "text_encoder")
    return rest_in(checkpoint, text_encoder_config(path))


def ability(checkpoint: Checkpoint, config: TextEncoderConfig) -> str:
    """Whether a text encoder's file can write prompts and see references, in a sentence."""
    try:
        found = rest_in(checkpoint, config)
    except Flux2Error as error:
        return f"Reads prompts, and cannot write them: {error.seen}."
    return f"Reads and writes prompts; {'sees' if found.vision else 'does not see'} references."


def rest_in(checkpoint: Checkpoint, config: TextEncoderConfig) -> RestConfig:
    """What a file has besides the text encoder, from its header alone.

    Raises Flux2Error that says what is missing, for a file that cannot write.
    """
    file = checkpoint.path.name
    if config.template not in CHATS:
        raise Flux2Error(f"{file} cannot write text", "it was trained to read only", ELSEWHERE)
    names = select(checkpoint, "text_encoder")
    numbers = {int(m[1]) for name in names if (m := re.match(r"layers\.(\d+)\.", name))}
    whole = WHOLE[config.template] if config.hidden_size >= 1024 else len(numbers)
    if len(numbers) < whole:
        seen = f"{len(numbers)} of its {whole} layers are in it, as many as FLUX.2 reads"
        raise Flux2Error(f"{file} cannot write text", seen, ELSEWHERE)
    if "norm.weight" not in names:
        raise Flux2Error(f"{file} cannot write text", "its last norm is not in it", ELSEWHERE)
    found = {"norm.weight": names["norm.weight"]} | _head(checkpoint, config, names)
    for name, stored in names.items():
        match = re.match(r"layers\.(\d+)\.", name)
        if match and int(match[1]) >= config.layers:
            found[f"layers.{int(match[1]) - config.layers}.{name[match.end() :]}"] = stored
    vision = _vision(checkpoint) if config.template == "mistral3" else {}
    shapes = {name: checkpoint.tensors[stored].shape for name, stored in vision.items()}
    tower = detect_vision(shapes, config.norm_eps) if vision else None
    found |= {f"vision.{name}": stored for name, stored in vision.items()}
    return RestConfig(len(numbers) - config.layers, tower, found)


def _head(checkpoint: Checkpoint, config: TextEncoderConfig, names: Mapping[str, str]) -> dict:
    """The output head's tensors; the embedding's where the model has no other."""
    for mark in ("lm_head.weight", "output.weight"):  # Hugging Face's and llama.cpp's
        stored = [n for n in checkpoint.tensors if n == mark or n.endswith(f".{mark}")]
        if stored and (mark == "lm_head.weight" or stored[0] == mark):
            prefix = min(stored, key=len).removesuffix("weight")
            same = (n for n in checkpoint.tensors if n.startswith(prefix))
            return {f"lm_head.{n.removeprefix(prefix)}": n for n in same}
    if config.template == "qwen3" and config.hidden_size <= TIED_WIDTH:
        mark = "embed_tokens."
        return {
            n.replace(mark, "lm_head.", 1): stored
            for n, stored in names.items()
            if n.startswith(mark)
        }
    raise Flux2Error(
        f"{checkpoint.path.name} cannot write text", "its output head is not in it", ELSEWHERE
    )


def _vision(checkpoint: Checkpoint) -> dict[str, str]:
    marks = [name for name in checkpoint.tensors if name.endswith(TOWER)]
    if not marks:
        return {}
    prefix = marks[0].removesuffix(TOWER)
    parts = tuple(prefix + part for part in ("vision_tower.", "multi_modal_projector."))
    return {n.removeprefix(prefix): n for n in checkpoint.tensors if n.startswith(parts)}


def read_rest(
    path: str | Path, config: TextEncoderConfig
) -> tuple[dict[str, Tensor | Packed], RestConfig]:
    """-> weights under `Rest`'s names, mapped from the file and complete, and what they make."""
    checkpoint = open_checkpoint(locate(path, "text_encoder"), "text_encoder")
    found = rest_in(checkpoint, config)
    state = checkpoint.load(found.names)
    if checkpoint.metadata.get("general.architecture") in files_gguf.ROTATED:
        for name in (n for n in state if n.endswith(("q_proj.weight", "k_proj.weight"))):
            state[name] = files_gguf.restore_rotary(state[name], config.head_dim)
    state = gather(state, checkpoint.metadata, checkpoint.path.name)
    with torch.device("meta"):
        wanted = Rest(config, found.layers, found.vision).state_dict()
    check_keys(state, wanted, checkpoint.path.name)
    return state, found


def load_writer(
    path: str | Path, tokenizer: Any = None, *, dtype: torch.dtype | None = None, device="cpu"
) -> Writer:
    """A whole text encoder's file -> what writes with it. Raises Flux2Error for a cut one."""
    rest_of(path)
    encoder = load_text_encoder(path, tokenizer, dtype=dtype, device=device)
    state, found = read_rest(path, encoder.config)
    with torch.device("meta"):
        rest = Rest(encoder.config, found.layers, found.vision)
    dtype = dtype or usual_dtype(state)
    plain = install(rest, state, dtype)
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.items()}
    rest.load_state_dict(cast, assign=True, strict=len(plain) == len(state))
    return Writer(encoder, rest.to(device).eval().requires_grad_(False))
