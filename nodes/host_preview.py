"""Progress, interrupt and a preview picture at every step.

Hosts start with previews switched off; the step-by-step picture is ours to send.
"""

import logging
from collections.abc import Callable
from functools import lru_cache

import comfy.model_management as memory
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..flux2_core import taef2
from ..flux2_core.checkpoint import load_autoencoder
from ..flux2_core.references import to_pil

Decode = Callable[[Tensor], Tensor]  # latents (1, 128, h, w) -> pixels (1, 3, H, W) in [-1, 1]


def progress(model, steps: int):
    """-> callback(step, x0, x, steps) for the host's samplers: stops the run if the user asked for
    it, moves the bar and shows what the picture looks like now."""
    decode = decoder(model)
    bar = comfy.utils.ProgressBar(steps)

    def callback(step, x0, x, total):
        memory.throw_exception_if_processing_interrupted()
        bar.update_absolute(step + 1, total, ("JPEG", picture(decode, x0), args.preview_size))

    return callback


def picture(decode: Decode, x0: Tensor):
    """The first picture of a batch."""
    with torch.inference_mode():
        return to_pil((decode(x0[:1])[0].movedim(0, -1).float() + 1) / 2)


def decoder(model) -> Decode:
    """nano's own decoder for nano, TAEF2 where the user has it, else a linear guess of colours."""
    variant = getattr(model.model, "variant", None)
    if variant is not None and variant.name.startswith("nano"):
        return _nano
    for name in folder_paths.get_filename_list("vae_approx"):
        if name.startswith("taef2_decoder") and name.endswith(".safetensors"):
            net = _taef2(folder_paths.get_full_path("vae_approx", name))
            if net is not None:
                return lambda x0: taef2.decode(net.to(x0.device), x0.float())
    return lambda x0: linear(model.model.latent_format, x0)


def linear(latent_format, x0: Tensor) -> Tensor:
    """Colours as the host's 32 x 3 factors see them, at 1/8 of the size."""
    factors = torch.tensor(latent_format.latent_rgb_factors, device=x0.device)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias, device=x0.device)
    z = latent_format.latent_rgb_factors_reshape(x0.float())
    return (torch.einsum("bchw,cd->bdhw", z, factors) + bias[:, None, None]).clamp(-1, 1)


def _nano(x0: Tensor) -> Tensor:
    return _nano_autoencoder().decode(x0.float().cpu())


@lru_cache(maxsize=1)
def _nano_autoencoder():
    return load_autoencoder("nano", dtype=torch.float32)


@lru_cache(maxsize=1)
def _taef2(path: str):
    """The decoder, or None for a file that is not one: a preview is not worth a failed run."""
    net = taef2.decoder()
    try:
        net.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        logging.getLogger(__name__).warning(
            "No TAEF2 previews: %s cannot be used (%s)", path, error
        )
        return None
    return net.eval().requires_grad_(False)
