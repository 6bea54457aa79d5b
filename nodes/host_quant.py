"""Quantised layers as the host moves, offloads and patches them.

A weight stays in the file's codes, in memory and on the way to the device, and is decoded at each
use. The host's LoRAs are computed on decoded weights, never on codes: at use where the layer is
offloaded; where it is loaded whole, the patched weight stands in for the file's until the patch is
taken off. In fp8 it is codes again, rounded at random, so that changes smaller than a code's step
are kept on average; in the other formats it is plain numbers.
"""

from collections.abc import Mapping

import comfy.model_management as memory
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux2_core import kernels, narrow, products
from ..flux2_core.errors import Flux2Error
from ..flux2_core.formats import Packed
from ..flux2_core.kernels import gemm
from ..flux2_core.kernels.reference import E4M3_MAX, SMALLEST_AMAX

PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class QuantLinear(nn.Module, comfy.ops.CastWeightBiasOp):
    """y = x W'. `weight` holds codes (or, while patched, numbers); scales are buffers beside it.

    `branches` are changes beside it, (x, y) -> y: our LoRAs, which need no other weights. `compute`
    "fp8": activations are made codes of the same kind, where the device multiplies those (fp8,
    MXFP8, NVFP4, INT8); "weights", and every weight that the host changes: decoded at use.
    """

    bias = None
    branches: tuple = ()
    compute = "fp8"
    merged: Tensor | None = None  # the scale of codes that a patch was worked into
    rebases = True

    def __init__(self, packed: Packed, dtype: torch.dtype):
        super().__init__()
        self.format, self.shape, self.dtype = packed.format, packed.shape, dtype
        self.beside = tuple(name for name in packed.parts if name != "weight")
        empty = {k: torch.empty_like(v, device="meta") for k, v in packed.parts.items()}
        self.weight = nn.Parameter(empty.pop("weight"), requires_grad=False)
        for name, part in empty.items():
            self.register_buffer(name, part)
        self._decoded = False

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *_):
        """Takes the tensors as they are: codes and scales are never cast."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        if narrow.is_rebased(self.held):
            self.hold(self.packed)
        for name in ("weight", *self.beside):
            part = state_dict.get(prefix + name)
            if part is None:
                missing.append(prefix + name)
                continue
            part = part if assign else part.clone()
            if name == "weight":
                self.weight = nn.Parameter(part, requires_grad=False)
            else:
                self._buffers[name] = part

    @property
    def packed(self) -> Packed:
        """The file's codes and what stands beside them, where they are now."""
        return narrow.original(self.held)

    def packed_with(self, codes: Tensor) -> Packed:
        """The same with the file's codes, which the host keeps while a patched weight stands in."""
        parts = {name: self._buffers[name] for name in self.beside}
        return narrow.original(Packed(self.format, self.shape, {"weight": codes, **parts}))

    @property
    def held(self) -> Packed:
        """The same as products take them: re-based where a card wants that (narrow.py). A state
        dict has this pair, which means the same: the host asks for one whenever it looks for names."""
        return self._held_on(None)

    def hold(self, packed: Packed) -> None:
        """Its tensors from now on."""
        self._buffers.clear()
        self.weight = nn.Parameter(packed.parts["weight"], requires_grad=False)
        self.beside = tuple(name for name in packed.parts if name != "weight")
        for name in self.beside:
            self.register_buffer(name, packed.parts[name], persistent=name not in narrow.PARTS)

    def _held_on(self, device) -> Packed:
        parts = {"weight": self.weight.data, **self._beside}
        if device is not None:
            moves = {name: part for name, part in parts.items() if name not in narrow.PARTS}
            parts |= {name: self._on(part, device) for name, part in moves.items()}
        return Packed(self.format, self.shape, parts)

    @property
    def _beside(self) -> dict[str, Tensor]:
        """What belongs to the codes that are there now."""
        parts = {name: self._buffers[name] for name in self.beside}
        if self.merged is None:
            return parts
        # how the file's codes were re-based says nothing of these
        kept = {name: part for name, part in parts.items() if name not in narrow.PARTS}
        return {**kept, "weight_scale": self.merged}

    @property
    def _as_stored(self) -> bool:
        """True where the weight is codes and nobody wants to change it."""
        return not self._patched and not self._changes()

    def is_native(self, x: Tensor) -> bool:
        """True where activations are multiplied as codes."""
        able = self.compute == "fp8" and self.format in products.NATIVE and self._as_stored
        return able and products.native(self.held, x)

    def takes_codes(self, x: Tensor) -> bool:
        """True where activations may come as codes: LoRAs and hooks want numbers."""
        if self.branches or self._forward_hooks or self._forward_pre_hooks:
            return False
        return self.format in products.CODED and self.is_native(x)

    def from_codes(self, made: products.Made, x: Tensor, small: bool = False, after=None) -> Tensor:
        comfy.ops.run_every_op()
        return products.from_codes(made, self._held_on(x.device), x, small, after)

    def forward(self, x: Tensor) -> Tensor:
        comfy.ops.run_every_op()
        if self._as_stored:
            how = products.form(self, x) if self.is_native(x) else None
            out = products.product(x, self._held_on(x.device), how)
        else:
            out = F.linear(x, self._numbers(x))
        for branch in self.branches:
            out = branch(x, out)
        return out

    def _numbers(self, x: Tensor) -> Tensor:
        """The matrix in x's dtype, with what the host wants done to it."""
        weight = self.convert_weight(self._on(self.weight, x.device)).to(x.dtype)
        self._decoded = True  # older hosts' patches convert what they are given
        try:
            for change in self._changes():
                weight = change(weight)
        finally:
            self._decoded = False
        return weight.to(x.dtype)

    def _changes(self) -> list:
        """What the host wants done to an offloaded weight."""
        lazy = getattr(self, "weight_lowvram_function", None)
        return [*self.weight_function, *([lazy] if lazy is not None else ())]

    def _on(self, part: Tensor, device) -> Tensor:
        return memory.cast_to(
            part, None, device, non_blocking=memory.device_supports_non_blocking(device)
        )

    def convert_weight(self, weight: Tensor, inplace: bool = False) -> Tensor:
        """Codes, or codes that the host has cast to numbers, -> the matrix they stand for."""
        if self._decoded or self._patched:
            return weight
        codes = weight if weight.dtype == self.weight.dtype else weight.to(self.weight.dtype)
        parts = {name: self._on(part, weight.device) for name, part in self._beside.items()}
        held = Packed(self.format, self.shape, {"weight": codes, **parts})
        return narrow.original(held).decode(weight.dtype if weight.dtype in PLAIN else self.dtype)

    @property
    def _patched(self) -> bool:
        return self.weight.dtype in PLAIN

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kw):
        """A patched matrix takes the place of the codes; the host keeps those and puts them back: by
        setting `weight`, or, `inplace_update`, by writing over what stands there."""
        if return_weight:
            return weight
        if self.format != products.FP8:
            if inplace_update:
                raise Flux2Error(
                    f"A LoRA that comes and goes during a picture cannot change layers in {self.format}",
                    "a hook of the host",
                    "Load this model with precision fp8 or bf16, or use the LoRA for the whole picture",
                )
            self.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
            return
        parts, based = self._beside, narrow.is_rebased(self.held)
        held = parts.get("weight_scale", torch.ones(()))
        own = parts.get(narrow.SCALE, torch.ones(())) if based and not inplace_update else held
        scale = self._on(own, weight.device).float().reshape(-1, 1)
        scale = scale.clamp_min(SMALLEST_AMAX / E4M3_MAX)
        if not inplace_update and "weight_scale" in self.beside:
            # rows that fit keep their scale: where nothing was changed, the codes stay
            most = torch.linalg.vector_norm(weight, torch.inf, 1, keepdim=True).float()
            scale = torch.maximum(scale, most / E4M3_MAX)
        if inplace_update:
            top = gemm.WEIGHT_MAX if based else E4M3_MAX  # sums of re-based codes are float16's
            weight = torch.clamp(weight, -top * scale, top * scale)
        codes = kernels.requantize(weight, scale, seed or 0)
        if inplace_update:
            self.weight.data.copy_(codes)
            self.rebases = False  # what is copied back later has the base that there is now
            return
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.merged = scale

    def __setattr__(self, name: str, value):
        if name == "weight":  # the host puts the file's codes back: their own scale holds again
            self.merged = None
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged is not None and "weight_scale" in self.beside:  # else it is 1
            destination[f"{prefix}weight_scale"] = self.merged

    def _apply(self, fn, recurse: bool = True):
        """Moves between devices; a cast of the network does not reach codes and scales."""

        def move(part: Tensor) -> Tensor:
            moved = fn(part)
            return moved if moved.dtype == part.dtype else part.to(moved.device)

        merged = self.merged
        self.weight = nn.Parameter(move(self.weight.data), requires_grad=False)
        self.merged = merged if merged is None else move(merged)
        for name in self.beside:
            self._buffers[name] = move(self._buffers[name])
        return self


def install(network: nn.Module, state: Mapping, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give a network quantised layers where `state` has packed weights -> a state dict of plain
    tensors, codes and scales. What is no linear layer is decoded, in `dtype`."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = name.rpartition(".")[0]
        if not isinstance(value, Packed):
            out[name] = value
        elif isinstance(network.get_submodule(layer), nn.Linear):
            network.set_submodule(layer, QuantLinear(value, dtype))
            out |= {f"{layer}.{part}": tensor for part, tensor in value.parts.items()}
        else:
            out[name] = value.decode(dtype)
    return out


def coded(network: nn.Module) -> bool:
    """True where layers hold codes. Hosts that fault weights in do so for their own layers: codes
    would cross the bus at each use. Such a network takes the older patcher, which loads layers once."""
    return any(isinstance(layer, QuantLinear) for layer in network.modules())


def plain(state: Mapping) -> dict[str, Tensor]:
    """The weights that are plain numbers."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def count(state: Mapping) -> int:
    """Parameters of a network, however they are stored."""
    return sum(
        value.shape[0] * value.shape[1] if isinstance(value, Packed) else value.numel()
        for value in state.values()
    )
