"""FLUX.2 without a host: from a prompt and reference pictures to a PIL image."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from . import latents, schedule
from .autoencoder import AutoEncoder
from .checkpoint import load_autoencoder, load_text_encoder, load_transformer
from .configs import Variant
from .errors import Flux2Error
from .guidance import Course, Steer, Velocity, over, velocity
from .inpaint import Work, held, latent_mask, prepare, stitch
from .kv_cache import ReferenceCache
from .nano.forms import FORMS
from .precision import guarded
from .prompt_cache import PromptCache
from .prompt_nano import in_words
from .references import (
    Reference,
    Region,
    check_names,
    controls,
    from_pil,
    keep,
    on_grid,
    pixels,
    plan,
    read,
    resolve,
    to_pil,
)
from .sampling import OnStep, denoise
from .sizes import cut, pad
from .solvers import draw
from .step_cache import StepCache
from .stream import Controls
from .text_encoder import TextEncoder
from .transformer import Flux2Transformer, encoder_for
from .vae_memory import Memory
from .visibility import RegionPrompt

Picture = Reference | Tensor | Image.Image | str | Path


class Paths(NamedTuple):
    """The three files of a FLUX.2; each may be "nano", the transformer also "nano-distilled" or
    "nano-guided". `variant` None: what the file says."""

    transformer: str | Path = "nano"
    vae: str | Path = "nano"
    text_encoder: str | Path = "nano"
    variant: str | None = None


class Pipeline:
    """pipe = Pipeline.load("nano"); pipe("a red circle on white background", seed=1).save("a.png")"""

    def __init__(
        self, model: Flux2Transformer, vae: AutoEncoder, text: TextEncoder, variant: Variant
    ):
        if text.config.context_dim != model.config.context_dim:
            raise Flux2Error(
                "The text encoder does not belong to this model",
                f"it gives {text.config.context_dim} values a token, the model reads {model.config.context_dim}",
                f"Load {encoder_for(model.config.context_dim)}",
            )
        self.model, self.vae, self.text, self.variant = model, vae, text, variant
        self.memory = Memory()  # of the autoencoder: whole where it fits, else strip by strip
        self.prompts: PromptCache | None = None  # where encoded prompts are kept, if anywhere
        self.device = next(model.parameters()).device

    @classmethod
    def load(
        cls, name_or_paths="nano", *, dtype: torch.dtype | None = None, device="cpu"
    ) -> "Pipeline":
        """`name_or_paths`: "nano", "nano-distilled", "nano-guided", Paths, or a folder in diffusers
        form. `dtype` None: nano in float32, everything else as in its file."""
        source = name_or_paths
        if isinstance(source, (str, Path)):
            source = Paths(source, source, source)
        nano = str(source.transformer) in ("nano", *FORMS)
        how = {"dtype": dtype or (torch.float32 if nano else None), "device": device}
        model = load_transformer(source.transformer, variant=source.variant, **how)
        vae = load_autoencoder(source.vae, **how)
        return cls(model, vae, load_text_encoder(source.text_encoder, **how), model.variant)

    def __call__(
        self,
        prompt: str,
        *,
        image: Picture | None = None,
        mask: Tensor | Image.Image | None = None,
        context: float | None = None,
        **wanted,
    ) -> Image.Image:
        """One picture; everything else as in `sample`.

        `image` is the picture to change, by `strength`; the result has its size. With a `mask` ((H, W)
        in [0, 1] or a gray picture; any size) only what is white changes, and outside it every
        value is the image's own. `context` works on the window around the mask, with so much of the
        surroundings (in sizes of the masked part); None on the whole.
        """
        if image is None:
            if mask is not None:
                raise Flux2Error("A mask needs the picture it belongs to", do="Give image as well")
            return self.decode(self.sample(prompt, **wanted))
        if not {"width", "height"}.isdisjoint(wanted):
            raise Flux2Error(
                "A picture that is changed keeps its size",
                "width or height beside an image",
                "Resize the image first",
            )
        picture = read(image).image[None]
        if mask is None:
            start = self._latent(pad(picture))
            drawn = self._pictures(self.sample(prompt, start=start, **wanted))
            return to_pil(cut(drawn, (picture.shape[2], picture.shape[1]))[0])
        work = prepare(picture, _mask(mask), context=context or 0.0, whole=context is None)
        return to_pil(self._redraw(prompt, work, wanted)[0])

    def _redraw(self, prompt: str, work: Work, wanted: dict) -> Tensor:
        """A masked window drawn anew and put back."""
        inside = latent_mask(work.masks).to(self.device)
        x = self.sample(prompt, start=self._latent(work.pictures), changing=inside, **wanted)
        return stitch(self._pictures(x), work.place)

    @torch.inference_mode()
    def _latent(self, pictures: Tensor) -> Tensor:
        """(1, H, W, 3) in [0, 1] -> latent."""
        dtype = next(self.vae.parameters()).dtype
        planes = pictures.movedim(-1, 1).to(self.device, dtype) * 2 - 1
        return self.memory.encode(self.vae, planes)

    @torch.inference_mode()
    def _pictures(self, x: Tensor) -> Tensor:
        """Latent -> (1, H, W, 3) in [0, 1]."""
        image = self.memory.decode(self.vae, x.to(next(self.vae.parameters()).dtype))
        return ((image.float().movedim(1, -1) + 1) / 2).clamp(0, 1).cpu()

    @torch.inference_mode()
    def sample(
        self,
        prompt: str,
        *,
        references: Sequence[Picture] = (),
        regions: Sequence[Region] = (),
        isolate: bool = False,
        cache: ReferenceCache | None = None,
        step_cache: StepCache | None = None,
        negative: str | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | Course | None = None,
        seed: int = 0,
        solver: str = "euler",
        eta: float = 1.0,
        start: Tensor | None = None,
        changing: Tensor | None = None,
        strength: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """-> the finished latent (1, 128, height / 16, width / 16). None: what the variant wants.

        With true CFG and no `negative`, an empty prompt stands in for it. `guidance` may be a
        guidance.Course over the run. `regions`, `isolate`,
        `cache` and `step_cache` as in stream.Controls; a step cache begins with each call.
        `solver` and `eta` as in sampling.advance; its noise follows from the seed. `start` (1, 128, h,
        w) is a picture's latent, of which the share `strength` is drawn anew (schedule.partial);
        `changing` (1, 1, h, w) in [0, 1] is where (inpaint.held).
        """
        if start is None and (strength != 1 or changing is not None):
            raise Flux2Error(
                "A strength or a mask needs a picture to change",
                f"strength {strength:g}, no picture",
                "Give one as image",
            )
        if start is not None:
            height, width = (side * latents.PIXELS for side in start.shape[-2:])
        width, height = width or self.variant.size, height or self.variant.size
        pictures = [read(r) for r in references]
        check_names(pictures)
        steps = steps or self.variant.steps
        sigmas = schedule.partial(steps, strength, width=width, height=height)
        embedded, scale = over(self.variant, guidance, sigmas)
        grid = (height // latents.PIXELS, width // latents.PIXELS)
        prompts = [
            RegionPrompt(
                self.encode_text(resolve(r.prompt, pictures)), on_grid(r.mask, grid), r.base
            )
            for r in regions
        ]
        field = velocity(
            self.model,
            self.encode_text(resolve(prompt, pictures)),
            negative=self.encode_text(negative or "") if scale != 1.0 else None,
            embedded=embedded,
            scale=scale,
            references=self.encode(pictures),
            controls=self._steer(
                pictures, grid, sigmas, tuple(prompts), isolate, cache, step_cache
            ),
        )
        x = latents.noise(seed, width=width, height=height).to(self.device)
        noise = partial(draw, [seed], like=x)
        how = {"solver": solver, "eta": eta, "noise": noise, "on_step": on_step}
        field = self._cast(field, [c for c in (cache, step_cache) if c is not None])
        if start is None:
            return denoise(field, x, sigmas, **how)
        start = start.float()
        if changing is not None:
            field = held(field, start, x, changing)
        return denoise(field, torch.lerp(start, x, float(sigmas[0])), sigmas, **how)

    def _steer(self, pictures, grid, sigmas, regions, isolate: bool, cache, steps) -> Steer:
        """What holds at each time of a run."""
        kept = [keep(r, fit) for r, fit in zip(pictures, plan(pictures), strict=True)]
        if cache is not None:
            cache.begin(object(), weights=_weights(self.model))
        if steps is not None:
            steps.begin(object())

        def at(sigma: float) -> Controls:
            behind, number = schedule.share(sigmas, sigma), len(sigmas) - 1
            for handle in (cache, steps):
                if handle is not None:
                    handle.step = round(behind * number)
            if steps is not None:
                steps.steps = number
            steered = controls(pictures, kept, grid, behind)
            return Controls(
                references=steered, regions=regions, isolate=isolate, cache=cache, steps=steps
            )

        return at

    def encode_text(self, prompt: str) -> Tensor:
        if self.text.config.template == "nano":
            prompt, _ = in_words(prompt)
        encoded = (
            self.prompts.encode(self.text, prompt) if self.prompts else self.text.encode(prompt)
        )
        return encoded.to(self.device)

    def encode(self, pictures: Sequence[Reference]) -> list[Tensor]:
        """Pictures -> reference latents, in the sizes that `references.plan` gives them."""
        fits = plan(pictures)
        dtype = next(self.vae.parameters()).dtype
        return [
            self.memory.encode(self.vae, pixels(r, fit).to(self.device, dtype))
            for r, fit in zip(pictures, fits, strict=True)
        ]

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Image.Image:
        return to_pil(self._pictures(x)[0])

    def _cast(self, field: Velocity, caches: Sequence) -> Velocity:
        """The model computes in its own dtype, the steps are summed in float32; see precision.guarded."""
        dtype = next(self.model.parameters()).dtype

        def forget() -> None:
            for cache in caches:
                cache.clear()

        return lambda x, t: guarded(self.model, lambda: field(x.to(dtype), t), forget)


def _mask(mask: Tensor | Image.Image) -> Tensor:
    """-> (1, H, W) in [0, 1]."""
    if isinstance(mask, Image.Image):
        return from_pil(mask.convert("L"))[..., 0][None]
    return mask.float().reshape(1, *mask.shape[-2:])


def _weights(model: torch.nn.Module) -> tuple:
    """Changes with the model's weights: another model, another dtype, an edit in place."""
    tensors = list(model.parameters())
    edits = sum(0 if p.is_inference() else p._version for p in tensors)
    return id(model), tensors[0].dtype, edits
