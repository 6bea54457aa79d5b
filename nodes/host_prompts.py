"""Prompts through a CLIP that may keep them on disk and leave memory after its work."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as memory
import folder_paths
import torch

from ..flux2_core import prompt_cache
from ..flux2_core.errors import Flux2Error
from ..flux2_core.prompt_cache import PromptCache
from . import host_objects, host_text

SETTINGS = "flux2_kit_prompts"  # among the attachments of a CLIP's patcher: clones carry them on
SWITCH = "FLUX2_PROMPT_CACHE"
# What may change an encoder's work beside patches of its weights; never kept.
CHANGES = ("object_patches", "weight_wrapper_patches", "hook_patches", "forced_hooks", "injections")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """What a CLIP does beside encoding."""

    cache: PromptCache | None
    release: bool


def with_prompts(clip, keep: bool, gigabytes: float, release: bool):
    """A clone of a CLIP that keeps what it encodes, leaves memory afterwards, or both."""
    if keep and not isinstance(clip.tokenizer, host_text.Tokenizer):
        raise Flux2Error(
            "Prompts of this text encoder cannot be kept",
            "a CLIP from the host's own loader",
            "Load it with FLUX.2 Loader or FLUX.2 Load Text Encoder, or switch keep off",
        )
    if keep and os.environ.get(SWITCH, "").lower() in ("off", "0"):
        log.warning("Prompts are not kept: %s is off", SWITCH)
        keep = False
    clip = clip.clone()
    cache = PromptCache(folder(), round(gigabytes * 1e9)) if keep else None
    clip.patcher.set_attachments(SETTINGS, Prompts(cache, release))
    return clip


def folder() -> Path:
    """Below the host's user folder, where no page of its web server leads."""
    private = getattr(folder_paths, "get_system_user_directory", None)
    root = Path(private("flux2_kit") if private else folder_paths.get_user_directory())
    return (root if private else root / "__flux2_kit") / "prompts"


def encode(clip, texts: Sequence[str]) -> tuple[list, str]:
    """-> CONDITIONING of each text, and what came from the cache in a sentence ("" without one)."""
    settings = getattr(clip.patcher, "attachments", {}).get(SETTINGS, Prompts(None, False))
    which = _identity(clip) if settings.cache else None
    if which is None:
        made, said = [host_text.conditioning(clip, text) for text in texts], ""
    else:
        before = settings.cache.hits
        made = [_kept(clip, settings.cache, which, text) for text in texts]
        found = settings.cache.hits - before
        said = f"{found} of {len(texts)} from the prompt cache." if len(texts) > 1 else ""
        said = said or ("From the prompt cache." if found else "Now in the prompt cache.")
    if settings.release:
        release(clip)
    return made, said


def _kept(clip, cache: PromptCache, which: str, text: str) -> list:
    (dtype,) = clip.cond_stage_model.dtypes
    how = dtype, clip.patcher.load_device.type
    name = prompt_cache.key(which, clip.tokenizer.prompts, text, *how)
    rows = cache.rows(name, lambda: host_text.conditioning(clip, text)[0][0])
    return [[rows.to(memory.intermediate_device()), {"pooled_output": None}]]


def _identity(clip) -> str | None:
    """Which encoder it is, patches included; None, with a line in the log, where that cannot be
    told. The weights as they came count: those at work may carry another clone's patches."""
    patcher, encoder = clip.patcher, clip.cond_stage_model
    try:
        if found := [name for name in CHANGES if getattr(patcher, name, None)]:
            raise TypeError(found[0])
        patches = _plain(patcher.patches)
        return prompt_cache.fingerprint(encoder.stored, encoder.origin, patches)
    except TypeError as error:
        log.warning("Prompts are not kept: this text encoder carries changes (%s)", error)
        return None


def _plain(value):
    """Patches as mappings and sequences; the host's adapters as their names and weights."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "weights") and not isinstance(value, torch.Tensor):
        return [type(value).__name__, _plain(value.weights)]
    return value


def release(clip) -> None:
    """Take a CLIP, clones included, off its device, and out of main memory where a file has its
    weights: they are mapped again."""
    patcher = clip.patcher
    others = [
        m for m in memory.current_loaded_models if m.model is None or not patcher.is_clone(m.model)
    ]
    memory.free_memory(1e30, patcher.load_device, others)
    encoder = clip.cond_stage_model
    if isinstance(encoder, host_text.Encoder) and not host_objects.assign(patcher):
        encoder.load_state_dict(encoder.stored, assign=True)  # in place of copies from the device
    memory.soft_empty_cache()
