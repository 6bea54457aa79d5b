"""Quantised layers as the host moves, offloads and patches them.

A weight stays in the file's codes, in memory and on the way to the device, and is decoded at each
use. The host's LoRAs are computed on decoded weights, never on codes: at use where the layer is
offloaded; where it is loaded whole, the patched weight stands in for the codes as plain numbers
until the patch is taken off.
"""

from collections.abc import Mapping

import comfy.model_management as memory
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux2_core import narrow, products
from ..flux2_core.formats import Packed

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

    @property
    def held(self) -> Packed:
        """The same as products take them: re-based where a card wants that (narrow.py). A state
        dict has this pair, which means the same: the host asks for one whenever it looks for names."""
        return self._held_on(None)

    def hold(self, packed: Packed) -> None:
        """Its tensors from now on."""
        self.weight = nn.Parameter(packed.parts["weight"], requires_grad=False)
        self.beside = tuple(name for name in packed.parts if name != "weight")
        for name in self.beside:
            self.register_buffer(name, packed.parts[name], persistent=name not in narrow.PARTS)

    def _held_on(self, device) -> Packed:
        parts = {"weight": self.weight.data, **{name: self._buffers[name] for name in self.beside}}
        if device is not None:
            moves = {name: part for name, part in parts.items() if name not in narrow.PARTS}
            parts |= {name: self._on(part, device) for name, part in moves.items()}
        return Packed(self.format, self.shape, parts)

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
        watched = self.branches or self._forward_hooks or self._forward_pre_hooks
        return not watched and self.format in products.CODED and self.is_native(x)

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
        parts = {name: self._on(self._buffers[name], weight.device) for name in self.beside}
        held = Packed(self.format, self.shape, {"weight": codes, **parts})
        return narrow.original(held).decode(weight.dtype if weight.dtype in PLAIN else self.dtype)

    @property
    def _patched(self) -> bool:
        return self.weight.dtype in PLAIN

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kw):
        """A patched matrix takes the place of the codes; the host keeps those and puts them back."""
        if return_weight:
            return weight
        self.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)

    def _apply(self, fn, recurse: bool = True):
        """Moves between devices; a cast of the network does not reach codes and scales."""

        def move(part: Tensor) -> Tensor:
            moved = fn(part)
            return moved if moved.dtype == part.dtype else part.to(moved.device)

        self.weight = nn.Parameter(move(self.weight.data), requires_grad=False)
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


def plain(state: Mapping) -> dict[str, Tensor]:
    """The weights that are plain numbers."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def count(state: Mapping) -> int:
    """Parameters of a network, however they are stored."""
    return sum(
        value.shape[0] * value.shape[1] if isinstance(value, Packed) else value.numel()
        for value in state.values()
    )
