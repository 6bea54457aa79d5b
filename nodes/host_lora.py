"""A LoRA on a MODEL: the host's own patches on plain layers, side branches on quantised ones."""

import uuid
from collections.abc import Iterable
from functools import partial

import comfy.lora
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ..flux2_core.beside import Branch, Change
from ..flux2_core.errors import Flux2Error
from ..flux2_core.lora import Delta, read, relative
from ..flux2_core.lora_names import Place
from .host import config_of
from .host_quant import QuantLinear

SAMPLE = 8  # layers whose weights are read for the report: all of dev's would take a minute
NAMES = {"A": "lora_down.weight", "B": "lora_up.weight"}


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
    weights = (weight_of(model, delta.place.layer) for delta in some)
    with torch.inference_mode():
        report.relative = relative(some, weights, config.hidden_size)
    report.measured = len(some) if len(some) < len(deltas) else None
    out = model.clone()
    if strength:
        beside = [d for d in deltas if isinstance(layers[d.place.layer], QuantLinear)]
        _branch(out, beside, config.hidden_size, strength)
        _patch(out, [d for d in deltas if d not in beside], config.hidden_size, strength)
    return out, report


def _branch(model, deltas: Iterable[Delta], width: int, strength: float) -> None:
    """Side branches as attributes that the host sets while this clone is in use."""
    for delta in deltas:
        name = f"diffusion_model.{delta.place.layer}.branches"
        branch = Branch(delta, partial(weight_of, model, delta.place.layer), width)
        before = model.object_patches.get(name, ())
        model.add_object_patch(name, (*before, Change(branch, strength)))


def _patch(model, deltas: Iterable[Delta], width: int, strength: float) -> None:
    """The host computes, moves and offloads these, one by one: a layer may have several."""
    for delta in deltas:
        key, rows = f"diffusion_model.{delta.place.layer}.weight", delta.span(width)
        target = key if rows == slice(None) else (key, (0, rows.start, rows.stop - rows.start))
        if target not in model.add_patches({target: _adapter(delta)}, strength):
            raise Flux2Error(
                "The host did not take all of this LoRA",
                f"a change of {delta.place.layer}",
                "Update ComfyUI, or load the model with FLUX.2 Load Model",
            )
    model.patches_uuid = uuid.uuid4()  # for side branches too: caches tell weights apart by it


def _adapter(delta: Delta):
    """The host's own object for a change; ours where the host's formula is another."""
    if "dora" in delta.parts or (delta.place.swap and "A" not in delta.parts):
        parts = delta.parts
        return Exact(set(), (tuple(delta.place), tuple(parts), tuple(parts.values())))
    parts = dict(delta.parts)
    if delta.place.swap:
        parts["B"] = torch.cat(parts["B"].chunk(2)[::-1])
    tensors = {f"0.{NAMES.get(part, part)}": tensor for part, tensor in parts.items()}
    return comfy.lora.load_lora(tensors, {"0": "0"})["0"]


class Exact(WeightAdapterBase):
    """A change computed by the core, when the host patches the layer.

    DoRA: the host divides by the norms of the weight before the change, trainers by those after it.
    Newer hosts make another of it from `loaded_keys` and `weights`, whose tensors they have moved.
    """

    name = "flux2kit"

    def __init__(self, loaded_keys: set, weights: tuple):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(self, weight, key, strength, *_, **__):
        place, names, tensors = self.weights
        parts = (tensor.to(weight.device) for tensor in tensors)
        delta = Delta(Place(*place), dict(zip(names, parts, strict=True)))
        return weight.add_((strength * delta.matrix(weight)).to(weight.dtype))


def linears(network: nn.Module) -> dict[str, nn.Module]:
    found = ((n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, QuantLinear)))
    return {name: layer for name, layer in found if layer.weight is not None}


def shape(layer: nn.Module) -> tuple[int, int]:
    rows, columns = layer.shape if isinstance(layer, QuantLinear) else layer.weight.shape
    return rows, columns


def weight_of(model, layer: str) -> Tensor:
    """A layer's weight as it was loaded: while a clone with a LoRA is in use, the host keeps it aside."""
    module = model.model.diffusion_model.get_submodule(layer)
    aside = model.backup.get(f"diffusion_model.{layer}.weight")
    if isinstance(module, QuantLinear):
        packed = module.packed if aside is None else module.packed_with(aside.weight)
        return packed.decode()
    return module.weight if aside is None else aside.weight
