"""From a request to a task with the service that is paid once, whatever breaks in between."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal

from .journal import SENDING, SENT, Entry, Journal
from .money import Ledger, Price
from .outcomes import AGAIN, HostedError, cents_of, detail_of, of_status, retry_after
from .pace import Pace
from .request import Request
from .settings import Settings
from .transport import Answer, Lost, Transport

log = logging.getLogger(__name__)
TASK_ID = re.compile(r"[\w.:-]{1,200}", re.ASCII)
NO, UNSURE, DONE = "no", "unsure", "done"  # whether a task may exist with the service


@dataclass(frozen=True)
class Run:
    """What one call of Client.run works with."""

    request: Request
    price: Price
    fingerprint: str
    settings: Settings
    journal: Journal
    ledger: Ledger
    pace: Pace
    transport: Transport


class Submission:
    def __init__(self, run: Run):
        self.run, self.sending = run, NO

    async def obtain(self, run_id: str, ceilings: tuple[Decimal, Decimal]) -> tuple[Entry, bool]:
        """A task with the service -> (its entry, whether it was there before).

        `ceilings`: cents per run and per day.
        """
        run, key = self.run, self.run.fingerprint
        async with run.journal.submitting(key, run.pace.check):
            entry = run.journal.read(key)
            if entry and entry.state == SENT:
                _try(run.ledger.settle, entry.booking, cents_of(entry.cost or None))
                return entry, True
            if entry:  # nobody holds the lock, so its process ended before the answer came
                run.journal.forget(key)
                raise unsure("the program ended while it was sent")
            name, cents = run.request.endpoint.name, run.price.cents
            booking = run.ledger.reserve(name, cents, run_id, *ceilings)
            try:
                entry = Entry(name, SENDING, run.pace.now(), booking, str(cents))
                run.journal.write(key, entry)
                return await self._submit(entry), False
            except BaseException as error:
                # An interrupt in the middle of a submission leaves the entry: the next run tells.
                if self.sending == NO or (
                    self.sending == UNSURE and isinstance(error, HostedError)
                ):
                    run.journal.forget(key)
                if self.sending == NO:
                    run.ledger.release(booking)
                raise

    async def _submit(self, entry: Entry) -> Entry:
        """Send until the service takes it. Only what cannot have made a task is sent again."""
        pace, timing = self.run.pace, self.run.pace.timing
        until, wait, tries = pace.clock() + timing.submit, timing.first, 0
        while True:
            pace.check()
            pace.progress(None, "submitting")
            answer, sent = None, None
            try:
                answer, sent = await pace.finish(self._send(entry))
            except Lost as lost:
                if lost.sent:
                    raise unsure(lost.why) from None
                seen = lost.why
                problem = HostedError("network", "The service cannot be reached", seen, AGAIN)
            else:
                if sent:
                    return sent
                problem = self._refusal(answer)
            tries += 1
            pause, wait = pace.after(answer, wait), pace.longer(wait)
            busy = problem.code == "busy"
            final = problem.code not in ("busy", "network", "service") or (
                answer is not None and answer.status < 429
            )
            if final or (not busy and tries >= timing.attempts) or pace.clock() + pause > until:
                raise problem
            pace.progress(None, f"the service is busy: waiting {pause:.0f} s" if busy else "retry")
            await pace.pause(pause)

    def _refusal(self, answer: Answer) -> HostedError:
        detail = detail_of(answer.body, self.run.settings.key.scrub)
        asked = retry_after(answer.headers, self.run.pace.now())
        if answer.status == 429 and asked:
            detail = f"{detail}; it asks to wait {asked:.0f} seconds"
        return of_status(answer.status, detail, submitting=True)

    async def _send(self, entry: Entry) -> tuple[Answer, Entry | None]:
        """Post once. A task that was made is in the journal before anything else happens."""
        run = self.run
        url = run.settings.base + run.request.endpoint.path
        self.sending = UNSURE
        try:
            answer = await run.transport.call("POST", url, run.request.body(), run.pace.timing.send)
        except Lost as lost:
            self.sending = UNSURE if lost.sent else NO
            raise
        except HostedError as error:
            self.sending = NO if error.code == "address" else UNSURE
            if self.sending == NO:
                raise
            raise unsure("an answer without bounds") from None
        if answer.status == 504:  # a gateway that stopped waiting for who may have taken it
            raise Lost("504: the service did not answer its own gateway", sent=True)
        if not 200 <= answer.status < 300:
            self.sending = NO
            return answer, None
        entry = self._taken(answer, entry)
        _try(run.journal.write, run.fingerprint, entry)
        self.sending = DONE
        cost = cents_of(entry.cost or None)
        _try(run.ledger.settle, entry.booking, cost)
        if cost is not None and cost != run.price.cents:
            log.warning("FLUX.2 hosted: %s ¢ expected, %s ¢ reported", run.price.cents, cost)
        return answer, entry

    def _taken(self, answer: Answer, entry: Entry) -> Entry:
        """The entry of a task that the service has made. An address that is none comes out later,
        when the task is safe in the journal."""
        found, key = answer.json(), self.run.settings.key
        task, polling, cost = found.get("id"), found.get("polling_url"), cents_of(found.get("cost"))
        if not isinstance(task, str) or not TASK_ID.fullmatch(task) or key.scrub(task) != task:
            raise unsure("an answer without a task in it")
        if not isinstance(polling, str) or len(polling) > 8192 or key.scrub(polling) != polling:
            polling = ""
        cost = "" if cost is None else str(cost)
        return replace(entry, state=SENT, task_id=task, polling_url=polling, cost=cost)


def unsure(why: str) -> HostedError:
    return HostedError(
        "unsure",
        "The answer to a submission was lost, so it may have been paid for",
        why,
        "Look at your account's list of tasks; queueing again submits, and pays, anew",
    )


def _try(note: Callable[..., None], *values) -> None:
    """Write down what has happened. A full disk must not lose a task that is paid for: the amount
    stays booked as expected, and this run goes on from memory."""
    try:
        note(*values)
    except HostedError as error:
        log.warning("FLUX.2 hosted: %s", error)
