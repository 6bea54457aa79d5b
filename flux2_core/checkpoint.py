"""Loaders: a file's weights -> our networks, strictly and without a second copy in memory.

A network is built without memory (meta device), then given the file's own mapped tensors. Every
weight must be in the file, and the file must hold nothing else.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import files_gguf
from .autoencoder import AutoEncoder, detect_autoencoder
from .configs import (
    TEXT_ENCODERS,
    VARIANTS,
    TextEncoderConfig,
    TransformerConfig,
    Variant,
    detect,
    variants_of,
)
from .errors import Flux2Error
from .files import Checkpoint, open_checkpoint
from .formats import Packed
from .keymaps import AUTOENCODER, SPELLINGS, TRANSFORMER, from_llama_cpp, to_bfl
from .nano.forms import FORMS, merge
from .precision import AUTO, choices, compute, store
from .quantised import check_names, gather, install
from .recognise import stranger
from .text_encoder import TextEncoder, detect_text_encoder
from .tokenizer import PromptTokenizer, find_tokenizer
from .transformer import Flux2Transformer

Network = TypeVar("Network", bound=nn.Module)
Weights = Mapping[str, Tensor | Packed]

NANO_FILES = {
    kind: Path(__file__).parent / "nano" / f"nano_{name}.safetensors"
    for kind, name in (("transformer", "transformer"), ("vae", "vae"), ("text_encoder", "text"))
}

# A name that ends so is in every file of the kind; what stands before it is the file's prefix.
MARKS = {
    "transformer": (
        "double_stream_modulation_img.lin.weight",
        "double_stream_modulation_img.linear.weight",
    ),
    "vae": ("decoder.conv_in.weight",),
    "text_encoder": ("embed_tokens.weight",),
}
RULES = {"transformer": TRANSFORMER + SPELLINGS, "vae": AUTOENCODER}
NETWORKS: dict[str, tuple[Callable, Callable]] = {
    "transformer": (detect, Flux2Transformer),
    "vae": (detect_autoencoder, AutoEncoder),
}
DECODER_ALONE = {
    "conv_in.weight",
    "post_quant_conv.weight",
}  # names of a VAE's file without encoder
OPTIONAL = {"bn.num_batches_tracked"}  # a training counter: not every file has it


def load_transformer(
    path: str | Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device="cpu",
    precision: str = AUTO,
    layers: str = "",
) -> Flux2Transformer:
    """A file, a folder, an index of shards, "nano", "nano-distilled" or "nano-guided" -> the
    transformer, `model.variant` its Variant.

    `variant` is a name of VARIANTS, needed only where `choose_variant` cannot tell. `dtype` None is
    what the file has most of; weights that have it stay mapped from the file. `precision` and
    `layers`, exceptions from it line by line: see precision.py.
    Raises Flux2Error for any file that is not one whole FLUX.2 transformer.
    """
    state, metadata, config = read_state_dict(path, "transformer")
    chosen = choose_variant(locate(path, "transformer"), config, metadata, variant)
    wanted = choices((n.removesuffix(".weight") for n in state), precision, layers)
    state = store(state, wanted)
    model = _fill(Flux2Transformer, chosen.transformer, state, dtype, device)
    compute(model, wanted)
    model.variant = chosen
    return model


def load_autoencoder(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device="cpu",
) -> AutoEncoder:
    """As `load_transformer`. `base` is a whole VAE's file whose encoder and statistics serve a file
    that holds a decoder alone. The statistics are float32 in any case."""
    state, _, config = read_state_dict(path, "vae", base=base)
    return _fill(AutoEncoder, config, state, dtype, device)


def load_text_encoder(
    path: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = None,
    device="cpu",
) -> TextEncoder:
    """As `load_transformer`. `tokenizer`: see `find_tokenizer`; None looks in the file and beside."""
    state, config, prompts = read_text_encoder(path, tokenizer)
    model = _fill(TextEncoder, config, state, dtype, device)
    model.tokenizer = prompts
    return model


def read_text_encoder(
    path: str | Path, tokenizer: Any = None, folders: Sequence[str | Path] = ()
) -> tuple[dict[str, Tensor | Packed], TextEncoderConfig, PromptTokenizer]:
    """-> weights under Hugging Face names, mapped from the file; config; tokenizer.

    Layers that FLUX.2 does not read, the last norm, an output head and a vision tower stay in the
    file. `folders`: where a tokenizer may be that is neither in the file nor beside it.
    """
    kind = "text_encoder"
    checkpoint = open_checkpoint(locate(path, kind), kind)
    names, config = _text_layout(checkpoint)
    state = checkpoint.load({n: stored for n, stored in names.items() if _is_read(n, config)})
    if checkpoint.metadata.get("general.architecture") in files_gguf.ROTATED:
        for name in (n for n in state if n.endswith(("q_proj.weight", "k_proj.weight"))):
            state[name] = files_gguf.restore_rotary(state[name], config.head_dim)
    state = gather(state, checkpoint.metadata, checkpoint.path.name)
    with torch.device("meta"):
        check_keys(state, TextEncoder(config).state_dict(), checkpoint.path.name)
    tekken = [name for name in checkpoint.tensors if name.endswith("tekken_model")]
    file = checkpoint.path
    prompts = find_tokenizer(
        config,
        tokenizer,
        metadata=checkpoint.metadata,
        tekken=_plain(checkpoint.load({"": tekken[0]})[""]) if tekken else None,
        folders=(file.parent / file.stem, file.parent, *folders),
    )
    return state, config, prompts


def _plain(found: Tensor | Packed) -> Tensor:
    return found.decode() if isinstance(found, Packed) else found


def text_encoder_config(path: str | Path) -> TextEncoderConfig:
    """What a file's text encoder is, told from its header alone. Raises Flux2Error if it is none
    that can be loaded."""
    return _text_layout(open_checkpoint(locate(path, "text_encoder"), "text_encoder"))[1]


def _text_layout(checkpoint: Checkpoint) -> tuple[dict[str, str], TextEncoderConfig]:
    """-> {Hugging Face name: name in the file}, config."""
    selected = select(checkpoint, "text_encoder")
    names = {f"model.{name}": stored for name, stored in selected.items()}
    entries = {name: checkpoint.tensors[stored] for name, stored in names.items()}
    check_names({name: entry.dtype for name, entry in entries.items()}, checkpoint.path.name)
    return names, detect_text_encoder({name: entry.shape for name, entry in entries.items()})


def _is_read(name: str, config: TextEncoderConfig) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return int(layer[1]) < config.layers if layer else name.startswith("model.embed_tokens.")


def read_state_dict(
    path: str | Path, kind: str, *, base: str | Path | None = None
) -> tuple[dict[str, Tensor | Packed], Mapping[str, str], Any]:
    """`kind` transformer or vae -> (weights under BFL names, the file's metadata, its config).

    The weights are mapped from the file, in its own dtypes, complete and of the right shapes; a
    form of nano's has float32 where its file changes the base.
    """
    checkpoint = open_checkpoint(locate(path, kind), kind)
    state, metadata = _state(checkpoint, kind), checkpoint.metadata
    if kind == "transformer" and str(path) in FORMS:
        state, metadata = merge(state, str(path))
    if base is not None and state.keys() >= DECODER_ALONE:
        whole = _state(open_checkpoint(locate(base, kind), kind), kind)
        state = {f"decoder.{name}": tensor for name, tensor in state.items()}
        state |= {name: tensor for name, tensor in whole.items() if not name.startswith("decoder.")}
    file = checkpoint.path.name
    config, wanted = _meta(kind, state, file)
    check_keys(state, wanted, file)
    return state, metadata, config


def _meta(kind: str, state: Weights, file: str) -> tuple[Any, Mapping[str, Tensor]]:
    """The config that the shapes tell, and the weights it needs, without memory."""
    find, network = NETWORKS[kind]
    try:
        config = find({name: tuple(tensor.shape) for name, tensor in state.items()})
        with torch.device("meta"):
            return config, network(config).state_dict()
    except Flux2Error:
        raise
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise Flux2Error(
            f"The weights in {file} have shapes that no FLUX.2 model has",
            str(error)[:120],
            "Choose a complete, unmodified file",
        ) from error


def locate(path: str | Path, kind: str) -> Path:
    """The name "nano", and those of its forms, mean the built-in network; anything else is a path."""
    return NANO_FILES[kind] if str(path) == "nano" or str(path) in FORMS else Path(path)


def check_keys(state: Weights, wanted: Mapping[str, Tensor], file: str) -> None:
    """Raise unless both have the same names and shapes; the error names the first few."""
    missing = [name for name in wanted if name not in state and name not in OPTIONAL]
    extra = [name for name in state if name not in wanted]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    seen = [
        f"{len(names)} {what}: {', '.join(n[:120] for n in names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", extra), ("of a wrong shape", wrong))
        if names
    ]
    if seen:
        raise Flux2Error(
            f"The weights in {file} do not fit the model",
            "; ".join(seen),
            "Choose a complete, unmodified file",
        )


def choose_variant(
    path: str | Path,
    config: TransformerConfig,
    metadata: Mapping[str, str],
    variant: str | None = None,
) -> Variant:
    """Which released model a file is: `variant` if given, else the file's metadata, else its name.

    Weights alone cannot tell klein from klein base and klein KV; a name that says nothing means
    the distilled one. Shapes that no release has give a Variant called "custom".
    """
    fitting = {v.name: v for v in variants_of(config)}
    name = variant or _metadata_variant(metadata)
    if name and name not in fitting:
        known = ", ".join(fitting or VARIANTS)
        raise Flux2Error(
            f"This file is not {VARIANTS[name].label if name in VARIANTS else name}",
            f"width {config.hidden_size}, {config.double_blocks} double and {config.single_blocks} "
            f"single blocks, which fits {', '.join(fitting) or 'no released model'}",
            f"Set variant to auto, or to one of {known}",
        )
    if name:
        return fitting[name]
    return _named(Path(path), list(fitting.values())) if fitting else _custom(config)


def _metadata_variant(metadata: Mapping[str, str]) -> str | None:
    """The variant our own files declare: flux2_kit = {"variant": ...}."""
    try:
        name = json.loads(metadata.get("flux2_kit", "{}")).get("variant")
    except (ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def _named(path: Path, fitting: list[Variant]) -> Variant:
    """base and kv in the file's name, or in the nearest folder's that says klein."""
    parts = [path.stem, *(parent.name for parent in path.parents)]
    name = next((part for part in parts if "klein" in part.lower()), path.stem)
    said = {"base", "kv"} & set(re.split(r"[^a-z0-9]+", name.lower()))
    return next((v for v in fitting if {"base", "kv"} & set(v.name.split("-")) == said), fitting[0])


def _custom(config: TransformerConfig) -> Variant:
    encoders = [
        name for name, text in TEXT_ENCODERS.items() if text.context_dim == config.context_dim
    ]
    kind = "embedded" if config.guidance_embed else "cfg"
    return Variant(
        "custom", "FLUX.2 (custom)", config, encoders[0] if encoders else "", 50, 4.0, kind
    )


def _state(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor | Packed]:
    """The weights of one network in a file that may hold several."""
    state = checkpoint.load(select(checkpoint, kind))
    state = gather(state, checkpoint.metadata, checkpoint.path.name)
    return state if state.keys() >= DECODER_ALONE else to_bfl(state, RULES[kind])


def select(checkpoint: Checkpoint, kind: str) -> dict[str, str]:
    """{name without prefix: name in the file} of the network that has the kind's mark."""
    tensors = checkpoint.tensors
    if kind == "vae" and tensors.keys() >= DECODER_ALONE:
        return {name: name for name in tensors}
    if kind == "text_encoder" and (names := from_llama_cpp(tensors)):
        return names
    for mark in MARKS[kind]:
        prefixes = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
        if prefixes:
            prefix = min(prefixes, key=len)
            return {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    raise stranger(tensors, kind, checkpoint.path.name)


def _fill(network: Callable[[Any], Network], config, state: Weights, dtype, device) -> Network:
    with torch.device("meta"):
        model = network(config)
    dtype = dtype or usual_dtype(state)
    plain = install(model, state, dtype)
    model.load_state_dict(_cast(plain, dtype), assign=True, strict=len(plain) == len(state))
    return model.to(device).eval().requires_grad_(False)


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Numbers to `dtype`, the autoencoder's statistics to float32, counters as they are."""
    return {
        name: tensor.to(torch.float32 if name.startswith("bn.") else dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def usual_dtype(state: Weights) -> torch.dtype:
    """The dtype that most plain weights have; bf16 where there are none."""
    sizes: dict[torch.dtype, int] = {torch.bfloat16: 0}
    for tensor in state.values():
        if isinstance(tensor, Packed):
            continue
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return most if most in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16
