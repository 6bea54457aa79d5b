"""From a model's name and plain inputs to a request that the service takes, or a sentence why not."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .. import references as local
from ..errors import Flux2Error
from ..references import Reference
from .endpoints import (
    ENDPOINTS,
    FORMATS,
    GRID,
    LEAST_SIDE,
    LONGEST_PROMPT,
    MEGAPIXEL,
    MOST_PIXELS,
    MOST_SEED,
    SAFETY,
    Endpoint,
    Range,
)

STANDARD_SIZE = (1024, 1024)


@dataclass(frozen=True)
class Upload:
    """A reference as it is sent. `sha256` is of its pixels: the same on every computer."""

    data: bytes = field(repr=False)  # PNG
    size: tuple[int, int]  # width, height
    name: str
    sha256: str


@dataclass(frozen=True)
class Request:
    endpoint: Endpoint
    fields: Mapping[str, Any]  # what is sent, without pictures
    pictures: tuple[Upload, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture asked for."""
        return self.fields["width"], self.fields["height"]

    def body(self) -> bytes:
        """The JSON that is posted, pictures in base64."""
        names = ["input_image", *(f"input_image_{i}" for i in range(2, len(self.pictures) + 1))]
        pictures = {
            name: base64.b64encode(upload.data).decode("ascii")
            for name, upload in zip(names, self.pictures, strict=False)
        }
        return json.dumps({**self.fields, **pictures}).encode()

    def fingerprint(self, origin: str) -> str:
        """Equal for equal inputs sent to the same place, and for nothing else."""
        parts = [origin, self.endpoint.path, dict(self.fields), [p.sha256 for p in self.pictures]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_request(
    model: str,
    prompt: str,
    *,
    references: Sequence[Reference] = (),
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    safety_tolerance: int | None = None,
    output_format: str = "png",
    prompt_upsampling: bool | None = None,
) -> Request:
    """See the package's documentation. Raises Flux2Error for all that the model does not take."""
    if model not in ENDPOINTS:
        raise Flux2Error(
            "There is no such hosted model", f"'{model}'", f"Choose one of {', '.join(ENDPOINTS)}"
        )
    endpoint = ENDPOINTS[model]
    fits = _fits(endpoint, references)
    width, height = _size(width, height, fits)
    _check_total(endpoint, (width, height), fits)
    fields: dict[str, Any] = {
        "prompt": local.resolve(_prompt(prompt), references),
        "width": width,
        "height": height,
        "seed": _in_range("seed", seed, Range(0, MOST_SEED, 0), whole=True),
        "output_format": _format(output_format),
    }
    if safety_tolerance is not None:
        fields["safety_tolerance"] = _in_range(
            "safety tolerance", safety_tolerance, SAFETY, whole=True
        )
    if steps is not None:
        fields["steps"] = _in_range("number of steps", steps, _taken(endpoint, "steps"), whole=True)
    if guidance is not None:
        fields["guidance"] = _in_range("guidance", guidance, _taken(endpoint, "guidance"))
    if prompt_upsampling is not None:
        name = _taken(endpoint, "prompt_upsampling")
        fields[name] = bool(prompt_upsampling) == (name == "prompt_upsampling")
    pictures = (_upload(r, fit) for r, fit in zip(references, fits, strict=True))
    return Request(endpoint, MappingProxyType(fields), tuple(pictures))


def _taken(endpoint: Endpoint, name: str) -> Any:
    """The range (or field) of an optional input. Raises where the model has none."""
    if endpoint.takes(name):
        return endpoint.upsampling if name == "prompt_upsampling" else getattr(endpoint, name)
    able = [e.title for e in ENDPOINTS.values() if e.takes(name)]
    raise Flux2Error(
        f"FLUX.2 {endpoint.title} takes no {name.replace('_', ' ')}",
        "it was set",
        f"Leave it at its default, or choose {' or '.join(able)}",
    )


def _in_range(what: str, value: Any, allowed: Range, whole: bool = False) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not allowed.low <= value <= allowed.high or (whole and value != int(value)):
        raise Flux2Error(
            f"The {what} is out of range",
            f"{value}",
            f"Use {'a whole number ' if whole else ''}from {allowed.low:g} to {allowed.high:g}"
            if allowed.high != MOST_SEED
            else "Use a whole number from 0 to 2^64 - 1",
        )
    return int(value) if whole else float(value)


def _prompt(prompt: str) -> str:
    if not prompt.strip():
        raise Flux2Error("The prompt is empty", "", "Say what the picture should show")
    if len(prompt) > LONGEST_PROMPT:
        raise Flux2Error(
            "The prompt is too long for the hosted models",
            f"{len(prompt):,} characters",
            f"Use {LONGEST_PROMPT:,} at most",
        )
    return prompt


def _format(output_format: str) -> str:
    if output_format not in FORMATS:
        raise Flux2Error(
            "The hosted models do not make this format",
            f"'{output_format}'",
            f"Choose one of {', '.join(FORMATS)}",
        )
    return output_format


def _size(width: int | None, height: int | None, fits: Sequence[local.Fit]) -> tuple[int, int]:
    """What will be sent. It is never left to the service: then the price would be a guess."""
    if bool(width) != bool(height):
        raise Flux2Error(
            "Width and height belong together",
            f"{width or 0} x {height or 0}",
            "Give both, or neither to follow the first reference",
        )
    if not width or not height:
        return fits[0].size if fits else STANDARD_SIZE
    good = all(type(n) is int and n >= LEAST_SIDE and n % GRID == 0 for n in (width, height))
    if not good or width * height > MOST_PIXELS:
        raise Flux2Error(
            "The hosted models do not make this size",
            f"{width} x {height}",
            f"Use multiples of {GRID} from {LEAST_SIDE} up, and 4 megapixels (2048 x 2048) at most",
        )
    return width, height


def _check_total(endpoint: Endpoint, size: tuple[int, int], fits: Sequence[local.Fit]) -> None:
    most = endpoint.total_megapixels
    total = sum(w * h for w, h in (size, *(fit.size for fit in fits))) / MEGAPIXEL
    if most is not None and total > most:
        raise Flux2Error(
            f"Picture and references together are too large for FLUX.2 {endpoint.title}",
            f"{total:.1f} megapixels",
            f"Stay within {most:g}: ask for a smaller picture, or cap the references' megapixels",
        )


def _fits(endpoint: Endpoint, references: Sequence[Reference]) -> tuple[local.Fit, ...]:
    """The size each reference will be sent in. Raises for what the model does not take."""
    if len(references) > endpoint.references:
        raise Flux2Error(
            f"FLUX.2 {endpoint.title} takes at most {endpoint.references} references",
            f"{len(references)}",
            f"Remove {len(references) - endpoint.references}, or put several on one sheet",
        )
    for i, reference in enumerate(references):
        _check_plain(reference, local.label(i, reference))
    local.check_names(references)
    return local.plan(references)


def _check_plain(reference: Reference, called: str) -> None:
    """The service weighs, masks and places nothing: a control would be lost without a word."""
    controls = {
        "a strength other than 1": reference.strength != 1,
        "a step range": (reference.start, reference.end) != (0, 1),
        "a mask": reference.mask is not None,
        "a region": reference.region is not None,
        "a batch of pictures": reference.image.ndim != 3 and len(reference.image) != 1,
    }
    seen = [what for what, used in controls.items() if used]
    if seen:
        raise Flux2Error(
            f"{called} asks for what the hosted models cannot do",
            " and ".join(seen),
            "Set it back to its default, or make the picture with a local model",
        )


def _upload(reference: Reference, fit: local.Fit) -> Upload:
    picture = local.to_pil((local.pixels(reference, fit)[0].movedim(0, -1) + 1) / 2)
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=4)
    digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    return Upload(out.getvalue(), picture.size, reference.name, digest)
