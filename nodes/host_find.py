"""What a loader's choice means: the built-in nano, a file, or "auto": the first file that fits."""

import logging
from collections.abc import Callable

from ..flux2_core.configs import TransformerConfig
from ..flux2_core.errors import Flux2Error
from ..flux2_core.files import read_header
from ..flux2_core.transformer import encoder_for
from . import host, host_objects, host_text

AUTO = "auto"
log = logging.getLogger(__name__)


def model(choice: str, variant: str | None):
    """MODEL of a file in diffusion_models, or nano."""
    return host_objects.load_model(host.path_of("diffusion_models", choice), variant)


def clip(choice: str, config: TransformerConfig | None = None, nano: bool = False):
    """CLIP of a file in text_encoders. With `config` it must give what that model reads."""
    if choice == AUTO:
        choice = (
            host.NANO
            if nano
            else _first("text_encoders", lambda t: _width(t) == config.context_dim)
        )
        if choice is None:
            raise Flux2Error(
                "No text encoder that belongs to this model was found",
                f"{len(host.files('text_encoders'))} files in models/text_encoders",
                f"Put {encoder_for(config.context_dim)} there, or choose a file",
            )
    found = host_text.load_clip(host.path_of("text_encoders", choice))
    if config is not None:
        host.check_text(found.cond_stage_model.flux2.config.context_dim, config)
    return found


def vae(choice: str, nano: bool = False):
    """VAE of a file in vae."""
    if choice == AUTO:
        choice = host.NANO if nano else _first("vae", _is_vae)
        if choice is None:
            raise Flux2Error(
                "No FLUX.2 VAE was found",
                f"{len(host.files('vae'))} files in models/vae",
                "Put flux2-vae.safetensors there, or choose a file",
            )
    return host_objects.load_vae(host.path_of("vae", choice))


def _first(folder: str, fits: Callable[[dict], bool]) -> str | None:
    """The first file of a folder whose shapes fit; only headers are read, damaged files skipped."""
    for name in host.files(folder):
        try:
            header = read_header(host.path_of(folder, name))
        except Flux2Error:
            continue
        if fits({key: entry.shape for key, entry in header.tensors.items()}):
            log.info("FLUX.2 Loader takes %s", name)
            return name
    return None


def _width(shapes: dict) -> int:
    """What a text encoder gives a token: three depths of its hidden size."""
    tables = [shape for key, shape in shapes.items() if key.endswith("embed_tokens.weight")]
    return 3 * tables[0][-1] if tables else 0


def _is_vae(shapes: dict) -> bool:
    """A whole FLUX.2 VAE: latent statistics for 128 channels, and an encoder."""
    statistics = any(k.endswith("bn.running_mean") and s == (128,) for k, s in shapes.items())
    return statistics and any(k.endswith("encoder.conv_in.weight") for k in shapes)
