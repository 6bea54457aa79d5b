"""Quantised layers: found in a file, one by one, and at work in a network.

What a layer is stored in is said by the file: a `comfy_quant` tensor beside it, the header's
`_quantization_metadata`, the older `scaled_fp8` marker, or the layer's own tensors; never by a
list of names. At work a weight is decoded layer by layer, at each use.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import narrow, products
from .errors import Flux2Error
from .formats import FORMATS, FP8, MXFP8_BLOCK, NVFP4_BLOCK, Packed, encode

State = Mapping[str, "Tensor | Packed"]
BESIDE = ("comfy_quant", "weight_scale", "weight_scale_2", "input_scale")
OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
CODES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
BLOCK_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
FP8_FORM = products.FP8


def gather(state: State, metadata: Mapping[str, str], file: str) -> dict[str, "Tensor | Packed"]:
    """A file's tensors, prefix stripped -> the same with every quantised weight as one Packed.

    Raises Flux2Error for a form that is not read, and for tensors that do not fit together.
    """
    check_names({name: str(getattr(tensor, "dtype", "")) for name, tensor in state.items()}, file)
    beside: dict[str, dict[str, Tensor]] = {}
    out: dict[str, Tensor | Packed] = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        part = OLD_NAMES.get(part, part)
        if part in BESIDE and isinstance(tensor, Tensor):
            beside.setdefault(layer, {})[part] = tensor
        elif part != "scaled_fp8":
            out[name] = tensor
    declared = _declared(metadata, file)
    for name, tensor in out.items():
        layer, _, part = name.rpartition(".")
        if part != "weight" or not isinstance(tensor, Tensor) or not _is_codes(tensor):
            continue
        found = beside.get(layer, {})
        said = _said(found.pop("comfy_quant", None), name, file) or _lookup(declared, layer)
        out[name] = _packed(name, tensor, found, said, file)
    return out


def check_names(dtypes: Mapping[str, str], file: str) -> None:
    """Raise for a form that is not read, as far as names and dtypes tell (a header is enough).

    `dtypes` as safetensors or as PyTorch spells them.
    """
    whole = {"I8", "U8", "torch.int8", "torch.uint8"}
    scaled = {
        name.rpartition(".")[0] for name in dtypes if name.endswith(("scale", "scale_weight"))
    }
    seen = ""
    for name, dtype in dtypes.items():
        if ".quant_map" in name:
            seen = "4 bit by bitsandbytes"
        elif name.endswith(".weight_scale_inv"):
            seen = "FP8 in blocks of 128 x 128"
        elif name.endswith(".weight") and dtype in whole and name.rpartition(".")[0] not in scaled:
            seen = f"{name}: {dtype} with no scale beside it"
        if seen:
            raise Flux2Error(
                f"{file} is quantised, in a form that is not read",
                seen,
                "Choose the same model in bf16, fp8, NVFP4, MXFP8, INT8 or GGUF",
            )


def _is_codes(tensor: Tensor) -> bool:
    return tensor.dtype in (*CODES, torch.int8, torch.uint8)


def _declared(metadata: Mapping[str, str], file: str) -> dict[str, str]:
    """Layer -> format, by the file's header. Formats stand alone or in a table."""
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return {k: v if isinstance(v, str) else v["format"] for k, v in layers.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise Flux2Error(
            f"{file} describes its quantised layers wrongly",
            f"_quantization_metadata: {error}",
            "Choose an unmodified file",
        ) from error


def _lookup(declared: Mapping[str, str], layer: str) -> str | None:
    """Names in the header may carry a prefix."""
    ends = (f for name, f in declared.items() if name == layer or name.endswith(f".{layer}"))
    return next(ends, None)


def _said(note: Tensor | None, name: str, file: str) -> str | None:
    """The format that a layer's own note says: JSON as bytes."""
    if note is None:
        return None
    try:
        table = json.loads(bytes(note.flatten().tolist()))
        if table.get("convrot") or table.get("hadamard"):
            raise Flux2Error(
                f"{file} holds rotated INT8 weights, which are not read yet",
                name,
                "Choose plain INT8, fp8 or bf16",
            )
        return table["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Flux2Error(
            f"{file} describes a quantised layer wrongly", f"{name}: {error}", "Download it again"
        ) from error


def _packed(name: str, codes: Tensor, found: dict[str, Tensor], said: str | None, file: str):
    """A weight with what stands beside it. Plain fp8 without a scale is a straight cast."""
    if codes.ndim != 2:  # norms and convolutions are small: plain numbers from here on
        scale = found.get("weight_scale", torch.ones(())).float()
        return (codes.float() * scale.reshape(-1, *[1] * (codes.ndim - 1))).bfloat16()
    form = said if said in FORMATS else _inferred(codes, found)
    if form is None or (said and said not in FORMATS):
        seen = said or f"{codes.dtype} with {', '.join(sorted(found)) or 'nothing'} beside it"
        raise Flux2Error(
            f"{file} is quantised, in a form that is not read",
            f"{name}: {seen}",
            "Choose the same model in bf16, fp8, NVFP4, MXFP8, INT8 or GGUF",
        )
    if form in FP8:
        codes = codes.view(FP8[form]) if codes.dtype == torch.uint8 else codes
        form = CODES.get(codes.dtype, form)
    rows, columns = codes.shape
    shape = (rows, columns * 2) if form == "nvfp4" else (rows, columns)
    _check(name, form, shape, codes, found, file)
    return Packed(form, shape, {"weight": codes, **found})


def _inferred(codes: Tensor, found: Mapping[str, Tensor]) -> str | None:
    scale = found.get("weight_scale")
    if codes.dtype in CODES:
        blocks = scale is not None and scale.dtype in BLOCK_DTYPES
        return "mxfp8" if blocks else CODES[codes.dtype]
    if codes.dtype == torch.int8 and scale is not None:
        return "int8_tensorwise"
    return "nvfp4" if codes.dtype == torch.uint8 and "weight_scale_2" in found else None


def _check(name: str, form: str, shape, codes: Tensor, found: Mapping[str, Tensor], file: str):
    """Raise unless a layer's scales are as many as its format needs."""
    rows, columns = shape
    scale = found.get("weight_scale")
    wanted: tuple = (1, rows)
    if form in ("nvfp4", "mxfp8"):
        block = NVFP4_BLOCK if form == "nvfp4" else MXFP8_BLOCK
        wanted = (-(-rows // 128) * 128 * (-(-columns // block // 4) * 4),)
    missing = (form not in FP8 and scale is None) or (
        form == "nvfp4" and "weight_scale_2" not in found
    )
    kind = {"nvfp4": torch.uint8, "int8_tensorwise": torch.int8}.get(form)
    if (
        missing
        or (scale is not None and scale.numel() not in wanted)
        or kind not in (None, codes.dtype)
    ):
        seen = "no scale" if scale is None else f"{scale.numel()} scales"
        raise Flux2Error(
            f"A quantised layer of {file} does not fit together",
            f"{name}: {form}, {rows} x {columns}, {codes.dtype}, {seen}",
            "Download the file again",
        )


class QuantLinear(nn.Module):
    """y = x W'. Its tensors keep their dtypes whatever the network is cast to.

    `branches` are changes beside it, (x, y) -> y: LoRAs. `held` is what products take, re-based
    where a card wants that (narrow.py), `packed` the file's own tensors.
    `compute` "fp8": activations are made codes of the same kind, where the device multiplies those
    (fp8, MXFP8, NVFP4, INT8); "weights": W is decoded at each call, in x's dtype.
    """

    compute = "fp8"
    branches: tuple = ()
    rebases = True  # False where others hold its tensors
    weight: Tensor

    def __init__(self, packed: Packed):
        super().__init__()
        self.format, self.shape = packed.format, packed.shape
        self.hold(packed)

    def hold(self, packed: Packed) -> None:
        """Its tensors from now on."""
        self._buffers.clear()
        for name, part in packed.parts.items():
            self.register_buffer(name, part)

    @property
    def held(self) -> Packed:
        return Packed(self.format, self.shape, dict(self.named_buffers(recurse=False)))

    @property
    def packed(self) -> Packed:
        return narrow.original(self.held)

    def is_native(self, x: Tensor) -> bool:
        """True where activations are multiplied as codes."""
        if self.compute != "fp8" or self.format not in products.NATIVE:
            return False
        return products.native(self.held, x)

    def takes_codes(self, x: Tensor) -> bool:
        """True where activations may come as codes: LoRAs and hooks want numbers."""
        watched = self.branches or self._forward_hooks or self._forward_pre_hooks
        return not watched and self.format in products.CODED and self.is_native(x)

    def from_codes(
        self, made: products.Made, x: Tensor, small: bool = False, after: Any = None
    ) -> Tensor:
        return products.from_codes(made, self.held, x, small, after)

    def forward(self, x: Tensor) -> Tensor:
        how = products.form(self, x) if self.is_native(x) else None
        out = products.product(x, self.held, how)
        for branch in self.branches:
            out = branch(x, out)
        return out

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        for name, part in self.packed.parts.items():
            destination[prefix + name] = part if keep_vars else part.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if narrow.is_rebased(self.held):
            self.hold(self.packed)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        """Moves between devices; a cast of the network does not reach codes and scales."""
        for name, part in self.named_buffers(recurse=False):
            moved = fn(part)
            self._buffers[name] = moved if moved.dtype == part.dtype else part.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {self.format}"


def install(network: nn.Module, state: State, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give a network quantised layers where `state` has them -> the plain tensors that are left.

    What is no linear layer (an embedding, say) is decoded, in `dtype`.
    """
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = name.rpartition(".")[0]
        if not isinstance(value, Packed):
            plain[name] = value
        elif isinstance(network.get_submodule(layer), nn.Linear):
            network.set_submodule(layer, QuantLinear(value))
        else:
            plain[name] = value.decode(dtype)
    return plain


BLOCK_LINEARS = re.compile(r"(double|single)_blocks\..*(qkv|proj|mlp\.[02]|linear[12])")
ALIASES = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}


def quantize(network: nn.Module, format: str = "fp8") -> nn.Module:
    """The transformer's block linears in another format, in place: fp8 and int8 with a scale for
    each row, nvfp4, mxfp8. All else stays as it is. Raises Flux2Error for a format that is only read."""
    form = ALIASES.get(format, format)
    layers = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and BLOCK_LINEARS.fullmatch(name)
    ]
    for name in layers:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(name, QuantLinear(encode(layer.weight.detach(), form)))
    return network
