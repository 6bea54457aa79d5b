"""When a run waits, for how long, and how it is interrupted."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from .outcomes import retry_after
from .transport import Answer
from .turns import GLANCE

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds, and how often. The waits between polls and retries double up to `longest`."""

    first: float = 0.5
    longest: float = 10.0
    jitter: float = 0.2  # a share of the wait, up or down, so that many clients spread
    send: float = 300.0  # one submission, with its pictures
    reply: float = 60.0  # one answer to a poll
    fetch: float = 120.0  # one download
    submit: float = 600.0  # all attempts to submit
    wait: float = 1200.0  # for the picture
    attempts: int = 6  # in a row, at anything


@dataclass(frozen=True)
class Pace:
    """The clock of one run, and its user's two callbacks."""

    timing: Timing
    sleep: Callable[[float], Awaitable[Any]]
    clock: Callable[[], float]  # seconds since whenever
    now: Callable[[], float]  # seconds since 1970
    check: Callable[[], None]  # may raise to interrupt
    progress: Callable[[float | None, str], None]

    def longer(self, wait: float) -> float:
        return min(2 * wait, self.timing.longest)

    def jittered(self, wait: float) -> float:
        return wait * (1 + random.uniform(-1, 1) * self.timing.jitter)

    def after(self, answer: Answer | None, wait: float) -> float:
        """Seconds until the next try: what a Retry-After asks for, never less, else `wait`."""
        asked = retry_after(answer.headers, self.now()) if answer else None
        return self.jittered(wait) if asked is None else asked + random.uniform(0, 0.1)

    async def pause(self, seconds: float) -> None:
        """Sleep, looking at the interrupt in between."""
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            self.check()
            await self.sleep(min(GLANCE, left))
        self.check()

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something that may be given up when the user interrupts."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self.check()
                await asyncio.wait({task}, timeout=GLANCE)
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        return task.result()

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something that must not be given up halfway: a submission may be paid."""
        task = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                await asyncio.wait({task})
            raise
