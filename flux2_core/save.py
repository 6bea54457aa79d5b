"""Quantised files, written layer by layer: the whole model is never in memory twice.

Block linears are quantised, all else is bf16. Formats are declared twice: a `comfy_quant` note
beside each layer, and `_quantization_metadata` in the header.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import Flux2Error
from .formats import FORMATS, FP8, Packed, encode
from .quantised import ALIASES, BLOCK_LINEARS

NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
    torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
ROWS = "fp8_rows"
Weight = Callable[[], "Tensor | Packed"]


def save_quantized(
    weights: Mapping[str, Weight],
    path: str | Path,
    format: str = "fp8",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """{BFL name: what gives the weight} -> a new safetensors file; never over another.

    `format`: fp8 (e4m3, a scale for each layer), fp8_rows and int8 (a scale for each row), nvfp4 or
    mxfp8. A weight that is packed so already keeps its codes. Raises Flux2Error for a format that is
    not written, where the file exists, and where the disk does not take it.
    """
    rows, path = format == ROWS, Path(path)
    form = ALIASES.get("fp8" if rows else format, format)
    if form not in FORMATS or FORMATS[form].encode is None:
        raise Flux2Error(
            "This format is not written here", format, "Use fp8, fp8_rows, int8, nvfp4 or mxfp8"
        )
    if path.exists():
        raise Flux2Error("A file of this name exists", path.name, "Choose another name")
    layers = [n.removesuffix(".weight") for n in weights if _is_block(n)]
    said = {"format_version": "1.0", "layers": {n: {"format": form} for n in layers}}
    about = {**(metadata or {}), "_quantization_metadata": json.dumps(said)}
    scratch = path.with_name(path.name + ".part")
    try:
        write(scratch, _tensors(weights, form, rows), about, room(weights, about))
        scratch.replace(path)
    except OSError as error:
        raise Flux2Error(
            "The file could not be written",
            f"{path.name}: {error.strerror}",
            "Free space on the disk",
        ) from error
    finally:
        scratch.unlink(missing_ok=True)
    return path


def _is_block(name: str) -> bool:
    return name.endswith(".weight") and bool(BLOCK_LINEARS.fullmatch(name.removesuffix(".weight")))


def room(weights: Mapping[str, Weight], metadata: Mapping[str, str]) -> int:
    """Bytes that are enough for the header: a weight becomes up to five tensors, and a line of the
    header is its name, its dtype, its shape and two offsets."""
    names = sum(5 * (len(json.dumps(name)) + 200) for name in weights)
    return (len(json.dumps(dict(metadata))) + names + 64) // 8 * 8


def _tensors(weights: Mapping[str, Weight], form: str, rows: bool) -> Iterator[tuple[str, Tensor]]:
    note = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    for name, get in weights.items():
        value = get()
        if not _is_block(name):
            plain = value.decode() if isinstance(value, Packed) else value
            yield name, plain.bfloat16()
            continue
        layer = name.removesuffix("weight")
        if not (isinstance(value, Packed) and _stays(value, form, rows)):
            value = _encode(value.decode() if isinstance(value, Packed) else value, form, rows)
        parts = dict(value.parts)
        if form in FP8:  # a straight cast has no scale, and some readers want one
            parts.setdefault("weight_scale", torch.ones(()))
        yield from ((layer + part, tensor) for part, tensor in parts.items())
        yield layer + "comfy_quant", note


def _stays(packed: Packed, form: str, rows: bool) -> bool:
    """Whether codes are written as they are: where a reader wants one scale for the layer, layers
    with a scale for each row are made anew."""
    scale = packed.parts.get("weight_scale_2" if form == "nvfp4" else "weight_scale")
    single = rows or form not in (*FP8, "nvfp4") or scale is None or scale.numel() == 1
    return packed.format == form and single


def _encode(weight: Tensor, form: str, rows: bool) -> Packed:
    """fp8 with one scale for the layer, which every reader knows; the others as they are."""
    if form != "float8_e4m3fn" or rows:
        return encode(weight, form)
    scale = (weight.float().abs().amax() / 448.0).clamp_min(1e-12)
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    shape = (weight.shape[0], weight.shape[1])
    return Packed(form, shape, {"weight": codes, "weight_scale": scale})


def write(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str], room: int
) -> None:
    """A safetensors file from tensors that come one by one. The header comes first and is known
    last: `room` bytes are left for it, and what it does not need stays blank, as the format allows."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    with path.open("wb") as out:
        out.seek(8 + room)
        for name, tensor in tensors:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            out.write(raw.data)
            span = {"shape": list(tensor.shape), "data_offsets": [at, at + raw.size]}
            table[name] = {"dtype": NAMES[tensor.dtype], **span}
            at += raw.size
        head = json.dumps(table).encode()
        if len(head) > room:
            raise ValueError(f"a header of {len(head)} bytes, room for {room}")
        out.seek(0)
        out.write(struct.pack("<Q", room) + head.ljust(room))
