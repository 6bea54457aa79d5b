"""A result's bytes, from a link that nobody has to trust, and the proof that they are a picture."""

import io
import time
from typing import Any
from urllib.parse import urljoin

from PIL import Image

from .addresses import check_result_url
from .endpoints import FORMATS, MOST_PIXELS
from .outcomes import HostedError
from .settings import Settings
from .transport import Lost, Transport, read

MOST_BYTES = 64 << 20  # four megapixels without compression are 16 MB
MOST_SHOWN = 2 * MOST_PIXELS
REDIRECTS = 3
NOT_PICTURES = ("text/", "application/json", "video/", "audio/")
GONE = (403, 404, 410)  # how storage answers a link that has expired
RETRY = "Queue it again soon: the same inputs fetch the result anew and cost nothing"
ENDS = {"png": b"IEND\xaeB`\x82", "jpeg": b"\xff\xd9"}


class Expired(Exception):
    """The link is not valid any more."""


async def download(
    transport: Transport, settings: Settings, link: str, total: float, most: int = MOST_BYTES
) -> bytes:
    """Fetch a result, without the key, in `total` seconds. Raises Lost, Expired or HostedError."""
    until = time.monotonic() + total

    async def take(got: Any) -> bytes | str:
        """The bytes, or where they are said to be."""
        if got.status == 200:
            kind = got.headers.get("Content-Type", "").lower()
            if kind.startswith(NOT_PICTURES):
                raise _refused("it is not a picture", kind.split(";")[0][:60])
            return await read(got, most)
        if got.status in GONE:
            raise Expired
        if got.status == 429 or got.status >= 500:
            raise Lost(f"the storage answers {got.status}", sent=True)
        moved = got.headers.get("Location", "")
        if not 300 <= got.status < 400 or not moved:
            raise _refused("the storage gives no picture", str(got.status))
        return urljoin(link, moved)

    for _ in range(REDIRECTS + 1):
        link, own = check_result_url(link, settings.base, settings.gateway)
        left = max(0.01, until - time.monotonic())
        got = await transport.exchange("GET", link, own, {}, None, left, take)
        if isinstance(got, bytes):
            return got
        link = got
    raise _refused("its link leads on and on", f"more than {REDIRECTS} times")


def inspect(data: bytes) -> tuple[str, int, int]:
    """-> (format, width, height) of a whole, sane picture. Raises HostedError for anything else."""
    problem = ""
    try:
        with Image.open(io.BytesIO(data), formats=[name.upper() for name in FORMATS]) as picture:
            kind = (picture.format or "").lower()
            width, height = picture.size
            if width * height > MOST_SHOWN:
                raise Image.DecompressionBombError
            # Pillow can be told, for a whole process, to fill what is missing with gray
            if not _whole(data, kind):
                problem = "it is cut short"
            picture.load()
    except Image.DecompressionBombError:
        problem = f"it would unpack to more than {MOST_SHOWN >> 20} megapixels"
    except Exception:  # Pillow's readers raise anything at all on damaged files
        problem = problem or "it is damaged, or no PNG, JPEG or WebP"
    if problem:
        raise _refused(problem, f"{len(data):,} bytes")
    return kind, width, height


def _whole(data: bytes, kind: str) -> bool:
    """Whether the file's end is there."""
    if kind == "webp":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return ENDS[kind] in data[-1024:]


def _refused(why: str, seen: str) -> HostedError:
    return HostedError("download", f"What came is not used: {why}", seen, RETRY)
