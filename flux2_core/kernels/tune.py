"""What our own matrix product gains on this card, measured there once and remembered.

Nothing is measured unless asked (`python3 dev.py bench tune`): it takes minutes and the card for
itself. Until then, and wherever our kernel is not at least WORTH times as fast as the next best,
it stays off. Results are kept in the user's cache folder, apart for each card, driver and version
of PyTorch and Triton.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import Flux2Error
from . import tiles
from .tiles import Tile

WORTH = 1.1  # times the speed of the next best, below which our kernel stays off

# operation -> how its kernel may accumulate
# The forms of fp8_linear_fused: "fused" with residual and gate, "lora" with a LoRA too, "narrow"
# with codes so small that sums fit into float16. "mxfp8" is PyTorch's product (replicated.py).
FORMS = {
    "fp8_linear": ("block", "mxfp8", "fp32"),
    "fp8_linear_narrow": ("fp16",),
    "fp8_linear_fused": ("block", "fp32"),
    "fp8_linear_fused_narrow": ("fp16",),
    "fp8_linear_lora": ("block", "fp32"),
    "fp8_linear_lora_narrow": ("fp16",),
    "fp8_weight_linear": ("weight",),
}


class Shape(NamedTuple):
    """A product (rows, depth) by (columns, depth)'."""

    rows: int
    columns: int
    depth: int


class Found(NamedTuple):
    """The best form of a kind of product, with the best of our tiles where the kernel is ours, and
    the next best's time over its time."""

    accumulate: str
    tile: Tile | None
    speedup: float


class Line(NamedTuple):
    """One measurement; `error` says why a candidate has no time."""

    op: str
    shape: Shape
    accumulate: str  # "" is the next best: what serves without our kernel
    tile: Tile | None
    seconds: float | None
    error: str = ""


# ------------------------------------------------------------------------------------- remembering


def folder() -> Path:
    """The user's cache folder, as dev.py has it."""
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "flux2-kit"


def file() -> Path:
    return folder() / "kernels.json"


@cache
def card(device: torch.device) -> str:
    """What a measurement holds for: the card, Triton, PyTorch and the driver."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "unknown"  # triton-windows is a package of another name
    version = getattr(torch._C, "_cuda_getDriverVersion", None)  # absent without CUDA
    driver = version() if version and torch.cuda.is_available() else 0
    name = torch.cuda.get_device_name(device)
    return f"{name} | triton {triton} | torch {torch.__version__} | driver {driver}"


def found(op: str, device: torch.device, rows: int, columns: int, depth: int) -> Found | None:
    """What tuning found for a product, or None where it was not measured on this card."""
    if device.type != "cuda" or not (known := _remembered()):
        return None
    line = known.get(card(device), {}).get(_key(op, rows, columns, depth))
    if line is None:
        return None
    tile = None if line["tile"] is None else Tile(*line["tile"])
    return Found(line["accumulate"], tile, line["speedup"])


def remember(device_key: str, results: dict[str, Found]) -> Path:
    """Adds results to the file. Returns where it is."""
    target = file()
    known = _read(target) | {device_key: _written(results)}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(known, indent=1), "utf-8")
    scratch.replace(target)
    _remembered.cache_clear()
    return target


def _written(results: dict[str, Found]) -> dict:
    return {key: {**f._asdict(), "tile": f.tile and list(f.tile)} for key, f in results.items()}


@cache
def _remembered() -> dict:
    return _read(file())


def _read(target: Path) -> dict:
    """An unreadable file is as good as none: it only ever held measurements."""
    try:
        known = json.loads(target.read_text("utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _key(op: str, rows: int, columns: int, depth: int) -> str:
    return f"{op} {tiles.bucket(rows)} {columns} x {depth}"


# --------------------------------------------------------------------------------------- measuring


def shapes(hidden: int) -> list[Shape]:
    """The products of a transformer's blocks, for 512 text tokens and for a picture with them."""
    widths = [(9, 1), (1, 4), (3, 1), (1, 1), (6, 1), (1, 3)]
    return [Shape(m, n * hidden, k * hidden) for m in (512, 4608) for n, k in widths]


def tune(
    arch: int,
    wanted: Iterable[Shape],
    seconds: Callable[[str, Shape, str, Tile | None], float],
    told: Callable[[Line], None] = lambda line: None,
) -> dict[str, Found]:
    """Times every shipped tile of `arch` for every shape -> the best of each kind of product.

    seconds(op, shape, accumulate, tile) runs one candidate, accumulate "" being the next best, and
    raises for what does not run or is wrong; `told` hears of each.
    """
    best: dict[str, Found] = {}
    for shape in wanted:
        for op, forms in FORMS.items():
            choices = [(f, t) for f in forms for t in _tiles(f, arch, shape.rows)]
            if not choices or not _asked(op, shape):
                continue
            base = _timed(seconds, op, shape, "", None)
            told(base)
            if base.seconds is None:
                continue
            for accumulate, tile in choices:
                line = _timed(seconds, op, shape, accumulate, tile)
                told(line)
                key = _key(op, *shape)
                if line.seconds and (
                    key not in best or base.seconds / line.seconds > best[key].speedup
                ):
                    best[key] = Found(accumulate, tile, base.seconds / line.seconds)
    return best


def _tiles(form: str, arch: int, rows: int) -> tuple[Tile | None, ...]:
    """None for a form that PyTorch computes."""
    if form == "mxfp8":
        return (None,) if tiles.known(arch) == 120 else ()
    return tiles.tiles(form, arch, rows)


def _asked(op: str, shape: Shape) -> bool:
    """Something is added to what leads back to the model's width alone."""
    return shape.columns <= shape.depth or not ("fused" in op or "lora" in op)


def _timed(seconds: Callable, op: str, shape: Shape, accumulate: str, tile: Tile | None) -> Line:
    try:
        return Line(op, shape, accumulate, tile, seconds(op, shape, accumulate, tile))
    except Exception as error:  # a tile that does not run here is no reason to end
        why = (str(error).strip().splitlines() or ["no message"])[0]
        return Line(op, shape, accumulate, tile, None, f"{type(error).__name__}: {why}"[:200])


def the_card() -> torch.device:
    """The card to tune for. Raises Flux2Error where there is none."""
    if not torch.cuda.is_available() or torch.version.hip:
        raise Flux2Error("There is no NVIDIA card here to tune for")
    return torch.device("cuda", torch.cuda.current_device())
