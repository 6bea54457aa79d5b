"""From a task to its picture: polls, states, the link of the result."""

import asyncio
from decimal import Decimal
from typing import Any

from . import download
from .addresses import check_task_url
from .journal import Entry
from .outcomes import LATER, HostedError, cents_of, detail_of, of_state, of_status, plain
from .result import Result
from .submission import Run
from .transport import Answer, Lost

READY = "Ready"
ENDED = ("Error", "Failed", "Request Moderated", "Content Moderated")
UNKNOWN = "Task not found"
FINAL = ("moderated", "failed", "gone", "expired")  # it can never be had
WORDS = {"Pending": "waiting for the service"}


class Waiting:
    def __init__(self, run: Run, entry: Entry):
        self.run, self.entry = run, entry

    async def result(self, resumed: bool) -> Result:
        """Poll until the task ends, fetch what it made, and look at it."""
        run, settings = self.run, self.run.settings
        try:
            check_task_url(self.entry.polling_url, settings.base, settings.gateway)
        except HostedError:
            run.journal.forget(run.fingerprint)
            raise
        try:
            answer = await self._ready(at_once=resumed)
            data, answer = await self._fetch(answer)
        except HostedError as error:
            if error.code in FINAL:
                run.journal.forget(run.fingerprint)
            raise
        kind, width, height = await asyncio.to_thread(download.inspect, data)
        seed, prompt = answer["result"].get("seed"), answer["result"].get("prompt")
        asked = run.request.fields
        return Result(
            data,
            kind,
            width,
            height,
            run.request,
            settings.origin,
            settings.region,
            self.entry.task_id,
            seed if type(seed) is int else asked["seed"],
            settings.key.scrub(prompt) if isinstance(prompt, str) else asked["prompt"],
            run.price,
            cents_of(self.entry.cost or None),
            resumed,
            self.entry.started,
            run.pace.now(),
        )

    async def _ready(self, at_once: bool) -> dict[str, Any]:
        """Poll with growing waits -> the answer whose state is Ready."""
        pace, timing = self.run.pace, self.run.pace.timing
        start, wait, misses, word = pace.clock(), timing.first, 0, "submitted"
        if not at_once:
            await pace.pause(pace.jittered(wait))
        while True:
            answer, problem = None, None
            url = self.entry.polling_url
            try:
                answer = await pace.watch(self.run.transport.call("GET", url, None, timing.reply))
            except Lost as lost:
                seen = lost.why
                problem = HostedError("network", "The service is out of reach", seen, LATER)
            else:
                found, problem = self._judge(answer)
                if problem is None and found["status"] == READY:
                    return found
                if problem is None:
                    misses, word = 0, _word(found["status"])
                    pace.progress(_share(found), word)
            misses += problem is not None
            if problem is not None and misses >= timing.attempts:
                raise problem
            wait = pace.longer(wait)
            pause = pace.after(answer, wait)
            took = pace.clock() - start
            if took + pause > timing.wait:
                seen = f"{word} after {took:.0f} seconds"
                raise problem or HostedError("waited", "The picture is not ready", seen, LATER)
            await pace.pause(pause)

    def _judge(self, answer: Answer) -> tuple[dict[str, Any], HostedError | None]:
        """A poll's answer -> (what it says, a problem worth another try). Raises what is final."""
        found, scrub = answer.json(), self.run.settings.key.scrub
        state = found.get("status")
        detail = detail_of(answer.body, scrub)
        if answer.status == 404 or state == UNKNOWN:
            # also for a moment after the submission, before all of the service knows of it
            return found, of_state(UNKNOWN, "")
        if answer.status == 429 or answer.status >= 500:
            return found, of_status(answer.status, detail, submitting=False)
        if answer.status != 200:
            raise of_status(answer.status, detail, submitting=False)
        state = plain(scrub(state))[:60] if isinstance(state, str) else ""
        if state in ENDED:
            raise of_state(state, _reasons(found, scrub))
        if not state or (state == READY and not isinstance(found.get("result"), dict)):
            seen = "ready, and no result" if state else "an answer without a state"
            return found, HostedError("service", "The service's answer makes no sense", seen, LATER)
        return {**found, "status": state}, None

    async def _fetch(self, answer: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """The bytes behind the link, at once: it dies ten minutes after the task ended."""
        run, pace, timing = self.run, self.run.pace, self.run.pace.timing
        wait, lost, expired = timing.first, 0, 0
        while True:
            pace.progress(0.95, "downloading")
            link = str(answer["result"].get("sample") or "")
            try:
                data = await pace.watch(
                    download.download(run.transport, run.settings, link, timing.fetch)
                )
                return self._safe(data), answer
            except Lost as error:
                lost += 1
                problem = HostedError(
                    "network",
                    "The picture is made, but cannot be fetched",
                    error.why,
                    download.RETRY,
                )
                if lost >= timing.attempts:
                    raise problem from None
            except download.Expired:
                expired += 1
                if expired > 1:
                    raise HostedError(
                        "expired",
                        "The link of the result has expired",
                        f"task {self.entry.task_id}",
                        "Queue it again: that makes, and pays for, a new picture",
                    ) from None
            await pace.pause(pace.jittered(wait))
            wait = pace.longer(wait)
            if expired:
                answer = await self._ready(at_once=True)  # it may have a newer link

    def _safe(self, data: bytes) -> bytes:
        if self.run.settings.key.inside(data):
            raise HostedError(
                "download",
                "The service wrote your key into the picture, so it is not used",
                "",
                "Make a new key in your account, and check the address in your settings",
            )
        return data


def _reasons(found: dict[str, Any], scrub) -> str:
    """What the service says of a failure: {"details": {"Moderation Reasons": [...]}} or text."""
    details = found.get("details")
    if isinstance(details, dict):
        details = details.get("Moderation Reasons", list(details.values()))
    text = ", ".join(map(str, details)) if isinstance(details, list) else str(details or "")
    return plain(scrub(text))


def _word(state: str) -> str:
    return WORDS.get(state, state.lower())


def _share(found: dict[str, Any]) -> float | None:
    """A task's progress, leaving room for the download."""
    progress = found.get("progress")
    if isinstance(progress, bool) or not isinstance(progress, int | float | Decimal):
        return None
    return 0.9 * min(1.0, max(0.0, float(progress)))
