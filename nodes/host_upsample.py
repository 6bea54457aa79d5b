"""What writes prompts in the host: the loaded text encoder with the rest of its file, nano's
stand-in, or a chat endpoint."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import comfy.model_management as memory
import comfy.ops
import comfy.utils
import torch

from ..flux2_core import upsample_nano
from ..flux2_core.chat_endpoint import chat_writer, read_chat_settings
from ..flux2_core.errors import Flux2Error
from ..flux2_core.generate import Rest, Writer
from ..flux2_core.generate_files import read_rest, rest_of
from ..flux2_core.references import Reference, to_pil
from ..flux2_core.upsample import (
    LIMIT,
    Answer,
    Ask,
    Memory,
    Upsampled,
    Write,
    local_writer,
    upsample,
)
from . import host_objects, host_prompts, host_quant, host_text

ENCODER, ENDPOINT = "text encoder", "chat endpoint"
_memory = Memory()


@dataclass(frozen=True)
class Source:
    """What writes: `which` tells it from others, `sees` whether it looks at pictures, `open` makes
    it, `says` what a user should know of it."""

    which: tuple
    sees: bool
    open: Callable[[], Write]
    says: str = ""


def source_of(writer: str, clip) -> Source:
    """What a choice of the node means. Raises Flux2Error where it cannot write, before anything is
    loaded or sent."""
    if writer == ENDPOINT:
        settings = read_chat_settings()
        which = (ENDPOINT, settings.base, settings.model, settings.sees)
        check = memory.throw_exception_if_processing_interrupted
        return Source(which, settings.sees, lambda: chat_writer(settings, check))
    if clip is None:
        raise Flux2Error(
            "There is nothing to write with",
            "no text encoder is connected",
            f"Connect a CLIP from FLUX.2 Loader, or choose {ENDPOINT} as the writer",
        )
    encoder = clip.cond_stage_model
    if not isinstance(encoder, host_text.Encoder) or not encoder.file:
        raise Flux2Error(
            "This text encoder cannot write here",
            "a CLIP from the host's own loader",
            "Load it with FLUX.2 Loader or FLUX.2 Load Text Encoder",
        )
    if encoder.flux2.config.template == "nano":
        says = "nano's text encoder cannot write: simple rules fill in what the prompt leaves free."
        return Source(("nano",), False, lambda: upsample_nano.write, says)
    found = rest_of(encoder.file)
    patches = str(clip.patcher.patches_uuid) if clip.patcher.patches else ""
    which = (encoder.file, encoder.origin, patches)
    return Source(which, found.vision is not None, partial(_open, clip))


def run(
    source: Source, clip, prompt: str, references: Sequence[Reference], *, seed: int, **how
) -> Upsampled:
    """The new prompt; asked for once, and known the next time. `how`: see `upsample`."""
    pictures = [to_pil(_first(r.image)) for r in references] if source.sees else []
    seen = tuple((p.size, hashlib.sha256(p.tobytes()).hexdigest()) for p in pictures)
    names = tuple(r.name for r in references)
    key = (*source.which, _reads(clip), prompt, names, seen, seed, *sorted(how.items()))
    if found := _memory.get(key):
        return found
    try:
        made = upsample(
            source.open(),
            prompt,
            references=len(references),
            names=names,
            pictures=pictures,
            seed=seed,
            fits=partial(_fits, clip),
            **how,
        )
    finally:
        _release(source, clip)
    return _memory.put(key, made)


async def aside(source: Source, *args, **how) -> Upsampled:
    """`run`, beside the host's loop where it waits for a network."""
    if source.which[0] == ENDPOINT:
        return await asyncio.to_thread(run, source, *args, **how)
    return run(source, *args, **how)


def _first(image: torch.Tensor) -> torch.Tensor:
    return image if image.ndim == 3 else image[0]


def _reads(clip) -> tuple | None:
    """Whose limit an answer was held to."""
    tokenizer = getattr(clip, "tokenizer", None)
    if not isinstance(tokenizer, host_text.Tokenizer):
        return None
    config = tokenizer.prompts.config
    return config.template, config.text_length


def _fits(clip, text: str) -> bool:
    """Whether a text encoder reads a prompt to its end; where it is not ours nobody can tell."""
    tokenizer = getattr(clip, "tokenizer", None)
    if not isinstance(tokenizer, host_text.Tokenizer):
        return True
    return tokenizer.count(text) <= tokenizer.prompts.config.text_length


def _open(clip) -> Write:
    """Load what the file has above the text encoder, beside it; it is let go after the writing."""
    encoder = clip.cond_stage_model
    (dtype,) = encoder.dtypes
    rest, patcher = _rest(encoder.file, clip.patcher, encoder.flux2.config, dtype)
    config = encoder.flux2.config
    room = (len(encoder.flux2.model.layers) + len(rest.layers)) * config.kv_heads * config.head_dim
    memory.load_models_gpu(
        [clip.patcher, patcher], memory_required=room * 2 * 8192 * dtype.itemsize
    )
    device = clip.patcher.load_device
    bar = comfy.utils.ProgressBar(LIMIT)

    def on_token(count: int) -> None:
        memory.throw_exception_if_processing_interrupted()
        bar.update_absolute(count, LIMIT)

    writer = Writer(encoder.flux2, rest, clip.tokenizer.prompts, device)
    return _Held(local_writer(writer, on_token), patcher)


@dataclass(frozen=True)
class _Held:
    """What writes, and the patcher of its weights, which must live as long."""

    write: Write
    patcher: object

    def __call__(self, ask: Ask) -> Answer:
        return self.write(ask)


def _release(source: Source, clip) -> None:
    """Where FLUX.2 Prompt Cache says so, the text encoder leaves memory when it has written."""
    settings = getattr(getattr(clip, "patcher", None), "attachments", {}).get(host_prompts.SETTINGS)
    if settings and settings.release and source.which[0] != ENDPOINT:
        host_prompts.release(clip)


def _rest(file: str, near, config, dtype: torch.dtype, disable_dynamic: bool = False):
    """-> the rest of a file's language model, and the host's patcher around it."""
    state, found = read_rest(file, config)
    rest = Rest(config, found.layers, found.vision, comfy.ops.manual_cast, dtype).eval()
    named = host_quant.install(rest, state, dtype)
    holder = SimpleNamespace()
    host_objects.fill(
        holder,
        rest,
        named,
        load_device=near.load_device,
        offload_device=near.offload_device,
        reload=(_rest_patcher, (file, near, config, dtype)),
        disable_dynamic=disable_dynamic,
        keep=partial(_keep, rest, dtype),
    )
    return rest, holder.patcher


def _rest_patcher(*what, disable_dynamic: bool = False):
    return _rest(*what, disable_dynamic)[1]


def _keep(rest: Rest, dtype: torch.dtype, named: dict) -> dict:
    """Numbers in one dtype; codes and scales of quantised layers are no numbers."""

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        layer = rest.get_submodule(name.rpartition(".")[0])
        return tensor if isinstance(layer, host_quant.QuantLinear) else tensor.to(dtype)

    return {name: cast(name, tensor) for name, tensor in named.items()}
