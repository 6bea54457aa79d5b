"""What a hosted run gives: the bytes as they came, the picture in them, and where both come from."""

import hashlib
import io
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .. import references
from . import storage
from .endpoints import TABLE_DATE
from .money import Price, in_cents
from .request import Request

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
KNOWN = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Result:
    """See the package's documentation."""

    data: bytes = field(repr=False)
    format: str
    width: int
    height: int
    request: Request = field(repr=False)
    origin: str  # where it was made: scheme://host[:port]
    region: str
    task_id: str
    seed: int
    prompt: str  # the one used: upsampling rewrites it
    price: Price
    cost: Decimal | None
    resumed: bool
    started: float  # seconds since 1970
    finished: float

    @property
    def endpoint(self) -> str:
        return self.request.endpoint.name

    @property
    def cost_text(self) -> str:
        """One line for people: what it cost, beside what was expected."""
        if self.cost is None:
            return f"cost not reported; expected {self.price.text}"
        paid = f"cost {in_cents(self.cost)}"
        if self.cost != self.price.cents:
            paid += f", expected {in_cents(self.price.cents)} (prices of {TABLE_DATE})"
        return paid + (", paid before: an earlier task was fetched" if self.resumed else "")

    def image(self) -> Tensor:
        """-> (height, width, 3) float32 in [0, 1]."""
        with Image.open(io.BytesIO(self.data)) as picture:
            return references.from_pil(picture)

    def manifest(self) -> dict[str, Any]:
        """Where the picture comes from, for JSON. It holds the prompt, and no secret."""
        return {
            "endpoint": self.endpoint,
            "address": self.origin,
            "region": self.region,
            "parameters": dict(self.request.fields),
            "references": [
                {"name": p.name, "width": p.size[0], "height": p.size[1], "pixels_sha256": p.sha256}
                for p in self.request.pictures
            ],
            "seed": self.seed,
            "prompt_used": self.prompt,
            "task_id": self.task_id,
            "expected_cents": str(self.price.cents),
            "reported_cents": None if self.cost is None else str(self.cost),
            "price_table": TABLE_DATE,
            "resumed": self.resumed,
            "started": self.started,
            "finished": self.finished,
            "format": self.format,
            "width": self.width,
            "height": self.height,
            "sha256": hashlib.sha256(self.data).hexdigest(),
        }

    def save(self, path: str | Path) -> Path:
        """Write the bytes untouched (signed metadata stays valid), and the manifest beside them.

        The suffix becomes the format's. -> the picture's path.
        """
        path = Path(path)
        stem = path.with_suffix("") if path.suffix.lower() in KNOWN else path
        picture = stem.with_name(stem.name + SUFFIXES[self.format])
        storage.write_bytes(picture, self.data)
        text = storage.json.dumps(self.manifest(), indent=1, ensure_ascii=False)
        storage.write_bytes(stem.with_name(stem.name + ".json"), text.encode())
        return picture
