"""A queue for the tasks of one process: so many at a time, first come, first served.

Each queue run of a host may have an event loop and a thread of its own, so asyncio's semaphore,
which belongs to one loop, does not do.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable

from .endpoints import ACTIVE_TASKS

GLANCE = 0.25  # seconds between two looks at an interrupt


class Turns:
    def __init__(self, most: int):
        self._free, self._lock = most, threading.Lock()
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = deque()

    @contextlib.asynccontextmanager
    async def turn(self, check: Callable[[], None]) -> AsyncIterator[None]:
        """Wait for a place and hold it. `check` may raise while waiting."""
        await self._take(check)
        try:
            yield
        finally:
            self._give()

    async def _take(self, check: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._free:
                self._free -= 1
                return
            ticket = (loop, loop.create_future())
            self._waiting.append(ticket)
        try:
            while not ticket[1].done():
                check()
                await asyncio.wait({ticket[1]}, timeout=GLANCE)
        except BaseException:
            with self._lock:
                queued = ticket in self._waiting
                if queued:
                    self._waiting.remove(ticket)
            if not queued:  # the place was being handed to us
                self._give()
            raise

    def _give(self) -> None:
        with self._lock:
            while self._waiting:
                loop, future = self._waiting.popleft()
                with contextlib.suppress(RuntimeError):  # its loop has ended
                    loop.call_soon_threadsafe(_grant, future)
                    return
            self._free += 1


def _grant(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


TURNS = Turns(ACTIVE_TASKS)
