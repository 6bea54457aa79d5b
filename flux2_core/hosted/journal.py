"""Tasks that are paid for and not yet fetched: one small file each, so that nothing is paid twice.

An entry is written before a submission and again when the service has answered it; it goes when the
result is kept, or can never be had. It holds no prompt, no picture, no link of a result, no key.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import storage
from .outcomes import HostedError

LIFETIME = 24 * 3600  # seconds; the service itself keeps results for minutes
SENDING, SENT = "sending", "sent"


@dataclass(frozen=True)
class Entry:
    """One submission. `booking` is its line in the ledger; `cost` as reported, in cents."""

    endpoint: str
    state: str  # SENDING: no answer yet; SENT: the service has it
    started: float  # seconds since 1970
    booking: str
    estimate: str  # cents
    task_id: str = ""
    polling_url: str = ""
    cost: str = ""


class Journal:
    def __init__(self, folder: Path, now: Callable[[], float] = time.time):
        self._folder, self._now = folder / "tasks", now

    def _path(self, fingerprint: str) -> Path:
        return self._folder / f"{fingerprint}.json"

    def read(self, fingerprint: str) -> Entry | None:
        """The entry of these inputs, if there is one that has not expired."""
        path = self._path(fingerprint)
        try:
            found = storage.read_json(path)
            entry = None if found is None else Entry(**found)
            if entry and not (entry.state in (SENDING, SENT) and entry.started > 0):
                raise ValueError
        except HostedError:  # a ValueError as well, but one that is told already
            raise
        except (ValueError, TypeError):
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            raise HostedError(
                "state",
                "The note about an earlier run with these inputs is damaged; it may have been paid",
                str(aside),
                "Look at your account's list of tasks; queueing again submits, and pays, anew",
            ) from None
        if entry and self._now() - entry.started > LIFETIME:
            self.forget(fingerprint)
            return None
        return entry

    def write(self, fingerprint: str, entry: Entry) -> None:
        storage.private_folder(self._folder.parent)
        storage.private_folder(self._folder)
        storage.write_json(self._path(fingerprint), asdict(entry))

    def forget(self, fingerprint: str) -> None:
        """An entry that cannot be removed does no harm: the next run finds it and pays nothing."""
        with contextlib.suppress(OSError):
            self._path(fingerprint).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what has expired, of all inputs."""
        oldest = self._now() - LIFETIME
        for path in self._folder.glob("*.json") if self._folder.is_dir() else ():
            with contextlib.suppress(OSError):  # another process may have been quicker
                if path.stat().st_mtime < oldest:
                    path.unlink()

    @contextlib.asynccontextmanager
    async def submitting(self, fingerprint: str, check: Callable[[], None]) -> AsyncIterator[None]:
        """One submission of the same inputs at a time, over all processes of this user."""
        storage.private_folder(self._folder.parent)
        storage.private_folder(self._folder)
        async with storage.held(self._folder / f"{fingerprint}.lock", check):
            yield
