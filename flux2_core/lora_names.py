"""What the layers of FLUX.2 are called in LoRA files, and what part of a change a tensor is.

A name is looked up in one table, made from the model's own layers: BFL's names, diffusers' (split
and fused), and both with underscores for dots, as kohya, OneTrainer and LyCORIS write them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .keymaps import TRANSFORMER, Rule, match


class Place(NamedTuple):
    """A layer, or some of its rows: (start, stop) in widths of the model; None is all.

    `swap`: the halves of the rows change places on the way.
    """

    layer: str
    rows: tuple[int, int] | None = None
    swap: bool = False


PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_",
    "lora_transformer_", "lycoris_", "lora_",
)  # fmt: skip
TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.", "te1", "clip_l", "t5xxl")

# The end of a key, and the part of a change that its tensor is.
PARTS = (
    (r"\.lora_A(\.[^.]+)?\.weight|[._]lora[._](linear_layer\.)?down(\.weight)?|\.lora_down(\.weight)?", "A"),
    (r"\.lora_B(\.[^.]+)?\.weight|[._]lora[._](linear_layer\.)?up(\.weight)?|\.lora_up(\.weight)?", "B"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale|\.lora_magnitude_vector(\.[^.]+)?(\.weight)?", "dora"),
    (r"\.diff", "diff"),
    (r"\.(?P<named>lokr_(?:w[12](?:_[ab])?|t2)|hada_(?:w[12]_[ab]|t[12]))", ""),
)  # fmt: skip


def split(key: str) -> tuple[str, str] | None:
    """A key -> (name of the layer as the file has it, part); None for a tensor of another kind."""
    for pattern, part in PARTS:
        if found := re.fullmatch(rf"(.+?)(?:{pattern})", key):
            return found[1], part or found["named"]
    return None


def without_prefix(name: str) -> str:
    """The layer's name alone. One exporter is known to cut `transformer_blocks` in its middle."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return re.sub(r"^sformer_blocks\.", "transformer_blocks.", name)


def table(layers: Iterable[str]) -> dict[str, Place]:
    """The model's linear layers, by BFL's names -> every name that a file may have for them."""
    out: dict[str, Place] = {}
    for layer in layers:
        out[layer] = Place(layer)
        rule, fields = match(TRANSFORMER, f"{layer}.weight", 0)
        if rule is not None:
            out |= _diffusers(layer, rule, fields)
        if single := re.fullmatch(r"single_blocks\.(\d+)\.linear([12])", layer):
            out |= _single(layer, *single.groups())
    return out | {name.replace(".", "_"): place for name, place in out.items()}


def _diffusers(layer: str, rule: Rule, fields: Mapping[str, str]) -> dict[str, Place]:
    if rule.edit == "fuse":
        thirds = ((x, Place(layer, (i, i + 1))) for i, x in enumerate("qkv"))
        names = {rule.diffusers.format(**fields, qkv=x): place for x, place in thirds}
        whole = "to_qkv" if "to_{qkv}" in rule.diffusers else "to_added_qkv"
        names[f"transformer_blocks.{fields['n']}.attn.{whole}"] = Place(layer)
    else:
        names = {rule.diffusers.format(**fields): Place(layer, swap=rule.edit == "swap")}
    return {name.removesuffix(".weight"): place for name, place in names.items()}


def _single(layer: str, n: str, which: str) -> dict[str, Place]:
    """Parts of the fused layers: trainers split them in several ways."""
    block = f"single_transformer_blocks.{n}"
    if which == "2":
        return {f"{block}.proj_out": Place(layer)}
    names = {f"{block}.attn.to_{x}": Place(layer, (i, i + 1)) for i, x in enumerate("qkv")}
    names |= {f"{layer}_qkv": Place(layer, (0, 3)), f"{block}.attn.to_qkv": Place(layer, (0, 3))}
    return names | {f"{layer}_mlp": Place(layer, (3, 9)), f"{block}.proj_mlp": Place(layer, (3, 9))}
