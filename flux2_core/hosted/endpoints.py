"""The hosted models as data: where each is, what it takes, what it costs.

Source: Black Forest Labs' API reference and price page as of TABLE_DATE. Facts that they leave open
are marked. A new model or price is a line here.
"""

from dataclasses import dataclass
from decimal import Decimal

TABLE_DATE = "2026-11"
MEGAPIXEL = 1024 * 1024
MOST_PIXELS = 4 * MEGAPIXEL
LEAST_SIDE = 64
GRID = 16  # width and height are multiples of it
MOST_SEED = 2**64 - 1
LONGEST_PROMPT = 130_000  # characters; about the 32 thousand tokens that the service reads
FORMATS = ("png", "jpeg", "webp")
ACTIVE_TASKS = 24  # more are answered with 429


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    standard: float  # the service's own choice


SAFETY = Range(0, 5, 2)  # 0 is the strictest


@dataclass(frozen=True)
class Endpoint:
    """One hosted model. Cents are US cents, which the service calls credits."""

    name: str
    title: str
    first_cents: Decimal  # the first megapixel of the picture
    further_cents: Decimal  # each further one, and each of the references
    references: int = 8  # the most it takes
    total_megapixels: float | None = None  # picture and references together
    steps: Range | None = None
    guidance: Range | None = None
    upsampling: str | None = None  # the field that switches prompt upsampling

    @property
    def path(self) -> str:
        return f"/v1/{self.name}"

    def takes(self, name: str) -> bool:
        """Whether it takes "steps", "guidance" or "prompt_upsampling"."""
        field = {"prompt_upsampling": "upsampling"}.get(name, name)
        return getattr(self, field) is not None


def _cents(first: str, further: str) -> tuple[Decimal, Decimal]:
    return Decimal(first), Decimal(further)


DISABLE = "disable_pup"  # Pro and Max have upsampling on, and a field to turn it off

ENDPOINTS = {
    endpoint.name: endpoint
    for endpoint in (
        Endpoint(
            "flux-2-pro", "Pro", *_cents("3", "1.5"), total_megapixels=9.0, upsampling=DISABLE
        ),
        Endpoint(
            "flux-2-pro-preview",
            "Pro (preview)",
            *_cents("3", "1.5"),
            total_megapixels=9.0,
            upsampling=DISABLE,
        ),
        Endpoint("flux-2-max", "Max", *_cents("7", "3"), upsampling=DISABLE),
        Endpoint(
            "flux-2-flex",
            "Flex",
            *_cents("5", "5"),
            steps=Range(1, 50, 50),
            guidance=Range(1.5, 10, 4.5),
            upsampling="prompt_upsampling",
        ),
        Endpoint("flux-2-klein-4b", "Klein 4B", *_cents("1.4", "0.1"), references=4),
        Endpoint("flux-2-klein-9b", "Klein 9B", *_cents("1.5", "0.2"), references=4),
        Endpoint(
            "flux-2-klein-9b-preview", "Klein 9B (preview)", *_cents("1.5", "0.2"), references=4
        ),
    )
}
