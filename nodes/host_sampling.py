"""Guider, sigmas, noise and the sampling call: what FLUX.2 Sampler and Flex share."""

import inspect
import logging

import comfy.conds
import comfy.model_management as memory
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from torch import Tensor

from ..flux2_core import latents, schedule
from ..flux2_core.errors import Flux2Error
from ..flux2_core.guidance import Course, advice, check_negative, rescaled, split
from ..flux2_core.noise import between, composed
from ..flux2_core.sampling import check_finite
from .host import check_text, config_of, variant_of, with_values
from .host_controls import check_host_model
from .host_preview import progress

log = logging.getLogger(__name__)


class Guider(comfy.samplers.CFGGuider):
    """The host's guider, with guidance that may change over the run.

    Under a host's sampler too it shows the picture at every step: hosts start with previews off.
    """

    course: Course | None = None  # None: constant, the host's own way
    embedded = False  # whether the course is an input of the model, or the scale of CFG
    rescale = 0.0
    zero_init = False

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, **kw):
        if args.preview_method == LatentPreviewMethod.NoPreviews:
            callback = _both(callback, progress(self.model_patcher, len(sigmas) - 1))
        return self.run(noise, latent_image, sampler, sigmas, denoise_mask, callback, **kw)

    def run(self, *values, **kw):
        """The host's sampling with the callback as it is."""
        before = self.cfg
        try:
            return super().sample(*values, **kw)
        finally:
            self.cfg = before  # a course has moved it

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's)
        run = model_options.get("transformer_options", {}).get("sample_sigmas")
        sigma = float(timestep.flatten()[0])
        if run is not None:
            if self.zero_init and sigma >= float(run[0]) * (1 - 1e-4):
                return x  # a velocity of zero
            if self.course is not None:
                strength = self.course.over(run)
                self.set_strength(strength(sigma) if callable(strength) else strength)
        if self.rescale and self.cfg != 1:
            model_options = comfy.model_patcher.set_model_options_post_cfg_function(
                dict(model_options), self.take_back
            )
        return super().predict_noise(x, timestep, model_options, seed)

    def set_strength(self, value: float) -> None:
        if not self.embedded:
            return self.set_cfg(value)
        for entry in self.conds["positive"]:
            if "guidance" in entry.get("model_conds", {}):
                entry["model_conds"]["guidance"] = comfy.conds.CONDRegular(torch.tensor([value]))

    def take_back(self, given: dict) -> Tensor:
        """CFG rescale, on velocities: v = (x - x0) / sigma."""
        x, sigma = given["input"], given["sigma"].flatten()[0]
        guided, positive = ((x - given[k]) / sigma for k in ("denoised", "cond_denoised"))
        return x - sigma * rescaled(guided, positive, self.rescale)


def _both(first, second):
    def callback(*values):
        for call in (first, second):
            if call is not None:
                call(*values)

    return callback


def guider(
    model,
    positive,
    negative,
    guidance: float,
    *,
    course: Course | None = None,
    rescale: float = 0.0,
    zero_init: bool = False,
) -> Guider:
    """`guidance` 0 is what the variant wants; a value that another node put into the prompt's
    conditioning then counts. `course` says how it changes over the run. Raises Flux2Error for texts
    and models that do not fit."""
    variant, config = variant_of(model), config_of(model)
    check_host_model(model, positive, negative)
    for sentence in advice(variant, guidance=guidance):
        log.warning(sentence)
    embedded, scale = split(variant, guidance)
    for text, _ in positive + (negative or []):
        check_text(text.shape[-1], config)
    changes = course is not None and course.kind != "constant"
    if variant.guidance_kind == "cfg":
        for value in course.values if changes else (scale,):
            check_negative(variant, value, bool(negative))
    if embedded is not None:
        known = any("guidance" in o for _, o in positive)
        if guidance or changes or not known:
            positive = with_values(positive, guidance=embedded)
    out = Guider(model)
    out.inner_set_conds({"positive": positive} | ({"negative": negative} if negative else {}))
    out.set_cfg(scale)
    if variant.guidance_kind != "none":
        out.course, out.embedded = course if changes else None, embedded is not None
        out.rescale = 0.0 if out.embedded else rescale
    out.zero_init = zero_init
    return out


def sigmas(model, latent: dict, steps: int, denoise: float = 1.0, **how) -> Tensor:
    """The schedule for a latent's size; `steps` 0 is what the variant wants. With `denoise` below 1
    it is the end of a longer one, so that as many steps are run. `how` as in schedule.sigmas."""
    for sentence in advice(variant_of(model), steps=steps):
        log.warning(sentence)
    steps = steps or variant_of(model).steps
    width, height = size_of(latent)
    return schedule.partial(steps, denoise, width=width, height=height, **how)


def size_of(latent: dict) -> tuple[int, int]:
    """Width and height of a LATENT's picture in pixels."""
    height, width = latent["samples"].shape[-2:]
    ratio = latent.get("downscale_ratio_spacial", latents.PIXELS)
    return width * ratio, height * ratio


def sample(guider: Guider, sigmas: Tensor, latent: dict, seed: int, sampler=None) -> dict:
    """Run a SAMPLER (None: Euler) from noise, or from a noised picture -> the finished LATENT."""
    start = empty_for(guider.model_patcher, latent)
    out = guider.run(
        noise(seed, start, latent.get("batch_index")),
        start,
        sampler or comfy.samplers.sampler_object("euler"),
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


class Noise:
    """The host's NOISE: of a seed, on the way to another, or of one composition at every size."""

    def __init__(self, seed: int, other: int = 0, amount: float = 0.0, composed: bool = False):
        self.seed, self.other, self.amount, self.composed = seed, other, amount, composed

    def generate_noise(self, latent: dict) -> Tensor:
        samples, index = latent["samples"], latent.get("batch_index")
        one = self.of(self.seed, samples, index)
        if not self.amount:
            return one
        return between(one, self.of(self.other, samples, index), self.amount)

    def of(self, seed: int, samples: Tensor, index) -> Tensor:
        if not self.composed:
            return noise(seed, samples, index)
        height, width = (side * latents.PIXELS for side in samples.shape[-2:])
        numbers = index or range(samples.shape[0])
        return torch.cat([composed(seed + i, width=width, height=height) for i in numbers])
