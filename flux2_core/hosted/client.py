"""One hosted run: a turn in the queue, a submission that is paid once, the wait, the download."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

from .journal import SENT, Journal
from .money import Ledger, Spending, estimate
from .outcomes import HostedError
from .pace import Pace, Timing
from .request import Request
from .result import Result
from .settings import Settings
from .submission import Run, Submission
from .transport import Transport
from .turns import TURNS, Turns
from .waiting import Waiting


class Client:
    """See the package's documentation. One may serve many runs, also at once."""

    def __init__(
        self,
        settings: Settings,
        *,
        timing: Timing | None = None,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        turns: Turns = TURNS,
    ):
        self._settings, self._timing = settings, timing or Timing()
        self._sleep, self._clock, self._now, self._turns = sleep, clock, now, turns
        self._journal = Journal(settings.folder, now)
        self._ledger = Ledger(settings.folder, now)

    def spent(self) -> Spending:
        """Spending of today against the settings' ceiling per day."""
        return self._ledger.spending(self._settings.per_day)

    def waiting(self, request: Request) -> bool:
        """Whether a paid task of these very inputs waits to be fetched."""
        entry = self._journal.read(request.fingerprint(self._settings.base))
        return entry is not None and entry.state == SENT

    async def run(
        self,
        request: Request,
        *,
        run_id: str = "",
        per_run: Decimal | float | None = None,
        per_day: Decimal | float | None = None,
        progress: Callable[[float | None, str], None] | None = None,
        check: Callable[[], None] | None = None,
        keep: Callable[[Result], None] | None = None,
    ) -> Result:
        """See the package's documentation. Raises HostedError, and what the callbacks raise."""
        settings = self._settings
        ceilings = (_lower(settings.per_run, per_run), _lower(settings.per_day, per_day))
        pace = Pace(
            self._timing,
            self._sleep,
            self._clock,
            self._now,
            check or _nothing,
            progress or _nothing,
        )
        fingerprint = request.fingerprint(settings.base)
        self._journal.sweep()
        pace.progress(None, "queued")
        try:
            async with self._turns.turn(pace.check), Transport(settings) as transport:
                run = Run(
                    request,
                    estimate(request),
                    fingerprint,
                    settings,
                    self._journal,
                    self._ledger,
                    pace,
                    transport,
                )
                entry, resumed = await Submission(run).obtain(run_id, ceilings)
                result = await Waiting(run, entry).result(resumed)
        except HostedError as error:
            error.hide(settings.key.scrub)
            raise
        if keep:
            keep(result)
        self._journal.forget(fingerprint)
        pace.progress(1.0, "done")
        return result


def _nothing(*_) -> None:
    pass


def _lower(ceiling: Decimal, wish: Decimal | float | None) -> Decimal:
    """A workflow may only lower a ceiling."""
    return ceiling if wish is None else min(ceiling, Decimal(str(wish)))
