"""Where quantised files go, and the weights of a MODEL as they are loaded."""

import json
from functools import partial
from pathlib import Path

import folder_paths

from ..flux2_core.configs import VARIANTS
from ..flux2_core.errors import Flux2Error
from ..flux2_core.save import save_quantized
from .host_controls import is_ours
from .host_quant import QuantLinear


def save(model, format: str, name: str) -> Path:
    """A MODEL of this pack -> a file below the output folder. Raises Flux2Error for one that carries
    changes, which a file could not give back, and for a name that leads elsewhere."""
    if not is_ours(model):
        raise Flux2Error(
            "Only models of this pack are saved here",
            "a model from the host's own loader",
            "Load it with FLUX.2 Load Model",
        )
    changed = any(key.endswith(".branches") for key in model.object_patches)
    if model.patches or changed:
        raise Flux2Error(
            "This model carries a LoRA, which a quantised file would freeze",
            f"{len(model.patches) or 'several'} changed layers",
            "Connect the model as it is loaded, and add the LoRA after loading the new file",
        )
    network = model.model.diffusion_model
    weights = {
        _stored(name): partial(_weight, model, name) for name, _ in network.named_parameters()
    }
    variant = model.model.variant
    known = variant is not None and variant.name in VARIANTS
    about = {"flux2_kit": json.dumps({"variant": variant.name})} if known else {}
    return save_quantized(weights, target(name), format, about)


def _stored(name: str) -> str:
    """Files call the norms' weights scale."""
    return name.removesuffix("weight") + "scale" if name.endswith("_norm.weight") else name


def _weight(model, name: str):
    """A weight as it was loaded: while a clone with a LoRA is in use, the host keeps it aside."""
    layer, _, part = name.rpartition(".")
    module = model.model.diffusion_model.get_submodule(layer)
    aside = model.backup.get(f"diffusion_model.{name}")
    if isinstance(module, QuantLinear):
        return module.packed if aside is None else module.packed_with(aside.weight)
    return getattr(module, part).detach() if aside is None else aside.weight


def target(name: str) -> Path:
    """A name below the output folder -> the first path with a number that is free."""
    root = Path(folder_paths.get_output_directory()).resolve()
    path = (root / f"{name}.safetensors").resolve()
    if not name.strip() or Path(name).is_absolute() or not path.is_relative_to(root):
        raise Flux2Error(
            "A file is saved below ComfyUI's output folder only",
            f"'{name}'",
            "Use a plain name, with / between folders",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.name.removesuffix(".safetensors")
    numbers = (path.with_name(f"{stem}_{i:05}.safetensors") for i in range(1, 100_000))
    return next(free for free in numbers if not free.exists())
