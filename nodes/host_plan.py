"""What the plan asks of the host: the device's memory, the model's speed, a text on the node."""

from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management as memory
import torch
from comfy.ldm.modules.attention import optimized_attention
from server import PromptServer

from ..flux2_core.estimate import Clock, calibrate
from ..flux2_core.info import Info
from ..flux2_core.kv_cache import ReferenceCache
from .host import config_of
from .host_controls import CACHE, KV, is_ours

_clocks: WeakKeyDictionary = WeakKeyDictionary()  # of the models that have been timed


class Device(NamedTuple):
    """Bytes: free now, in all, and weights of the model that still have to come."""

    name: str
    free: int
    total: int
    weights: int


def device_of(model) -> Device:
    """The device that a MODEL runs on."""
    device = model.load_device
    moves = device != model.offload_device
    missing = max(0, model.model_size() - model.loaded_size()) if moves else 0
    return Device(
        str(device), memory.get_free_memory(device), memory.get_total_memory(device), missing
    )


def dtype_of(model) -> torch.dtype:
    """What a MODEL computes in."""
    return model.model.manual_cast_dtype or model.model.get_dtype()


def cache_of(model) -> ReferenceCache | None:
    """The cache that FLUX.2 Reference Cache gave a MODEL."""
    return _options(model).get(CACHE)


def in_kv_form(model) -> bool:
    return config_of(model).kv_references or bool(_options(model).get(KV))


def clock_of(model) -> Clock | None:
    """How fast a MODEL of this pack is here: timed once, for about a second, with its weights where
    they will be when it draws. None for the host's own, whose blocks are not called like ours."""
    if not is_ours(model):
        return None
    network, kind = model.model, dtype_of(model)
    if kind not in _clocks.get(network, {}):
        memory.load_models_gpu([model])
        attend = partial(_attend, config_of(model).heads, _options(model))
        made = calibrate(
            network.diffusion_model, attend=attend, device=model.load_device, dtype=kind
        )
        _clocks.setdefault(network, {})[kind] = made
    return _clocks[network][kind]


def _attend(heads: int, options: dict, q, k, v):
    return optimized_attention(q, k, v, heads, skip_reshape=True, transformer_options=options)


def _options(model) -> dict:
    return model.model_options.get("transformer_options", {})


def show(hidden, text: str) -> None:
    """Write a text on the node that runs; older front ends show no other."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and hidden is not None and hidden.unique_id is not None:
        server.send_progress_text(text, hidden.unique_id)


def room_for(info: Info) -> list[str]:
    """What this computer will do with a file: sentences for the report."""
    if info.kind not in ("transformer", "text encoder"):
        return []
    device = memory.get_torch_device()
    free, total = memory.get_free_memory(device), memory.get_total_memory(device)
    fits = info.bytes < free
    how = (
        "fits as a whole"
        if fits
        else "does not fit as a whole: layers wait in main memory and come as they are used"
    )
    lines = [
        f"On {device}: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free; it needs "
        f"{info.bytes / 1e9:.2f} GB for its weights and {how}."
    ]
    if any(word in str(info) for word in ("fp8", "NVFP4", "INT8", "GGUF")):
        lines.append("Quantised layers are decoded one by one, at each use.")
    return lines
