"""Where the key and we may go: the addresses in settings, of tasks and of results.

An address that a server names is untrusted. The key goes to the API's own domain over https, or to
the configured gateway; downloads go to public addresses only, and connect to the very address that
was checked, so a name that changes its address between check and use gains nothing.
"""

import asyncio
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from .outcomes import HostedError

OFFICIAL = "bfl.ai"  # the service hands tasks between hosts of this domain
LONGEST_URL = 8192
LONGEST_HOST = 260  # with its port
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def clean_base(text: str, *, gateway: bool) -> str:
    """An address from the settings, without a slash at its end. Raises HostedError."""
    what = "gateway" if gateway else "address"
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        parts, port, host = None, None, ""
    plain = parts is not None and not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts is None or not plain or not host or not _plain(text) or "%" in parts.netloc:
        raise HostedError(
            "settings",
            f"The {what} of the hosted models is not a plain address",
            "it has parts that do not belong there, or no host",  # they may hold a password
            "Write it like https://api.example.com",
        )
    safe = parts.scheme == "https" or (parts.scheme == "http" and gateway and _is_loopback(host))
    if not safe:
        raise HostedError(
            "settings",
            f"The key would travel unencrypted to this {what}",
            f"{parts.scheme or 'no scheme'} to {host}",
            "Use https; http is for a gateway on this computer only",
        )
    shown = f"[{host}]" if ":" in host else host.rstrip(".")
    port = "" if port is None or port == _standard_port(parts.scheme) else f":{port}"
    return f"{parts.scheme}://{shown}{port}{parts.path.rstrip('/')}"


def origin_of(url: str) -> str:
    """scheme://host[:port] of an address that clean_base or check_url made."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def is_gateway_only(base: str) -> bool:
    """Whether a host is written as a private address, which only a gateway may be."""
    host = urlsplit(base).hostname or ""
    return host == "localhost" or (_literal(host) is not None and not is_public(host))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and so do those it carries inside."""
    ip = ipaddress.ip_address(address.split("%")[0])
    inner = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
    bad = not ip.is_global or ip.is_multicast or ip.is_reserved
    return not bad and all(is_public(str(i)) for i in inner if i)


def check_task_url(url: str, base: str, gateway: bool) -> str:
    """The polling address of a task -> itself. Raises unless the key may go there."""
    where = _parsed(url, "the task")
    home = urlsplit(base)
    if gateway:
        good = origin_of(where) == origin_of(base)
    else:
        host, mine = urlsplit(where).hostname or "", home.hostname or ""
        family = OFFICIAL if _within(mine, OFFICIAL) else mine
        good = where.startswith("https://") and _within(host, family)
        good = good and urlsplit(where).port in (None, home.port)
    if not good:
        raise HostedError(
            "address",
            "The service sent us to another place for the result, and the key does not go there",
            urlsplit(where).netloc,
            "The address or gateway in your settings may not be the service's: check it",
        )
    return where


def check_result_url(url: str, base: str, gateway: bool) -> tuple[str, bool]:
    """A result's link, or what it redirects to -> (itself, whether it is the gateway's own)."""
    where = _parsed(url, "the result")
    own = gateway and origin_of(where) == origin_of(base)
    parts = urlsplit(where)
    host = parts.hostname or ""
    private = _literal(host) is not None and not is_public(host)
    if not own and (parts.scheme != "https" or private or host == "localhost"):
        raise HostedError(
            "address",
            "The link of the result leads to a place that is not fetched from",
            f"{parts.scheme} to {host}",
            "Results come over https from the internet; check the address in your settings",
        )
    return where, own


class GuardedResolver:
    """Looks names up for aiohttp, and gives it public addresses only. `refused` tells of others."""

    def __init__(self):
        self.refused = ""

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[Any]:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, family=family
        )
        addresses = [(str(where[0]), kind) for kind, _, _, _, where in found]
        if not addresses or not all(is_public(address) for address, _ in addresses):
            self.refused = host
            raise OSError("not a public address")
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": kind,
                "proto": 0,
                "flags": 0,
            }
            for address, kind in addresses
        ]

    async def close(self) -> None:
        pass


def _parsed(url: Any, what: str) -> str:
    """An address from a server, if it can mean one thing only."""
    problem = "no address" if not isinstance(url, str) or not url else ""
    if not problem and (len(url) > LONGEST_URL or not _plain(url)):
        problem = "an address with signs that do not belong there"
    try:
        parts = urlsplit(url if not problem else "")
        if not problem and ("@" in parts.netloc or not parts.hostname or "%" in parts.netloc):
            problem = "an address with a password, or without a host"
        if not problem and len(parts.netloc) > LONGEST_HOST:
            problem = "an address with a host that cannot be"
        if not problem and parts.port == 0:
            problem = "an address without a port"
    except ValueError:
        problem = "no address"
    if problem:
        raise HostedError(
            "address",
            f"The service's address of {what} cannot be used",
            problem,
            "Report it to the service; check the address in your settings",
        )
    host = parts.hostname or ""
    shown = f"[{host}]" if ":" in host else host
    port = parts.port
    tail = url[len(parts.scheme) + 3 + len(parts.netloc) :]
    port = "" if port is None or port == _standard_port(parts.scheme) else f":{port}"
    return f"{parts.scheme}://{shown}{port}{tail}"


def _plain(url: str) -> bool:
    """Printable ASCII without what browsers and libraries read differently."""
    return all("!" <= c <= "~" and c not in '\\<>"^`{|}' for c in url)


def _standard_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _within(host: str, domain: str) -> bool:
    return host == domain or host.endswith(f".{domain}")


def _literal(host: str) -> Any:
    try:
        return ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    ip = _literal(host)
    return host == "localhost" or (ip is not None and ip.is_loopback)
