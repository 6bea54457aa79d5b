"""A result's bytes, from a link that nobody has to trust, and the proof that they are a picture."""

import io
import struct
import time
import zlib
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


class Expired(Exception):
    """The link is not valid any more."""


async def download(transport: Transport, settings: Settings, link: str, total: float) -> bytes:
    """Fetch a result, without the key, in `total` seconds. Raises Lost, Expired or HostedError."""
    until = time.monotonic() + total

    async def take(got: Any) -> bytes | str:
        """The bytes, or where they are said to be."""
        if got.status == 200:
            kind = got.headers.get("Content-Type", "").lower()
            if kind.startswith(NOT_PICTURES):
                raise _refused("it is not a picture", kind.split(";")[0])
            return await read(got, MOST_BYTES)
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
        got = await transport.exchange("GET", link, own, take, left)
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
    """Whether nothing is missing, whatever Pillow has been told to overlook."""
    if kind == "webp":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if kind == "jpeg":
        return b"\xff\xd9" in data[-1024:]
    return _png_is_whole(data)


def _png_is_whole(data: bytes) -> bool:
    """Whether every part of a PNG has its checksum, and there is a byte for every pixel.

    Source: the PNG specification (8 bytes of signature; length, name, body, CRC of each part).
    """
    at, need, unpack = 8, 0, zlib.decompressobj()
    while at + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        body, end = data[at + 8 : at + 8 + length], at + 12 + length
        if end > len(data) or zlib.crc32(name + body).to_bytes(4, "big") != data[end - 4 : end]:
            return False
        if name == b"IHDR" and at == 8:  # another one later could claim any size
            need = _unpacked_size(*struct.unpack(">IIBBBBB", body))
        if name == b"IDAT" and need > 0:
            need -= len(unpack.decompress(body, need))
        if name == b"IEND":
            return need == 0
        at = end
    return False


def _unpacked_size(width: int, height: int, depth: int, colour: int, *rest: int) -> int:
    """Bytes of all rows, each with one that says how it was filtered."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    # (first column and row, step right and down) of each pass of an interlaced file
    steps = (
        ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2)) if rest[-1] else ((0, 0, 1, 1),)
    )  # fmt: skip
    sizes = ((-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in steps)
    return sum(h * (1 + -(-w * bits // 8)) for w, h in sizes if w > 0 and h > 0)


def _refused(why: str, seen: str) -> HostedError:
    return HostedError("download", f"What came is not used: {why}", seen, RETRY)
