"""The one place that speaks the host's language; nodes import it and the core, nothing else.

Hosts differ; what a host can do is found by asking for an attribute, never by its version. Its
parts: host_model.py and host_rope.py (the transformer), host_objects.py (MODEL, CLIP, VAE),
host_sampling.py (guider, noise, progress), host_preview.py.
"""

import re
from pathlib import Path

import folder_paths

from ..flux2_core.checkpoint import NANO_FILES, choose_variant
from ..flux2_core.configs import VARIANTS, TransformerConfig, Variant
from ..flux2_core.errors import Flux2Error
from ..flux2_core.files import GGUF
from ..flux2_core.transformer import encoder_for

NANOS = {v.label: v.name for v in VARIANTS.values() if v.text_encoder == "nano"}
NANO = VARIANTS["nano"].label
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
NANO_FILE = str(NANO_FILES["transformer"])


def files(folder: str) -> list[str]:
    """The safetensors files of one of the host's model folders; where they may be, GGUF files and
    indices of shards too, which the host's own list leaves out. An index stands for its shards."""
    names = [n for n in folder_paths.get_filename_list(folder) if n.endswith(".safetensors")]
    if folder in ("diffusion_models", "text_encoders"):
        found = (folder_paths.recursive_search(p)[0] for p in folder_paths.get_folder_paths(folder))
        every = sorted({name for some in found for name in some})
        names += [name for name in every if name.endswith(GGUF)]
        whole = [name for name in every if name.endswith(INDEX)]
        starts = tuple(name.removesuffix(INDEX) + "-" for name in whole)
        names = [n for n in names if not (SHARD.search(n) and n.startswith(starts))] + whole
    return names


def path_of(folder: str, name: str) -> str:
    """A choice of a loader's list -> what the core's loaders take."""
    return NANOS.get(name) or folder_paths.get_full_path_or_raise(folder, name)


def stamp(folder: str, name: str) -> tuple:
    """Changes when the file does: the host then runs the loader again."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        return (name,)
    status = Path(path).stat()
    return name, status.st_mtime_ns, status.st_size


def variant_of(model) -> Variant:
    """What `auto` means for a MODEL, ours or the host's. Raises Flux2Error if it is no FLUX.2."""
    variant = getattr(model.model, "variant", None)
    if isinstance(variant, Variant):
        return variant
    return choose_variant(_file_of(model), config_of(model), {})


def _file_of(model) -> Path:
    """Where the host loaded a MODEL from: klein base is told from klein by its name. Older hosts do
    not remember it."""
    _, values, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    return Path(str(values[0])) if values else Path("model")


def config_of(model) -> TransformerConfig:
    """The shapes of a MODEL, ours or the host's. Raises Flux2Error if it is no FLUX.2."""
    config = getattr(model.model, "config", None)
    if isinstance(config, TransformerConfig):
        return config
    found = model.model.model_config.unet_config
    if found.get("image_model") != "flux2":
        raise Flux2Error(
            "This model is not FLUX.2",
            f"a {model.model.__class__.__name__} model",
            "Load it with FLUX.2 Load Model, or choose a FLUX.2 file",
        )
    return TransformerConfig(
        found["hidden_size"],
        found["context_in_dim"],
        found["depth"],
        found["depth_single_blocks"],
        guidance_embed=found["guidance_embed"],
    )


def with_values(conditioning: list, **values) -> list:
    """The conditioning with values set in every entry; the incoming one stays as it is."""
    return [[text, {**options, **values}] for text, options in conditioning]


def check_text(width: int, config: TransformerConfig) -> None:
    """Raise unless a text encoder gives rows as wide as the model reads."""
    if width != config.context_dim:
        raise Flux2Error(
            "The text encoder does not belong to this model",
            f"its rows are {width} wide, the model reads {config.context_dim}",
            f"Load {encoder_for(config.context_dim)}",
        )


def check_vae(vae) -> None:
    """Raise unless a VAE makes FLUX.2 latents."""
    channels, ratio = vae.latent_channels, vae.spacial_compression_encode()
    if (channels, ratio) != (128, 16):
        raise Flux2Error(
            "This VAE is not FLUX.2's",
            f"{channels} channels at 1/{ratio} of the size, FLUX.2 has 128 at 1/16",
            "Load flux2-vae.safetensors, or use the VAE of FLUX.2 Loader",
        )
