"""What serves on this computer, and what a model is stored and computed in, in plain words."""

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..products import NATIVE, native
from . import attention
from .table import Row, architecture, status

OPS = {
    "quantize_rows": "rounding to fp8",
    "modulate_quantize": "norm and rounding in one",
    "gated_modulate_quantize": "residual, norm and rounding in one",
    "swiglu_quantize": "activation and rounding in one",
    "quantize_blocks": "rounding to MXFP8 or NVFP4",
    "modulate_quantize_blocks": "norm and rounding to MXFP8 or NVFP4 in one",
    "swiglu_quantize_blocks": "activation and rounding to MXFP8 or NVFP4 in one",
    "modulate": "norm and modulation in one",
    "gated_modulate": "residual, norm and modulation in one",
    "gated_add": "residual",
    "swiglu": "activation",
    "qk_norm_rope": "queries and keys",
    "requantize": "rounding of patched weights",
    "fp8_linear": "products in fp8",
    "fp8_linear_fused": "products in fp8 with gate, residual and LoRA in one",
    "fp8_weight_linear": "products of fp8 weights in bf16",
    "nvfp4_linear": "products in NVFP4",
    "mxfp8_linear": "products in MXFP8",
    "int8_linear": "products in INT8",
    "attention": "attention",
    "attention in segments": "attention in weighted parts",
}
WHO = {
    "triton": "our own kernel",
    "torch": "PyTorch's scaled product",
    "mxfp8": "PyTorch's product with scales of blocks",
    "eager": "plain PyTorch",
    "decoded": "PyTorch's product, after our own decoding",
    "cpu": "plain PyTorch, as processors like it",
    "reference": "plain PyTorch",
    "sdpa": "PyTorch",
    "flash": "flash-attn",
    "cudnn": "cuDNN",
    "sage": "SageAttention",
    "sage3": "SageAttention 3",
    "kitchen": "comfy-kitchen",
    "comfy-kitchen": "comfy-kitchen",
}
FORMATS = {
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8 (e5m2)",
    "int8_tensorwise": "INT8",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}
FP8_SINCE = 89  # sm_89: the first NVIDIA cards that multiply fp8


def report(device: torch.device, network: nn.Module | None = None, host: str = "") -> str:
    """All of it, for a node or a terminal. `host` is who computes attention there, if not we."""
    lines = [card(device), "", "What serves here:"]
    rows = [*status(device), *attention.status(device)]
    if host:
        rows = [row for row in rows if row.op != "attention"]
        lines.append(f"  attention: {host}")
    lines += [f"  {line}" for line in served(rows)]
    if network is not None:
        lines += ["", "The model's blocks:", *(f"  {line}" for line in layers(network, device))]
    return "\n".join(lines)


def card(device: torch.device) -> str:
    """The device, its architecture and whether it multiplies fp8."""
    if device.type != "cuda":
        return (
            f"Device: {device.type}, PyTorch {torch.__version__}. fp8 saves memory here, no time."
        )
    name, arch = torch.cuda.get_device_name(device), architecture(device)
    told = ""
    if arch.startswith("sm_"):
        can = int(arch[3:]) >= FP8_SINCE
        told = "multiplies fp8" if can else "has no fp8 instructions: fp8 saves memory, no time"
    triton = version("triton", "triton-windows")
    return f"Card: {name} ({arch}; {told}), PyTorch {torch.__version__}, {triton}."


def version(*packages: str) -> str:
    """Of the first that is installed."""
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"Triton {importlib.metadata.version(package)}"
    return "no Triton"


def served(rows: Iterable[Row]) -> Iterator[str]:
    """One line for each operation and server; what was refused, with its reason, below it. Kinds of
    calls that fared alike are told once."""
    told: dict[tuple[str, str, tuple[tuple[str, str], ...]], None] = {}
    for row in rows:
        told[row.op, row.chosen, row.refused] = None
    for op, chosen, refused in told:
        yield f"{OPS.get(op, op)}: {WHO.get(chosen, chosen)}"
        reasons: dict[str, list[str]] = {}
        for name, why in refused:
            reasons.setdefault(why, []).append(WHO.get(name, name))
        yield from (f"    not {', '.join(names)}: {why}" for why, names in reasons.items())


def layers(network: nn.Module, device: torch.device) -> Iterator[str]:
    """How many of the blocks' linear layers are stored and computed in what."""
    counts: Counter[str] = Counter()
    for name, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        if "_blocks." in name and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            counts[_stored(layer, weight, device)] += 1
    for what, many in counts.most_common():
        yield f"{many} layer{'s' if many > 1 else ''}: {what}"


def _stored(layer: nn.Module, weight: torch.Tensor, device: torch.device) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    form = getattr(layer, "format", None)
    if form is None or weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
        changed = ", patched" if form is not None else ""
        return FORMATS.get(dtype, dtype) + changed
    name, chosen = FORMATS.get(form, form), getattr(layer, "compute", "weights") == "fp8"
    held: Any = getattr(layer, "held", None)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    if chosen and held is not None and form in NATIVE and native(held, like):
        return f"{name}, multiplied in {name}"
    if form != "float8_e4m3fn":
        return f"{name}, decoded at each use"
    if not chosen:
        return f"{name} weights only, multiplied in bf16"
    return f"{name}, multiplied in bf16: nothing here does it in fp8"
