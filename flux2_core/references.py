"""Reference pictures: their order, names and size rules.

A reference is pixels only; nothing is encoded before the count is known, because the count decides
how large each may be. Source of the rules: reference implementation (black-forest-labs/flux2,
Apache-2.0); fact: one reference alone may have 2024 x 2024 pixels, two or more 1024 x 1024 each.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import Flux2Error
from .latents import PIXELS
from .visibility import ReferenceControl

MOST = 10
AREA_ALONE = 2024 * 2024
AREA_EACH = 1024 * 1024
LEAST_SIDE = 64
STRONGEST = 3.0
WIDEST = 8  # the longer side over the shorter
PILLOW_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # Pillow opens nothing larger


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference picture and what the user wants of it; the defaults are stock.

    `image` (H, W, 3) in [0, 1], or (N, H, W, 3): one picture for each latent of a batch. `name` is
    what prompts call it; `megapixels` caps its size below the rule's. `strength` 0 to 3 weighs it
    in attention: 0 is absence, 1 stock. It acts in steps from the share `start` of the run up to
    `end`. `mask` (H, W): where it is below one half the picture leaves the sequence, in patches of
    16 pixels. `region` (any height and width) in [0, 1]: where in the new picture it may act.
    `importance` is its share where a budget shrinks references.
    """

    image: Tensor
    name: str = ""
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    region: Tensor | None = None
    megapixels: float | None = None
    importance: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.shape[-2], self.image.shape[-3]


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the new picture with a prompt of its own.

    `mask` (any height and width) in [0, 1]; `base` is the weight that the main prompt keeps there.
    """

    prompt: str
    mask: Tensor
    base: float = 0.5


@dataclass(frozen=True)
class Fit:
    """What becomes of one reference: resized to `scaled`, then cut to `size` around its middle.

    Each (width, height) in pixels.
    """

    name: str
    seen: tuple[int, int]
    scaled: tuple[int, int]
    size: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1] // PIXELS**2


def plan(references: Sequence[Reference]) -> tuple[Fit, ...]:
    """The size each reference will have, in order. Raises Flux2Error; changes nothing."""
    if len(references) > MOST:
        raise Flux2Error(
            f"FLUX.2 takes at most {MOST} reference images",
            f"{len(references)}",
            f"Remove {len(references) - MOST}, or put several pictures on one sheet",
        )
    for i, reference in enumerate(references):
        check_controls(reference, label(i, reference))
    area = AREA_ALONE if len(references) == 1 else AREA_EACH
    return tuple(_fit(r, label(i, r), area) for i, r in enumerate(references))


def check_controls(reference: Reference, called: str) -> None:
    """Raise Flux2Error for a control outside its range, or one that leaves nothing."""
    if not 0 <= reference.strength <= STRONGEST:
        raise Flux2Error(
            f"The strength of {called} is out of range",
            f"{reference.strength:g}",
            "Use 0 (absent) to 3; 1 is the model's own",
        )
    if not 0 <= reference.start < reference.end <= 1:
        raise Flux2Error(
            f"{called} would act in no step",
            f"from {reference.start:g} to {reference.end:g} of the run",
            "Set start below end, both between 0 and 1; strength 0 switches a reference off",
        )
    if not reference.importance > 0:
        raise Flux2Error(
            f"The importance of {called} must be above 0", f"{reference.importance:g}", "Use 1"
        )
    for what, found in (("mask", reference.mask), ("region", reference.region)):
        if found is None:
            continue
        if found.ndim != 2 or not torch.isfinite(found).all():
            raise Flux2Error(
                f"The {what} of {called} is not a mask",
                f"shape {tuple(found.shape)}",
                "Connect one mask: height x width, numbers from 0 to 1",
            )
        if not (found > 0).any():
            raise Flux2Error(
                f"The {what} of {called} is black everywhere",
                "nothing of the reference would be left",
                "Paint white where it counts, or set strength to 0 to switch the reference off",
            )


def _fit(reference: Reference, name: str, area: float) -> Fit:
    width, height = reference.size
    if reference.megapixels:
        area = min(area, reference.megapixels * 1e6)
    shrink = min(1.0, math.sqrt(area / (width * height)))
    scaled = (int(width * shrink), int(height * shrink)) if shrink < 1 else (width, height)
    short, long = sorted(scaled)
    if short < LEAST_SIDE or long > WIDEST * short:
        raise Flux2Error(
            f"{name} is too {'small' if short < LEAST_SIDE else 'narrow'} to be a reference",
            f"{width} x {height} pixels",
            f"Use a picture of at least {LEAST_SIDE} pixels a side, and at most {WIDEST} times as long as wide",
        )
    return Fit(
        name, (width, height), scaled, (scaled[0] // PIXELS * PIXELS, scaled[1] // PIXELS * PIXELS)
    )


def label(i: int, reference: Reference) -> str:
    """What messages call reference i, counted from 0."""
    return f'Reference {i + 1} ("{reference.name}")' if reference.name else f"Reference {i + 1}"


def pixels(reference: Reference, fit: Fit) -> Tensor:
    """-> (1 or N, 3, H, W) in [-1, 1], ready for the autoencoder. Raises Flux2Error on NaN."""
    image = reference.image[..., :3].float()
    if not torch.isfinite(image).all():
        raise Flux2Error(
            f"{fit.name} holds values that are not numbers",
            "NaN or infinite pixels",
            "Look for the node before it that made them",
        )
    pictures = image if image.ndim == 4 else image[None]
    if fit.scaled != fit.seen:
        pictures = torch.stack([_lanczos(picture, fit.scaled) for picture in pictures])
    return _cut(pictures.movedim(-1, 1), fit) * 2 - 1


def keep(reference: Reference, fit: Fit) -> Tensor | None:
    """-> (H / 16, W / 16) bool: the patches of which the mask keeps anything; None keeps all."""
    if reference.mask is None:
        return None
    width, height = fit.scaled
    mask = F.interpolate(reference.mask[None, None].float(), (height, width), mode="bilinear")
    kept = F.max_pool2d(_cut(mask, fit), PIXELS)[0, 0] >= 0.5
    if not kept.any():
        raise Flux2Error(
            f"The mask of {fit.name} leaves nothing",
            "no pixel of it is above one half within the part of the picture that is used",
            "Paint white what should stay, or set strength to 0 to switch the reference off",
        )
    return kept


def _cut(pictures: Tensor, fit: Fit) -> Tensor:
    """(N, C, H, W) of size `scaled` -> the middle, of size `size`."""
    left, top = ((fit.scaled[i] - fit.size[i]) // 2 for i in (0, 1))
    return pictures[..., top : top + fit.size[1], left : left + fit.size[0]]


def on_grid(region: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask of any height and width -> (h, w) in [0, 1]: its mean over each patch."""
    return F.interpolate(region[None, None].float().cpu(), size, mode="area")[0, 0].clamp(0, 1)


