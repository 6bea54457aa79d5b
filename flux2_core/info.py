"""What a weight file is, told from its header: nothing of the weights is read."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import choose_variant, select, text_encoder_config
from .configs import TEXT_ENCODERS, VARIANTS, TransformerConfig, Variant, detect, variants_of
from .errors import Flux2Error
from .files import BITS, Checkpoint, Entry, open_checkpoint
from .formats_gguf import TYPES
from .generate_files import ability
from .keymaps import SPELLINGS, TRANSFORMER, match
from .lora_names import split
from .transformer import encoder_for

GROUPS = (  # a layer's place, and the names that belong to it; the first that fits
    ("double blocks, attention", re.compile(r"double_blocks\..*attn\.")),
    ("double blocks, MLP", re.compile(r"double_blocks\.")),
    ("single blocks", re.compile(r"single_blocks\.")),
    ("the rest", re.compile("")),
)
BESIDE = ("scale", "scale_2", "comfy_quant", "scale_weight", "scale_input", "scaled_fp8")


@dataclass(frozen=True)
class Info:
    """A file's verdict: `kind` transformer, text encoder, VAE or LoRA, and lines of plain words."""

    kind: str
    lines: tuple[str, ...]
    variant: Variant | None = None
    bytes: int = 0

    def __str__(self) -> str:
        return "\n".join(self.lines)


def describe(path: str | Path) -> Info:
    """A file, a folder or an index of shards -> Info. Raises Flux2Error for what cannot be read, or
    is nothing of FLUX.2's."""
    checkpoint = open_checkpoint(Path(path), "transformer")
    for kind, read in (("transformer", _transformer), ("text_encoder", _text), ("vae", _vae)):
        try:
            names = select(checkpoint, kind)
        except Flux2Error:
            continue
        return read(checkpoint, {n: checkpoint.tensors[stored] for n, stored in names.items()})
    if any(split(name) for name in checkpoint.tensors):
        return _lora(checkpoint)
    select(checkpoint, "transformer")  # raises, with what the file is instead
    raise AssertionError


def verdict(path: str | Path, chosen: str | None = None) -> str:
    """Which FLUX.2 a transformer file is and how that was told, in a sentence. `chosen`: the user's
    own variant. Raises Flux2Error as `describe` does, and for a variant that cannot be."""
    checkpoint = open_checkpoint(Path(path), "transformer")
    names = select(checkpoint, "transformer")
    config = detect({_bfl(n): checkpoint.tensors[stored].shape for n, stored in names.items()})
    variant = choose_variant(checkpoint.path, config, checkpoint.metadata, chosen)
    told = how_told(config, variant, checkpoint.metadata, chosen is not None)
    return f"{checkpoint.path.name} is {variant.label}, {told}."


def _transformer(checkpoint: Checkpoint, tensors: Mapping[str, Entry]) -> Info:
    theirs = "x_embedder.weight" in tensors
    bfl = {_bfl(name): entry for name, entry in tensors.items()}
    config = detect({name: entry.shape for name, entry in bfl.items()})
    variant = choose_variant(checkpoint.path, config, checkpoint.metadata)
    size = sum(map(size_of, tensors.values()))
    lines = [
        f"{checkpoint.path.name}: {variant.label}, {how_told(config, variant, checkpoint.metadata)}.",
        f"Layout: {'diffusers' if theirs else 'Black Forest Labs'}{_prefix(checkpoint)}.",
        f"{_count(config)} parameters, {size / 1e9:.2f} GB.",
        *_precision(bfl),
        f"Goes with: {encoder_for(config.context_dim)}; any FLUX.2 VAE.",
    ]
    return Info("transformer", tuple(lines), variant, size)


def _bfl(name: str) -> str:
    """A weight's name in BFL's layout; q, k and v stand for the layer that they become."""
    rule, fields = match(TRANSFORMER + SPELLINGS, name, 1)
    return rule.bfl.format(**fields) if rule else name


def how_told(
    config: TransformerConfig, variant: Variant, metadata: Mapping[str, str], chosen: bool = False
) -> str:
    """How the variant was told: weights alone cannot tell klein's kinds apart. `chosen`: by hand."""
    others = [v.label for v in variants_of(config) if v != variant]
    if not others:
        return "told by its shapes" if variant.name in VARIANTS else "a size that no release has"
    try:
        said = json.loads(metadata.get("flux2_kit", "{}")).get("variant")
    except (ValueError, AttributeError):
        said = None
    how = "as you chose" if chosen else "told by its metadata" if said else "told by its name"
    have = "has" if len(others) == 1 else "have"
    return f"{how}; {' and '.join(others)} {have} the same shapes"


