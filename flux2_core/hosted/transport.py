"""HTTP for the client: one exchange at a time, bounded, never redirected, with errors that are safe
to show. An exception of aiohttp carries the request's headers, and the key with them: none leaves
this file, not even as the cause of another.
"""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from .addresses import GuardedResolver
from .outcomes import HostedError
from .settings import Settings

MOST_REPLY = 1 << 20  # bytes of an answer that is no picture
CONNECT = 30.0  # seconds
AGENT = "flux2-kit"
T = TypeVar("T")


class Lost(Exception):
    """An exchange that did not end. `sent`: the server may have received the request."""

    def __init__(self, why: str, sent: bool):
        self.why, self.sent = why, sent
        super().__init__(why)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The table in it, with exact numbers; {} if there is none."""
        try:
            found = json.loads(self.body, parse_float=Decimal)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class Transport:
    """Connections of one run. Those to the gateway may lead to a private address, others not."""

    def __init__(self, settings: Settings):
        self._settings, self._sessions = settings, []
        self._resolver = GuardedResolver()

    async def __aenter__(self) -> "Transport":
        aiohttp = _aiohttp()
        for resolver in (None, self._resolver):
            # A kept connection may die unseen; a submission on it would have an unknown end.
            connector = aiohttp.TCPConnector(
                force_close=True, use_dns_cache=False, limit=0, resolver=resolver
            )
            session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                headers={"User-Agent": AGENT, "Accept-Encoding": "identity"},
            )
            self._sessions.append(session)
        return self

    async def __aexit__(self, *_) -> None:
        for session in self._sessions:
            await session.close()

    async def call(self, method: str, url: str, body: bytes | None, total: float) -> Answer:
        """One exchange with the service, with the key. The address must have been checked.

        Raises Lost; HostedError for an answer without bounds.
        """

        async def take(got: Any) -> Answer:
            return Answer(got.status, dict(got.headers), await read(got, MOST_REPLY))

        return await self.exchange(
            method, url, self._settings.gateway, take, total, body=body, with_key=True
        )

    async def exchange(
        self,
        method: str,
        url: str,
        gateway: bool,
        take: Callable[[Any], Awaitable[T]],
        total: float,
        *,
        body: bytes | None = None,
        with_key: bool = False,
    ) -> T:
        """What `take` makes of an open answer, in `total` seconds: dripping does not help."""
        aiohttp = _aiohttp()
        from yarl import URL

        session = self._sessions[0 if gateway else 1]
        limits = aiohttp.ClientTimeout(total=total, connect=min(CONNECT, total))
        try:
            async with session.request(
                method,
                URL(url, encoded=True),  # a signed link is used to the letter
                headers=self._headers(body) if with_key else {},  # in no variable of ours
                data=None if body is None else io.BytesIO(body),
                allow_redirects=False,
                timeout=limits,
            ) as got:
                return await take(got)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            problem = self._lost(aiohttp, error, total)
        raise problem  # outside the except block: an exception remembers the one it was raised in

    def _headers(self, body: bytes | None) -> dict[str, str]:
        kind = {} if body is None else {"Content-Type": "application/json"}
        return {"x-key": self._settings.key.reveal(), "Accept": "application/json", **kind}

    def _lost(self, aiohttp: Any, error: BaseException, total: float) -> Exception:
        if self._resolver.refused:
            host, self._resolver.refused = self._resolver.refused, ""
            return HostedError(
                "address",
                "A name leads to a private address, which is not connected to",
                host,
                "Check the address in your settings; if it is your own, set it as the gateway",
            )
        unsent = isinstance(
            error,
            aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL,
        )
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
            why = "its certificate is not valid"
        elif isinstance(error, aiohttp.ClientConnectorDNSError):
            why = "its name is not known: is this computer online?"
        elif isinstance(error, asyncio.TimeoutError):
            why = f"no answer within {round(total, 1):g} seconds"
        else:
            why = "no connection" if unsent else "the connection broke"
        return Lost(why, not unsent)


async def read(got: Any, most: int) -> bytes:
    """All of an answer, unless it is larger than `most` bytes or packed."""
    packed = got.headers.get("Content-Encoding", "identity").lower() not in ("", "identity")
    data = bytearray()
    if not packed and (got.content_length or 0) <= most:
        async for chunk in got.content.iter_chunked(1 << 16):
            data += chunk
            if len(data) > most:
                break
        else:
            return bytes(data)
    raise HostedError(
        "download",
        "The answer is packed, which was not asked for" if packed else "The answer is too large",
        f"more than {most / 2**20:.0f} MB" if not packed else "",
        "Check the address in your settings",
    )


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError:
        aiohttp = None
    if aiohttp is None:
        raise HostedError(
            "network",
            "The hosted models need the Python package aiohttp",
            "it is not installed here; every ComfyUI has it",
            "Run pip install aiohttp",
        )
    return aiohttp