def active(start: float, end: float, share: float) -> bool:
    """True in the steps that lie from `start` up to `end`, as shares of the run."""
    return start <= share < end


def controls(
    references: Sequence[Reference],
    kept: Sequence[Tensor | None],
    size: tuple[int, int],
    share: float,
) -> tuple[ReferenceControl, ...]:
    """What each reference does at one step: `kept` from `keep`, `size` the picture's latent grid
    (h, w), `share` how much of the run lies behind."""
    return tuple(
        ReferenceControl(
            r.strength,
            active(r.start, r.end, share),
            k,
            None if r.region is None else on_grid(r.region, size),
        )
        for r, k in zip(references, kept, strict=True)
    )


def _lanczos(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's Lanczos on 8-bit pixels, as the reference implementation does."""
    picture = to_pil(image)
    return from_pil(picture.resize(size, Image.Resampling.LANCZOS))


def to_pil(image: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] -> 8-bit RGB picture, rounded."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy())


def from_pil(picture: Image.Image) -> Tensor:
    """-> (H, W, 3) float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)


def read(source: "Tensor | Image.Image | str | Path | Reference") -> Reference:
    """A picture, tensor (H, W, 3) in [0, 1], file or Reference -> Reference."""
    if isinstance(source, Reference):
        return source
    if isinstance(source, Tensor):
        return Reference(source)
    if isinstance(source, Image.Image):
        return Reference(from_pil(source))
    try:
        with Image.open(source) as picture:
            return Reference(from_pil(picture), name=Path(source).stem)
    except Image.DecompressionBombError as error:
        raise Flux2Error(
            f"The picture {Path(source).name} is too large to be opened",
            f"more than {PILLOW_LIMIT // 10**6} million pixels",
            "Make a smaller copy of it: as a reference it is shrunk to 4 million pixels at most",
        ) from error
    except (OSError, SyntaxError) as error:
        raise Flux2Error(
            f"The picture {Path(source).name} cannot be opened",
            str(error),
            "Use a PNG, JPEG or WebP file",
        ) from error


NAME = re.compile(r"@([\w-]*\w)")
NUMBER = re.compile(r"\bimage (\d+)\b", re.IGNORECASE)


def check_names(references: Sequence[Reference]) -> None:
    """Raise unless every name can be written after an @, and no two references share one."""
    names = [r.name.lower() for r in references if r.name]
    for i, name in enumerate(names):
        if not NAME.fullmatch(f"@{name}"):
            raise Flux2Error(
                "A reference's name must be one word",
                f"'{name}'",
                "Use letters, digits, _ and, in between, -",
            )
        if name in names[:i]:
            raise Flux2Error("Two references have the same name", f"'{name}'", "Rename one")


def resolve(text: str, references: Sequence[Reference]) -> str:
    """Turn @name into "image N", N counted from 1: the words that the model was trained on.

    Without named references an @ is a letter like any other. Raises Flux2Error for a name that no
    reference has.
    """
    numbers = {r.name.lower(): i + 1 for i, r in enumerate(references) if r.name}
    if not numbers:
        return text

    def number(match: re.Match) -> str:
        if match[1].lower() not in numbers:
            known = ", ".join(f"@{name}" for name in numbers)
            raise Flux2Error(
                f"No reference is called {match[0]}", f"the names are {known}", "Correct the name"
            )
        return f"image {numbers[match[1].lower()]}"

    return NAME.sub(number, text)


def lint(text: str, references: Sequence[Reference]) -> list[str]:
    """Plain-word warnings about a resolved prompt: numbers that no reference has, and, of several
    references, those that it never names. One alone needs no number."""
    count = len(references)
    spoken = {int(n) for n in NUMBER.findall(text)}
    missing = sorted(spoken - set(range(1, count + 1)))
    silent = [i for i in range(count) if i + 1 not in spoken]
    out = []
    if count and missing:
        names = _and([f"image {n}" for n in missing])
        are = "s are" if count > 1 else " is"
        out.append(f"The prompt speaks of {names}, but {count} reference{are} connected.")
    if count > 1 and silent:
        names = _and([_called(i, references[i]) for i in silent])
        out.append(f"The prompt never speaks of {names}.")
    return out


def _called(i: int, reference: Reference) -> str:
    """What a prompt may call reference i, counted from 0."""
    return f"image {i + 1} (@{reference.name})" if reference.name else f"image {i + 1}"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
