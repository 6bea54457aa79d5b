"""What the hosted tests share: settings for a local server, and a clock that does not wait."""

import asyncio
import threading
from decimal import Decimal

import torch

from flux2_pack.flux2_core.hosted import Client, Timing, Turns, make_request, read_settings
from flux2_pack.flux2_core.references import Reference
from flux2_pack.tests.hosted.server import KEY, Server


class Clock:
    """Time that passes only in `sleep`. Seconds since 1970 begin at a day's noon."""

    noon = 1_767_960_000.0 + 12 * 3600 - 1_767_960_000.0 % 86400

    def __init__(self):
        self.passed, self._lock = 0.0, threading.Lock()

    def __call__(self) -> float:
        return self.passed

    def now(self) -> float:
        return self.noon + self.passed

    async def sleep(self, seconds: float) -> None:
        with self._lock:
            self.passed += seconds
        await asyncio.sleep(0)


def settings_for(server: Server, folder, **more):
    environ = {
        "BFL_API_KEY": more.pop("key", KEY),
        "FLUX2KIT_HOSTED_GATEWAY": server.url,
        "FLUX2KIT_HOSTED_SETTINGS": "",
        "FLUX2KIT_HOSTED_STATE": str(folder / "state"),
        **{f"FLUX2KIT_HOSTED_{name.upper()}": str(value) for name, value in more.items()},
    }
    return read_settings(environ=environ)


def client_for(server: Server, folder, *, clock: Clock | None = None, timing=None, **more):
    clock = clock or Clock()
    server.clock = clock
    return Client(
        settings_for(server, folder, **more),
        timing=timing or Timing(),
        sleep=clock.sleep,
        clock=clock,
        now=clock.now,
        turns=Turns(24),
    )


def ask(seed: int = 1, model: str = "flux-2-klein-4b", size: int = 64, **more):
    return make_request(model, "a red fox", width=size, height=size, seed=seed, **more)


def run(client: Client, request=None, **more):
    return asyncio.run(client.run(request or ask(), **more))


def plain(width: int = 64, height: int = 64, name: str = "", shade: float = 0.5) -> Reference:
    return Reference(torch.full((height, width, 3), shade), name)


def files_of(folder) -> bytes:
    """Everything written below a folder, names included."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return b"\n".join(str(p).encode() + p.read_bytes() for p in paths)


def money(text: str) -> Decimal:
    return Decimal(text)
