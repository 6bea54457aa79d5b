"""MODEL: the host's own classes around our networks, and what CLIP and VAE share with it."""

import logging
from collections.abc import Mapping
from pathlib import Path

import comfy.hooks
import comfy.model_management as memory
import comfy.model_patcher
import comfy.utils
import torch

from ..flux2_core.checkpoint import choose_variant, locate, read_state_dict
from ..flux2_core.configs import TransformerConfig, Variant
from ..flux2_core.info import how_told
from ..flux2_core.precision import AUTO, choices, compute, store
from . import host_quant
from .host_model import Config, Model

log = logging.getLogger(__name__)


def patch(module, *, load_device, offload_device, reload: tuple, disable_dynamic: bool = False):
    """The host's patcher around a module. `reload` = (function, arguments) makes the same patcher
    anew: newer hosts call it, with disable_dynamic=True, for hooks, compilation, second devices.

    Newer hosts swap the patcher's class when they start: it is asked for at call time.
    """
    kind = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", kind)
    patcher = kind(module, load_device=load_device, offload_device=offload_device)
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = reload
    return patcher


def assign(patcher) -> dict:
    """{"assign": True} where the host keeps weights in files and faults them in as they are used."""
    return {"assign": True} if getattr(patcher, "is_dynamic", lambda: False)() else {}


def load_model(
    path: str,
    variant: str | None = None,
    precision: str = AUTO,
    layers: str = "",
    disable_dynamic: bool = False,
):
    """A transformer file, or "nano" -> MODEL. `variant` None: what the file says. `precision` and
    its exceptions `layers`: as in flux2_core.precision."""
    state, metadata, config = read_state_dict(path, "transformer")
    chosen = choose_variant(locate(path, "transformer"), config, metadata, variant)
    told = how_told(config, chosen, metadata, variant is not None)
    log.info("%s is %s, %s.", Path(path).name, chosen.label, told)
    wanted = choices((name.removesuffix(".weight") for name in state), precision, layers)
    state = store(state, wanted)
    reload = (load_model, (path, variant, precision, layers))
    how = {"wanted": wanted, "disable_dynamic": disable_dynamic}
    return build_model(chosen.transformer, state, chosen, reload, **how)


def build_model(
    config: TransformerConfig,
    state: dict,
    variant: Variant | None,
    reload: tuple,
    dtype: torch.dtype | None = None,
    wanted: Mapping[str, str] = {},
    disable_dynamic: bool = False,
):
    """Weights under BFL names, complete -> MODEL. `wanted`: precision of layers, as `store` made
    them."""
    described = Config(config)
    devices = {
        "load_device": memory.get_torch_device(),
        "offload_device": memory.unet_offload_device(),
    }
    kinds = described.supported_inference_dtypes
    dtype = dtype or memory.unet_dtype(
        model_params=host_quant.count(state),
        supported_dtypes=kinds,
        weight_dtype=comfy.utils.weight_dtype(host_quant.plain(state)),
    )
    described.set_inference_dtype(
        dtype, memory.unet_manual_cast(dtype, devices["load_device"], kinds)
    )
    model = Model(config, described, variant)
    network = model.diffusion_model
    state = host_quant.install(network, state, network.dtype or torch.bfloat16)
    compute(network, wanted)
    if not memory.is_device_cpu(devices["offload_device"]):
        model.to(devices["offload_device"])
    coded = host_quant.coded(network)
    patcher = patch(model, **devices, reload=reload, disable_dynamic=disable_dynamic or coded)
    if coded:
        # for speed the host would keep patched numbers, and copy them onto codes at the next step
        patcher.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    model.load_model_weights(dict(state), "", **assign(patcher))
    return patcher


def fill(holder, module, state: dict, *, keep=None, **how) -> None:
    """Give a module its weights and the holder (a CLIP or VAE) its patcher; `how`: see `patch`.

    Where the host does not keep weights in files, the module has a copy of them or, with `keep`
    (weights -> weights in its dtype), these very tensors, which a file may back.
    """
    module.requires_grad_(False)
    if hasattr(memory, "archive_model_dtypes"):
        memory.archive_model_dtypes(module)
    holder.patcher = patch(module, **how)
    lazily = assign(holder.patcher)
    if keep and not lazily:
        state, lazily = keep(state), {"assign": True}
    module.load_state_dict(state, **lazily)


def patch_of(load, *files, disable_dynamic: bool = False):
    """The patcher alone of what `load` makes of the files."""
    return load(*files, disable_dynamic=disable_dynamic).patcher