def _prefix(checkpoint: Checkpoint) -> str:
    name = next((n for n in checkpoint.tensors if "single" in n and "blocks" in n), "")
    start = name.split("single_")[0]
    return f", under {start.rstrip('.')}" if start else ""


def _count(config: TransformerConfig) -> str:
    import torch

    from .transformer import Flux2Transformer

    with torch.device("meta"):
        total = sum(p.numel() for p in Flux2Transformer(config).parameters())
    return f"{total / 1e9:.2f} billion" if total >= 1e9 else f"{total / 1e6:.1f} million"


def _precision(tensors: Mapping[str, Entry]) -> list[str]:
    """A line for each group: the formats of its weights, the most frequent first."""
    found: dict[str, Counter[str]] = {label: Counter() for label, _ in GROUPS}
    for name, entry in tensors.items():
        if not name.endswith(BESIDE) and len(entry.shape) > 1:
            label = next(label for label, names in GROUPS if names.match(name))
            found[label][format_of(name, tensors)] += 1
    return [
        f"Precision of {label}: {', '.join(form for form, _ in forms.most_common())}."
        for label, forms in found.items()
        if forms
    ]


def format_of(name: str, tensors: Mapping[str, Entry]) -> str:
    """How a weight is stored, in the words that files are called by."""
    entry, layer = tensors[name], name.removesuffix("weight")
    scale = tensors.get(f"{layer}weight_scale") or tensors.get(f"{layer}scale_weight")
    if entry.dtype.startswith("GGUF"):
        return entry.dtype
    if entry.dtype == "U8" and f"{layer}weight_scale_2" in tensors:
        return "NVFP4"
    if entry.dtype == "I8":
        return "INT8"
    if entry.dtype.startswith("F8_E"):
        if scale is None:
            return "fp8, a straight cast"
        return "MXFP8" if scale.dtype in ("U8", "F8_E8M0") else "fp8 with scales"
    return {"F32": "fp32", "F16": "fp16"}.get(entry.dtype, entry.dtype.lower())


def size_of(entry: Entry) -> int:
    """Bytes of a tensor."""
    count = 1
    for n in entry.shape:
        count *= n
    if entry.dtype.startswith("GGUF "):
        name = entry.dtype.removeprefix("GGUF ")
        plain = {"F32": (1, 4), "F16": (1, 2)}
        weights, size = plain.get(name) or (TYPES[name].weights, TYPES[name].bytes)
        return count // weights * size
    return count * BITS[entry.dtype] // 8


def _text(checkpoint: Checkpoint, tensors: Mapping[str, Entry]) -> Info:
    config = text_encoder_config(checkpoint.path)
    size = sum(map(size_of, tensors.values()))
    known = (name for name, text in TEXT_ENCODERS.items() if text.context_dim == config.context_dim)
    goes = [v.label for v in VARIANTS.values() if v.text_encoder in set(known)]
    forms = {
        format_of(n, tensors)
        for n, e in tensors.items()
        if n.endswith("weight") and len(e.shape) > 1
    }
    lines = (
        f"{checkpoint.path.name}: {encoder_for(config.context_dim)}.",
        f"{size / 1e9:.2f} GB, {', '.join(sorted(forms))}; {config.layers} of its layers are read.",
        f"Goes with: {', '.join(goes) or 'no released model'}.",
        ability(checkpoint, config),
    )
    return Info("text encoder", lines, bytes=size)


def _vae(checkpoint: Checkpoint, tensors: Mapping[str, Entry]) -> Info:
    size = sum(map(size_of, tensors.values()))
    statistics = any(
        n.endswith("bn.running_mean") and e.shape == (128,) for n, e in tensors.items()
    )
    what = "FLUX.2's VAE" if statistics else "a VAE of another model, or a decoder alone"
    goes = "every FLUX.2" if statistics else "nothing here by itself"
    lines = (f"{checkpoint.path.name}: {what}.", f"{size / 1e6:.0f} MB.", f"Goes with: {goes}.")
    return Info("VAE", lines, bytes=size)


def _lora(checkpoint: Checkpoint) -> Info:
    size = sum(map(size_of, checkpoint.tensors.values()))
    lines = (
        f"{checkpoint.path.name}: a LoRA, {len(checkpoint.tensors)} tensors, {size / 1e6:.0f} MB.",
        "FLUX.2 LoRA says which model it was made for, and what of it is used.",
    )
    return Info("LoRA", lines, bytes=size)
