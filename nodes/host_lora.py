"""A LoRA on a MODEL: the host's own patches on plain layers, side branches on quantised ones."""

from collections.abc import Iterable
from functools import partial

import comfy.lora
import torch
from torch import Tensor, nn

from ..flux2_core.errors import Flux2Error
from ..flux2_core.lora import Branch, Delta, read, relative
from .host import config_of
from .host_quant import QuantLinear

SAMPLE = 8  # layers whose weights are read for the report: all of dev's would take a minute
NAMES = {"A": "lora_down.weight", "B": "lora_up.weight", "dora": "dora_scale"}


def with_lora(model, path: str, strength: float):
    """-> (a clone of a MODEL, ours or the host's, with the LoRA; the report).

    Raises Flux2Error for a file that does not belong to this model.
    """
    config, network = config_of(model), model.model.diffusion_model
    layers = linears(network)
    if not layers:
        raise Flux2Error(
            "This model's layers cannot be changed by FLUX.2 LoRA",
            "a quantised model from the host's own loader",
            "Load it with FLUX.2 Load Model or FLUX.2 Loader",
        )
    deltas, report = read(path, config, {name: shape(layer) for name, layer in layers.items()})
    some = deltas[:: max(1, len(deltas) // SAMPLE)]
    weights = (weight_of(layers[delta.place.layer]) for delta in some)
    with torch.inference_mode():
        report.relative = relative(some, weights, config.hidden_size)
    out = model.clone()
    if strength:
        beside = [d for d in deltas if isinstance(layers[d.place.layer], QuantLinear)]
        _branch(out, beside, layers, config.hidden_size, strength)
        _patch(out, [d for d in deltas if d not in beside], config.hidden_size, strength)
    return out, report


def _branch(model, deltas: Iterable[Delta], layers: dict, width: int, strength: float) -> None:
    """Side branches as attributes that the host sets while this clone is in use."""
    for delta in deltas:
        name = f"diffusion_model.{delta.place.layer}.branches"
        branch = Branch(delta, partial(weight_of, layers[delta.place.layer]), width)
        before = model.object_patches.get(name, ())
        model.add_object_patch(name, (*before, partial(_with_strength, branch, strength)))


def _with_strength(branch: Branch, strength: float, x: Tensor, out: Tensor) -> Tensor:
    return branch(x, out, strength)


def _patch(model, deltas: Iterable[Delta], width: int, strength: float) -> None:
    """The host computes, moves and offloads these; it gets each change under a name of its own."""
    tensors, targets = {}, {}
    for i, delta in enumerate(deltas):
        key, rows = f"diffusion_model.{delta.place.layer}.weight", delta.span(width)
        targets[str(i)] = (
            key if rows == slice(None) else (key, (0, rows.start, rows.stop - rows.start))
        )
        parts = dict(delta.parts)
        if delta.place.swap:
            parts = _swapped(delta)
        tensors |= {f"{i}.{NAMES.get(part, part)}": tensor for part, tensor in parts.items()}
    patches = comfy.lora.load_lora(tensors, targets)
    taken = model.add_patches(patches, strength)
    lost = [target for target in targets.values() if target not in taken]
    if lost:
        raise Flux2Error(
            "The host did not take all of this LoRA",
            f"{len(lost)} of {len(targets)} changes, {lost[0]} the first",
            "Update ComfyUI, or load the model with FLUX.2 Load Model",
        )


def _swapped(delta: Delta) -> dict[str, Tensor]:
    """A change whose rows' halves change places, in the order of the model."""
    parts = dict(delta.parts)
    if "A" not in parts:
        return {"diff": delta.matrix()}
    for part in {"B", "dora"} & parts.keys():
        parts[part] = torch.cat(parts[part].chunk(2)[::-1])
    return parts


def linears(network: nn.Module) -> dict[str, nn.Module]:
    found = ((n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, QuantLinear)))
    return {name: layer for name, layer in found if layer.weight is not None}


def shape(layer: nn.Module) -> tuple[int, int]:
    rows, columns = layer.shape if isinstance(layer, QuantLinear) else layer.weight.shape
    return rows, columns


def weight_of(layer: nn.Module) -> Tensor:
    return (
        layer.convert_weight(layer.weight).float()
        if isinstance(layer, QuantLinear)
        else layer.weight
    )
