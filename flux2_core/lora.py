"""LoRA and its relatives, in every dialect, onto plain and quantised layers.

delta = strength * (alpha / rank) * B A; without alpha the factor is 1. LoKr is a Kronecker product,
whose alpha counts only where a factor is itself a product; LoHa an elementwise product of two
products; DoRA rescales the rows of the changed weight. Source: LoRA (2106.09685), LyCORIS
(2309.14859), DoRA (2402.09353).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .beside import Branch, Change
from .configs import VARIANTS, TransformerConfig
from .errors import Flux2Error
from .files import open_checkpoint
from .formats import Packed
from .lora_names import TEXT_ENCODERS, Place, split, table, without_prefix
from .lora_report import Report, dialect
from .quantised import QuantLinear
from .transformer import Flux2Transformer

LINEAR = (nn.Linear, QuantLinear)


@dataclass(frozen=True, eq=False)
class Delta:
    """The change of one layer, or of some of its rows; `parts` as `lora_names.split` calls them."""

    place: Place
    parts: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        """alpha / rank, where the change is a product of that rank."""
        rank = self._rank()
        alpha = self.parts.get("alpha")
        return 1.0 if alpha is None or rank is None else float(alpha) / rank

    def _rank(self) -> int | None:
        for part in ("A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if part in self.parts:
                return self.parts[part].shape[0]
        return None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A, B) with the scale in B, where the change is a plain product; else None."""
        if "A" not in self.parts or "B" not in self.parts or "dora" in self.parts:
            return None
        return self.parts["A"].flatten(1), self._swapped(self.parts["B"].flatten(1)) * self.scale

    def matrix(self, weight: Tensor | None = None) -> Tensor:
        """-> float32 (rows, in). DoRA needs the `weight` of those rows."""
        p = {name: tensor.float() for name, tensor in self.parts.items()}
        if "diff" in p:
            delta = p["diff"].flatten(1)
        elif "A" in p:
            delta = p["B"].flatten(1) @ p["A"].flatten(1) * self.scale
        elif "hada_w1_a" in p:
            delta = (
                _product(p, "hada_w1", "hada_t1") * _product(p, "hada_w2", "hada_t2") * self.scale
            )
        else:
            delta = (
                torch.kron(_product(p, "lokr_w1"), _product(p, "lokr_w2", "lokr_t2")) * self.scale
            )
        delta = self._swapped(delta)
        if "dora" not in p:
            return delta
        if weight is None:
            raise ValueError("DoRA changes a weight that must be given")
        changed = weight.float() + delta
        size = (
            p["dora"].reshape(-1, 1)
            if p["dora"].numel() == len(changed)
            else p["dora"].reshape(1, -1)
        )
        norm = changed.norm(dim=1 if size.shape[0] > 1 else 0, keepdim=True)
        return (
            changed * (self._swapped(size) if size.shape[0] > 1 else size) / norm - weight.float()
        )

    def _swapped(self, rows: Tensor) -> Tensor:
        return torch.cat(rows.chunk(2)[::-1]) if self.place.swap else rows

    def span(self, width: int) -> slice:
        """The rows that change, in a model of this width."""
        if self.place.rows is None:
            return slice(None)
        return slice(self.place.rows[0] * width, self.place.rows[1] * width)


def _product(p: Mapping[str, Tensor], name: str, core: str = "") -> Tensor:
    """A factor: whole, or a product of two, with a Tucker core or without."""
    if name in p:
        return p[name].flatten(1)
    a, b = p[f"{name}_a"], p[f"{name}_b"]
    if core in p:
        return torch.einsum("ij...,jr,ip->pr...", p[core], b, a).flatten(1)
    return a @ b


def read(
    path: str | Path, config: TransformerConfig, shapes: Mapping[str, tuple[int, int]]
) -> tuple[list[Delta], Report]:
    """A LoRA file, for a model with these linear layers (BFL name -> (out, in)).

    Raises Flux2Error for a file that is no LoRA, one for another model or another model size.
    """
    checkpoint = open_checkpoint(Path(path))
    report = Report(checkpoint.path.name, dialect(checkpoint.tensors))
    known, places = table(shapes), {}
    for key in checkpoint.tensors:
        parted = split(key)
        name = without_prefix(parted[0]) if parted else ""
        if key.startswith(TEXT_ENCODERS):
            report.skipped[key] = "for a text encoder"
        elif key.endswith((".diff_b", ".bias")):
            report.skipped[key] = "a bias, which FLUX.2 does not have"
        elif parted is None:
            report.skipped[key] = "not a part of a LoRA that is known here"
        elif name not in known:
            report.skipped[key] = "for a layer that this model does not have"
        else:
            one = _one(key, *parted)
            places.setdefault((known[name], *one), {})[parted[1]] = key
    deltas, given = [], _peft_alpha(checkpoint.path)
    _share(places)
    for (place, name, _), keys in places.items():
        alpha = checkpoint.tensors[keys["alpha"]].shape if "alpha" in keys else ()
        if reason := _incomplete(keys) or (math.prod(alpha) != 1 and "an alpha that is no number"):
            report.skipped |= dict.fromkeys(keys.values(), reason)
            continue
        parts = {
            part: found.decode() if isinstance(found, Packed) else found
            for part, found in checkpoint.load(keys).items()
        }
        _finite(report, place.layer, parts)
        if "alpha" not in parts and "lora_A" in "".join(keys.values()):
            parts |= given
        deltas.append(Delta(place, parts))
        report.used += len(keys)
        report.converted += len(keys) * (without_prefix(name) != place.layer)
    _check(deltas, config, shapes, report, len(checkpoint.tensors))
    report.layers = len({delta.place.layer for delta in deltas})
    return deltas, report


