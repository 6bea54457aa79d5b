"""Weight files: safetensors, one or in shards, or GGUF, found in a folder, checked, read lazily.

A file is untrusted: its header is checked here, in full and within bounds, before anything else
reads it. Tensors are mapped from the file and take no memory until they are used.
Source: the safetensors format (8 bytes of header length, a JSON header, the tensors' bytes).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import files_gguf
from .errors import Flux2Error
from .formats import Packed

MAX_HEADER = 100_000_000  # bytes; the format's own limit
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F32": 32, "I32": 32, "U32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
GGUF = ".gguf"
AGAIN = "Download it again, and compare its size with the one on the download page"
OTHERS = (  # first bytes of what is often named .safetensors and is not
    (b"GGUF", "a GGUF file", "Give it the ending .gguf"),
    (b"PK\x03\x04", "a pickle file, which can run programs", "Choose a .safetensors file"),
    (b"\x80\x02", "a pickle file, which can run programs", "Choose a .safetensors file"),
    (
        b"version https://git-lfs",
        "a placeholder that git left in place of the file",
        "Run git lfs pull",
    ),
    (
        b"<",
        "a web page",
        "Log in on the download page, accept the licence there and download again",
    ),
)


class Entry(NamedTuple):
    dtype: str  # the format's name, such as BF16
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """What one file, or all shards of one network, hold."""

    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    files: Mapping[str, Path]  # tensor name -> the file it is in

    def load(self, names: Mapping[str, str]) -> dict[str, Tensor | Packed]:
        """{name wanted: name in the file} -> tensors on the CPU that share the file's pages; of a
        GGUF file, its quantised matrices as they are."""
        out = {}
        for path in dict.fromkeys(self.files[stored] for stored in names.values()):
            out |= _load(path, {name: s for name, s in names.items() if self.files[s] == path})
        return out


def _load(path: Path, names: Mapping[str, str]) -> Mapping[str, Tensor | Packed]:
    if path.suffix == GGUF:
        return files_gguf.load(path, names)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(stored) for name, stored in names.items()}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def read_header(path: str | Path) -> Header:
    """Names, formats and shapes of a safetensors file, without its tensors.

    Raises Flux2Error unless the header is well formed and describes the file's bytes exactly.
    """
    path = Path(path)
    _refuse_pickle(path)
    if not path.is_file():
        raise Flux2Error("There is no such file", str(path), "Choose one that exists")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise _no_safetensors(path, size)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("it is no table")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no table")
        spans = {name: _span(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        if raw[:1] != b"{":
            raise _no_safetensors(path, size) from error
        raise _damaged(path, f"its table of contents cannot be read: {error}") from error
    _check_spans(path, spans, size - 8 - length)
    tensors = {name: entry for name, (entry, _, _) in spans.items()}
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


def open_checkpoint(path: str | Path, part: str = "") -> Checkpoint:
    """A file, an index.json of shards, or a folder: one network's, or a whole model's in diffusers
    form, of which `part` names the subfolder (transformer, vae, text_encoder)."""
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path / part if part and (path / part).is_dir() else path)
    if path.suffix == ".json":
        return _open_shards(path)
    header = read_gguf(path) if path.suffix == GGUF else read_header(path)
    return Checkpoint(path, header.tensors, header.metadata, dict.fromkeys(header.tensors, path))


def read_gguf(path: Path) -> Header:
    """As `read_header`, for a GGUF file: dtypes are called GGUF Q8_0 and so on."""
    if not path.is_file():
        raise Flux2Error("There is no such file", str(path), "Choose one that exists")
    found, metadata = files_gguf.read(path)
    entries = {
        name: Entry(f"GGUF {tensor.tensor_type.name}", files_gguf.shape_of(tensor))
        for name, tensor in found.items()
    }
    return Header(entries, metadata)


def _in_folder(folder: Path) -> Path:
    """The one network in a folder; the stock name wins over others beside it (fp16 copies)."""
    for stem in ("diffusion_pytorch_model", "model"):
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if (folder / name).is_file():
                return folder / name
    found = sorted(folder.glob("*.safetensors.index*.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found[:4]) or "no .safetensors file"
    raise Flux2Error(
        f"The folder {folder.name} does not hold one model", names, "Choose a file in it"
    )


def _open_shards(index: Path) -> Checkpoint:
    try:
        if index.stat().st_size > MAX_HEADER:
            raise ValueError("too long")
        names = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted(set(names.values()))
        # Windows' rules know both slashes; links are followed, model caches are made of them.
        outside = [shard for shard in shards if PureWindowsPath(shard).name != shard]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(index, "it is no list of shards") from error
    if outside:
        raise Flux2Error(
            f"{index.name} points out of its own folder",
            repr(outside[0]),
            "Do not use this file: get it from the publisher's page",
        )
    headers = {index.parent / shard: read_header(index.parent / shard) for shard in shards}
    files = {name: path for path, header in headers.items() for name in header.tensors}
    lost = [name for name in names if name not in files]
    if lost:
        raise _damaged(index, f"{len(lost)} tensors it lists are in no shard, {lost[0]} the first")
    tensors, metadata = {}, {}
    for header in headers.values():
        tensors.update(header.tensors)
        metadata.update(header.metadata)
    return Checkpoint(index, tensors, metadata, files)


def _span(name: str, entry: Any) -> tuple[Entry, int, int]:
    """One line of the header -> what it is, first byte, end. Raises ValueError."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, end)
        ok = all(type(n) is int and n >= 0 for n in numbers)
        fits = ok and math.prod(shape) * BITS[dtype] == 8 * (end - start)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name[:80]} is not described as a tensor") from error
    if not fits:
        raise ValueError(f"{name[:80]} does not have the bytes its shape needs")
    return Entry(dtype, shape), start, end


def _check_spans(path: Path, spans: Mapping[str, tuple[Entry, int, int]], size: int) -> None:
    """The tensors must fill the file's `size` bytes, one after the other, without gap or overlap."""
    if not spans:
        raise _damaged(path, "it holds no tensors")
    at = 0
    for name, (_, start, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if start != at:
            raise _damaged(path, f"{name[:80]} does not lie where the one before it ends")
        at = end
    if at > size:
        raise Flux2Error(f"{path.name} is cut short", f"{size:,} of {at:,} bytes", AGAIN)
    if at < size:
        raise _damaged(path, f"{size - at:,} bytes too many at its end")


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise Flux2Error(
            f"{path.suffix} files are not opened: they can run any program on your computer",
            path.name,
            "Choose the same model as .safetensors",
        )


def _no_safetensors(path: Path, size: int) -> Flux2Error:
    """What a file is whose first bytes are not safetensors'."""
    if not size:
        return Flux2Error(f"{path.name} is empty", "0 bytes", AGAIN)
    with path.open("rb") as file:
        start = file.read(32).lstrip()
    for magic, what, do in OTHERS:
        if start.startswith(magic):
            return Flux2Error(f"{path.name} is not a safetensors file", what, do)
    return Flux2Error(
        f"{path.name} is not a safetensors file, or damaged", f"{size:,} bytes", AGAIN
    )


def _damaged(path: Path, seen: str) -> Flux2Error:
    return Flux2Error(f"{path.name} is damaged", seen, AGAIN)
