"""GGUF files, read through the `gguf` package: names and shapes at once, tensors mapped at use."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import Flux2Error
from .formats import Packed
from .formats_gguf import TYPES

ROTATED = ("llama", "mistral3")  # architectures whose query and key rows stand in another order
PLAIN = {"F32": torch.float32, "F16": torch.float16}
FAULTS = (
    ValueError, KeyError, IndexError, OverflowError, TypeError, AttributeError, MemoryError, OSError,
)  # fmt: skip


def read(path: Path):
    """-> (the reader's tensors by name, {key: text}). Raises Flux2Error for what cannot be read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise Flux2Error(
            f"{path.name} is a GGUF file, which needs the Python package gguf",
            "it is not installed",
            "Install it into ComfyUI's Python (pip install gguf), or choose a .safetensors file",
        ) from error
    try:
        reader = GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        texts = ("general.architecture", "general.name")
        fields = {key: reader.fields[key] for key in texts if key in reader.fields}
        metadata = {key: str(field.contents()) for key, field in fields.items()}
    except FAULTS as error:
        raise Flux2Error(
            f"{path.name} is damaged",
            f"its table of contents cannot be read: {str(error)[:120]}",
            "Download it again, and compare its size with the one on the download page",
        ) from error
    known = {*PLAIN, *TYPES}
    if strange := sorted({t.tensor_type.name for t in tensors.values()} - known):
        raise Flux2Error(
            f"{path.name} is quantised, in a form that is not read",
            ", ".join(strange),
            f"Choose one of {', '.join(TYPES)}",
        )
    if not tensors:
        raise Flux2Error(f"{path.name} holds no tensors", "an empty GGUF file", "Download it again")
    return tensors, metadata


def shape_of(tensor) -> tuple[int, ...]:
    """GGUF counts its axes from the other end."""
    return tuple(int(n) for n in reversed(tensor.shape.tolist()))


def load(path: Path, names: Mapping[str, str]) -> dict[str, Tensor | Packed]:
    """{name wanted: name in the file} -> what shares the file's pages."""
    tensors, _ = read(path)
    return {name: _tensor(tensors[stored]) for name, stored in names.items()}


def _tensor(found) -> Tensor | Packed:
    kind, shape = found.tensor_type.name, shape_of(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mapped for reading only, and never written to
        data = torch.from_numpy(found.data)
    if kind in PLAIN:
        return data.reshape(shape)
    if kind == "BF16" or len(shape) != 2:
        rows = data.reshape(1, -1)
        return TYPES[kind].decode(rows.reshape(-1, TYPES[kind].bytes)).reshape(shape).bfloat16()
    return Packed(f"gguf {kind}", (shape[0], shape[1]), {"weight": data})


def restore_rotary(weight: Tensor | Packed, head_dim: int) -> Tensor | Packed:
    """The rows of a query or key projection as Hugging Face has them.

    llama.cpp's files of the Llama and Mistral families pair neighbouring rows of a head, where
    Hugging Face pairs row i with row i + D / 2. Rows move whole, so quantised ones stay exact.
    """
    rows = torch.arange(weight.shape[0]).reshape(-1, head_dim // 2, 2).mT.flatten()
    if isinstance(weight, Packed):
        return Packed(weight.format, weight.shape, {"weight": weight.parts["weight"][rows]})
    return weight[rows]