def _peft_alpha(path: Path) -> dict[str, Tensor]:
    """PEFT keeps alpha beside its file, in adapter_config.json; with use_rslora the factor is
    alpha / sqrt(rank). Empty where there is no such file."""
    beside = path.with_name("adapter_config.json")
    if not path.name.startswith("adapter_model") or not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text("utf-8"))
        alpha, rank = float(config["lora_alpha"]), float(config["r"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Flux2Error(
            "adapter_config.json beside this LoRA cannot be read",
            str(error)[:80],
            "Take both files from the same export, or remove the configuration",
        ) from error
    return {"alpha": torch.tensor(alpha * (rank**0.5 if config.get("use_rslora") else 1.0))}


def _finite(report: Report, layer: str, parts: Mapping[str, Tensor]) -> None:
    """Raise where a part holds NaN or infinity: the picture would be black."""
    for part, tensor in parts.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise Flux2Error(
                f"{report.file} holds numbers that are no numbers",
                f"NaN or infinity in {part} of {layer}",
                "Its training went wrong, or the download did: use another copy",
            )


def _one(key: str, name: str, part: str) -> tuple[str, str]:
    """What holds a change's tensors together: the layer's name in the file, and the adapter's. A
    layer may have several changes, and a full difference beside a product: they add up."""
    found = re.search(r"\.lora_(?:[AB]|magnitude_vector)\.([^.]+)(?:\.weight)?$", key)
    adapter = found[1] if found and found[1] != "weight" else ""
    return name, ".diff" if part == "diff" else adapter


def _share(places: dict[tuple[Place, str, str], dict[str, str]]) -> None:
    """An alpha or a DoRA scale that names no adapter belongs to the layer's one that is named."""
    for (place, name, adapter), keys in list(places.items()):
        common = places.get((place, name, ""), {})
        if adapter and common and common.keys() <= {"alpha", "dora"}:
            keys |= {part: key for part, key in common.items() if part not in keys}
            del places[place, name, ""]


def _incomplete(keys: Mapping[str, str]) -> str:
    """Why these parts do not make a change; "" if they do."""
    hada = {f"hada_{w}_{x}" for w in ("w1", "w2") for x in "ab"}
    if "diff" in keys or {"A", "B"} <= keys.keys() or hada <= keys.keys():
        return ""
    whole = all(
        {w} <= keys.keys() or {f"{w}_a", f"{w}_b"} <= keys.keys() for w in ("lokr_w1", "lokr_w2")
    )
    return "" if whole else "one half of a pair is missing"


def _check(deltas, config: TransformerConfig, shapes, report: Report, count: int) -> None:
    if not deltas:
        raise Flux2Error(
            f"{report.file} changes nothing in this model",
            f"{count} tensors: " + "; ".join(dict.fromkeys(report.skipped.values())),
            "Choose a LoRA that was trained on this FLUX.2",
        )
    for delta in deltas:
        rows, columns = shapes[delta.place.layer]
        if delta.place.rows is not None:
            rows = (delta.place.rows[1] - delta.place.rows[0]) * config.hidden_size
        try:
            seen = _shape(delta)
        except IndexError:
            raise _damaged(report, delta) from None
        if seen != (rows, columns):
            made = _size_of(delta, seen[1])
            raise Flux2Error(
                f"{report.file} was made for {made}, not for this model",
                f"{delta.place.layer} is changed as {seen[0]} x {seen[1]}, here it is {rows} x {columns}",
                f"Choose a LoRA for {_label(config.hidden_size)}",
            )
        try:  # on shapes alone: nothing is computed
            parts = {k: v if k == "alpha" else v.to("meta") for k, v in delta.parts.items()}
            Delta(delta.place, parts).matrix(torch.empty(rows, columns, device="meta"))
        except (RuntimeError, IndexError, KeyError, ValueError, ZeroDivisionError):
            raise _damaged(report, delta) from None


def _damaged(report: Report, delta: Delta) -> Flux2Error:
    shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in delta.parts.items())
    return Flux2Error(
        f"{report.file} is damaged: tensors of one layer do not fit together",
        f"{delta.place.layer}: {shapes}",
        "Download or export the LoRA again",
    )


def _shape(delta: Delta) -> tuple[int, int]:
    p = delta.parts
    if "diff" in p:
        return p["diff"].shape[0], p["diff"].flatten(1).shape[1]
    if "A" in p:
        return p["B"].shape[0], p["A"].flatten(1).shape[1]
    if "hada_w1_a" in p:
        tucker = "hada_t1" in p
        return p["hada_w1_a"].shape[1 if tucker else 0], p["hada_w1_b"].shape[1]
    high, wide = 1, 1
    for w in ("lokr_w1", "lokr_w2"):
        a, b = (p[w], p[w]) if w in p else (p[f"{w}_a"], p[f"{w}_b"])
        high, wide = high * a.shape[0], wide * b.flatten(1).shape[1]
    return high, wide


def _size_of(delta: Delta, columns: int) -> str:
    """The model that a change of this width fits, in words."""
    ratio = {"mlp.2": 3, "linear2": 4}
    factor = next((n for end, n in ratio.items() if delta.place.layer.endswith(end)), 1)
    return _label(columns // factor)


def _label(width: int) -> str:
    fits = [v for v in VARIANTS.values() if v.transformer.hidden_size == width]
    return f"{fits[0].label} (width {width})" if fits else f"a model of width {width}"


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """BFL name -> (out, in) of a transformer's linear layers."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LINEAR))
    sizes = ((n, m.shape if isinstance(m, QuantLinear) else m.weight.shape) for n, m in layers)
    return {name: (size[0], size[1]) for name, size in sizes}


class Applied:
    """A LoRA at work beside a model's layers: y += strength * B (A x). Its weights stay as they
    are, quantised ones too; `strength` may be changed, `remove` takes it off without a trace."""

    def __init__(
        self, model: Flux2Transformer, deltas: Iterable[Delta], report: Report, strength: float
    ):
        self.report = report
        self.changes: list[Change] = []
        self.undo: list[Callable[[], None]] = []
        for delta in deltas:
            layer = model.get_submodule(delta.place.layer)
            branch = Branch(delta, partial(weight_of, layer), model.config.hidden_size)
            self.changes.append(Change(branch, strength))
            self.undo.append(_beside(layer, self.changes[-1]))
        self.strength = strength

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self._strength = strength
        for change in self.changes:
            change.strength = strength

    def remove(self) -> None:
        for undo in self.undo:
            undo()
        self.undo = []

    def __str__(self) -> str:
        return str(self.report)


def _beside(layer: nn.Module, change: Change) -> Callable[[], None]:
    """-> what takes it off again."""

    def hook(_, args, out: Tensor) -> Tensor:
        return change(args[0], out)

    if not isinstance(layer, QuantLinear):
        return layer.register_forward_hook(hook).remove
    layer.branches = (*layer.branches, change)

    def remove() -> None:
        layer.branches = tuple(other for other in layer.branches if other is not change)

    return remove


def apply(model: Flux2Transformer, path: str | Path, strength: float = 1.0) -> Applied:
    """A LoRA file onto a Flux2Transformer, in place; several add up. `str` of the result is the
    report. Raises Flux2Error as `read` does."""
    deltas, report = read(path, model.config, linears(model))
    weights = (weight_of(model.get_submodule(delta.place.layer)) for delta in deltas)
    report.relative = relative(deltas, weights, model.config.hidden_size)
    return Applied(model, deltas, report, strength)


def weight_of(layer: nn.Module) -> Tensor:
    """A linear layer's matrix, decoded where it is quantised."""
    if isinstance(layer, QuantLinear):
        return layer.packed.decode()
    assert isinstance(layer, nn.Linear)
    return layer.weight


def relative(deltas: Iterable[Delta], weights: Iterable[Tensor], width: int) -> float:
    """||change|| / ||weight|| (Frobenius) over layers and the rows that change, at strength 1."""
    changes, total = 0.0, 0.0
    for delta, whole in zip(deltas, weights, strict=True):
        weight = whole[delta.span(width)].float()
        factors = delta.factors
        if factors is None:
            changes += float(delta.matrix(weight).square().sum())
        else:  # ||B A||^2 = sum of (A A') * (B' B): no matrix of the layer's size is made
            a, b = (f.float() for f in factors)
            changes += float(((a @ a.mT) * (b.mT @ b)).sum())
        total += float(weight.square().sum())
    return (max(changes, 0.0) / total) ** 0.5 if total else 0.0
