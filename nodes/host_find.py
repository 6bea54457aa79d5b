"""What a loader's choice means: the built-in nano, a file, or "auto": the first file that fits."""

import logging
from collections.abc import Callable

from ..flux2_core import info
from ..flux2_core.checkpoint import DECODER_ALONE, text_encoder_config
from ..flux2_core.configs import TransformerConfig
from ..flux2_core.errors import Flux2Error
from ..flux2_core.files import read_header
from ..flux2_core.transformer import encoder_for
from . import host, host_objects, host_text, host_vae

AUTO = "auto"
TAEF2 = "TAEF2"
log = logging.getLogger(__name__)


def model(choice: str, variant: str | None, precision: str = AUTO, layers: str = ""):
    """MODEL of a file in diffusion_models, or nano. `precision`, `layers`: flux2_core.precision."""
    path = host.path_of("diffusion_models", choice)
    return host_objects.load_model(path, variant, precision, layers)


def verdict(choice: str, variant: str | None) -> str:
    """Which FLUX.2 a loader's choice is and how that was told, in a sentence."""
    if choice in host.NANOS:
        return f"{choice} comes with this pack."
    return info.verdict(host.path_of("diffusion_models", choice), variant)


def clip(choice: str, config: TransformerConfig | None = None, nano: bool = False):
    """CLIP of a file in text_encoders. With `config` it must give what that model reads."""
    if choice == AUTO:
        choice = (
            host.NANO
            if nano
            else _first(
                "text_encoders",
                lambda path: text_encoder_config(path).context_dim == config.context_dim,
            )
        )
        if choice is None:
            raise Flux2Error(
                "No text encoder that belongs to this model was found",
                f"{len(host.files('text_encoders'))} files in models/text_encoders",
                f"Put {encoder_for(config.context_dim)} there, in bf16, fp16 or fp32, or choose a file",
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
    if choice == TAEF2:
        return host_vae.load_taef2(*(host.path_of("vae_approx", name) for name in taef2_files()))
    path = host.path_of("vae", choice)
    return host_vae.load_vae(path, _base(path, choice))


def taef2_files() -> list[str]:
    """The encoder and the decoder in vae_approx; empty unless both are there."""
    names = host.files("vae_approx")
    sides = [[n for n in names if n.startswith(f"taef2_{s}")] for s in ("encoder", "decoder")]
    return [side[0] for side in sides] if all(sides) else []


def _base(path: str, name: str) -> str | None:
    """The whole VAE that completes a file with a decoder alone; None for others."""
    if _is_more_than_decoder(path):
        return None
    found = _first("vae", _is_vae)
    if found is None:
        raise Flux2Error(
            f"{name} holds a decoder alone",
            "no encoder and no statistics in it, and no FLUX.2 VAE beside it to take them from",
            "Put flux2-vae.safetensors into models/vae too, or choose "
            "full_encoder_small_decoder.safetensors",
        )
    return host.path_of("vae", found)


def _is_more_than_decoder(path: str) -> bool:
    return path in host.NANOS.values() or not read_header(path).tensors.keys() >= DECODER_ALONE


def _first(folder: str, fits: Callable[[str], bool]) -> str | None:
    """The first file of a folder that fits. Only headers are read; damaged files, and those that
    could not be loaded, are passed over."""
    for name in host.files(folder):
        try:
            if not fits(host.path_of(folder, name)):
                continue
        except Flux2Error:
            continue
        log.info("FLUX.2 Loader takes %s", name)
        return name
    return None


def _is_vae(path: str) -> bool:
    """A whole FLUX.2 VAE: latent statistics for 128 channels, and an encoder."""
    shapes = {key: entry.shape for key, entry in read_header(path).tensors.items()}
    statistics = any(k.endswith("bn.running_mean") and s == (128,) for k, s in shapes.items())
    return statistics and any(k.endswith("encoder.conv_in.weight") for k in shapes)
