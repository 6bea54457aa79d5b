"""Guider, sigmas, noise and the sampling call: what FLUX.2 Sampler and Flex share."""

import inspect
import logging

import comfy.model_management as memory
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from torch import Tensor

from ..flux2_core import latents, schedule
from ..flux2_core.errors import Flux2Error
from ..flux2_core.guidance import advice, check_negative, split
from ..flux2_core.sampling import check_finite
from .host import check_text, config_of, variant_of, with_values
from .host_controls import check_host_model
from .host_preview import progress

log = logging.getLogger(__name__)


class Guider(comfy.samplers.CFGGuider):
    """The host's guider. Under a host's sampler too it shows the picture at every step: hosts start
    with previews switched off."""

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, **kw):
        if args.preview_method == LatentPreviewMethod.NoPreviews:
            callback = _both(callback, progress(self.model_patcher, len(sigmas) - 1))
        return self.run(noise, latent_image, sampler, sigmas, denoise_mask, callback, **kw)

    def run(self, *values, **kw):
        """The host's sampling with the callback as it is."""
        return super().sample(*values, **kw)


def _both(first, second):
    def callback(*values):
        for call in (first, second):
            if call is not None:
                call(*values)

    return callback


def guider(model, positive, negative, guidance: float) -> Guider:
    """`guidance` 0 is what the variant wants; a value that another node put into the prompt's
    conditioning then counts. Raises Flux2Error for texts and models that do not fit."""
    variant, config = variant_of(model), config_of(model)
    check_host_model(model, positive, negative)
    for sentence in advice(variant, guidance=guidance):
        log.warning(sentence)
    embedded, scale = split(variant, guidance)
    for text, _ in positive + (negative or []):
        check_text(text.shape[-1], config)
    check_negative(variant, scale, bool(negative))
    if embedded is not None and (guidance or not any("guidance" in o for _, o in positive)):
        positive = with_values(positive, guidance=embedded)
    out = Guider(model)
    out.inner_set_conds({"positive": positive} | ({"negative": negative} if negative else {}))
    out.set_cfg(scale)
    return out


def sigmas(model, latent: dict, steps: int, denoise: float = 1.0) -> Tensor:
    """The schedule for a latent's size; `steps` 0 is what the variant wants. With `denoise` below 1
    it is the end of a longer one, so that as many steps are run."""
    for sentence in advice(variant_of(model), steps=steps):
        log.warning(sentence)
    steps = steps or variant_of(model).steps
    height, width = latent["samples"].shape[-2:]
    ratio = latent.get("downscale_ratio_spacial", latents.PIXELS)
    full = schedule.sigmas(
        max(steps, round(steps / denoise)), width=width * ratio, height=height * ratio
    )
    return full[-(steps + 1) :]


def sample(guider: Guider, sigmas: Tensor, latent: dict, seed: int) -> dict:
    """Run Euler from noise (or from a noised picture) -> the finished LATENT."""
    start = empty_for(guider.model_patcher, latent)
    out = guider.run(
        noise(seed, start, latent.get("batch_index")),
        start,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=progress(guider.model_patcher, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": check_finite(out).to(memory.intermediate_device())}


def empty_for(model, latent: dict) -> Tensor:
    """The latent's tensor; an empty one of another model's shape becomes one of FLUX.2's."""
    fix = comfy.sample.fix_empty_latent_channels
    known = inspect.signature(fix).parameters
    extra = {k: v for k, v in latent.items() if k.startswith("downscale_ratio") and k in known}
    samples = fix(model, latent["samples"], **extra)
    if samples.ndim != 4 or samples.shape[1] != latents.CHANNELS:
        raise Flux2Error(
            "The latent is not FLUX.2's",
            f"shape {tuple(samples.shape)}, wanted (batch, 128, height / 16, width / 16)",
            "Make it with FLUX.2 Empty Latent or a FLUX.2 VAE",
        )
    return samples


def noise(seed: int, samples: Tensor, index: list[int] | None = None) -> Tensor:
    """Like `samples`: picture i of a batch has the noise that it would have alone with seed + i."""
    height, width = (side * latents.PIXELS for side in samples.shape[-2:])
    numbers = index or range(samples.shape[0])
    return torch.cat([latents.noise(seed + i, width=width, height=height) for i in numbers])
