"""What a hosted picture costs before and after, and the ceilings that stop it in time.

Every amount is in US cents, as a Decimal. A day is one of universal time (UTC).
"""

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

from . import storage
from .endpoints import MEGAPIXEL, TABLE_DATE
from .outcomes import HostedError, cents_of
from .request import Request

REMEMBERED = 3  # days


@dataclass(frozen=True)
class Price:
    """What a request will cost by the table of prices."""

    cents: Decimal
    output_megapixels: int
    input_megapixels: int

    @property
    def text(self) -> str:
        """One line for people."""
        took = f", {self.input_megapixels} MP in" if self.input_megapixels else ""
        return (
            f"{in_cents(self.cents)}: {self.output_megapixels} MP out{took}"
            f" (prices of {TABLE_DATE})"
        )


@dataclass(frozen=True)
class Spending:
    """Cents spent, or reserved for runs under way, since midnight UTC, and what is left."""

    today: Decimal
    left_today: Decimal


def estimate(request: Request) -> Price:
    """The first megapixel of the picture, each further one, and each of the references.

    Each picture counts in whole megapixels of 1024 x 1024, rounded up. How the service rounds is
    not published; rounding each one up alone is the most it can be.
    """
    out = _megapixels(request.size)
    took = sum(_megapixels(upload.size) for upload in request.pictures)
    endpoint = request.endpoint
    return Price(endpoint.first_cents + endpoint.further_cents * (out - 1 + took), out, took)


def _megapixels(size: tuple[int, int]) -> int:
    return max(1, math.ceil(size[0] * size[1] / MEGAPIXEL))


def in_cents(cents: Decimal) -> str:
    """4.5 -> "4.5 ¢"; from a dollar on "$1.25"."""
    if cents >= 100:
        return f"${cents / 100:.2f}"
    return f"{cents.normalize():f} ¢"


class Ledger:
    """Spending of all processes of this user that share a folder: a file, and a lock around it."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time):
        self._folder, self._now = folder, now
        self._path, self._lock = folder / "spending.json", folder / "spending.lock"

    def reserve(
        self, what: str, cents: Decimal, run_id: str, per_run: Decimal, per_day: Decimal
    ) -> str:
        """Book an amount before it is spent -> its id. Raises if a ceiling would be passed."""
        storage.private_folder(self._folder)
        with storage.locked(self._lock):
            bookings = self._load()
            booking = secrets.token_hex(8)
            run, day = _run(run_id) or booking, self._day()
            self._check(bookings, "day", day, cents, per_day)
            self._check(bookings, "run", run, cents, per_run)
            bookings[booking] = {"day": day, "run": run, "what": what, "cents": str(cents)}
            self._save(bookings)
        return booking

    def settle(self, booking: str, cents: Decimal | None) -> None:
        """What it really cost; None keeps the amount booked. Settling twice changes nothing."""
        if cents is None:
            return
        with storage.locked(self._lock):
            bookings = self._load()
            if booking in bookings and bookings[booking]["cents"] != str(cents):
                bookings[booking]["cents"] = str(cents)
                self._save(bookings)

    def release(self, booking: str) -> None:
        """Nothing was submitted: give the amount back."""
        with storage.locked(self._lock):
            bookings = self._load()
            if bookings.pop(booking, None):
                self._save(bookings)

    def spending(self, per_day: Decimal) -> Spending:
        today = _total(self._load(), "day", self._day())
        return Spending(today, max(Decimal(0), per_day - today))

    def _check(
        self, bookings: Mapping[str, Any], name: str, value: str, cents: Decimal, most: Decimal
    ) -> None:
        before = _total(bookings, name, value)
        if before + cents > most:
            what = {"day": "today (UTC)", "run": "in this run"}[name]
            raise HostedError(
                "ceiling",
                f"This would pass your ceiling of {in_cents(most)} per {name}",
                f"{in_cents(cents)} on top of {in_cents(before)} {what}; nothing was submitted",
                f"Raise the ceiling per {name} in your settings or on the node, or wait for"
                " midnight UTC"
                if name == "day"
                else "Raise the ceiling per run in your settings or on the node, or ask for less",
            )

    def _day(self) -> str:
        return datetime.fromtimestamp(self._now(), timezone.utc).strftime("%Y-%m-%d")

    def _load(self) -> dict[str, dict[str, str]]:
        try:
            found = storage.read_json(self._path) or {}
            for line in found.values():
                if cents_of(line["cents"]) is None or not line["day"] or not line["run"]:
                    raise ValueError
        except HostedError:  # a ValueError as well, but one that is told already
            raise
        except (ValueError, TypeError, KeyError, AttributeError):
            raise HostedError(
                "state",
                "The file about spending is damaged, so the ceilings cannot be kept",
                str(self._path),
                "Delete it; spending today then counts from zero",
            ) from None
        return found

    def _save(self, bookings: Mapping[str, Mapping[str, str]]) -> None:
        oldest = datetime.fromtimestamp(self._now() - REMEMBERED * 86400, timezone.utc)
        day = oldest.strftime("%Y-%m-%d")
        storage.write_json(self._path, {k: v for k, v in bookings.items() if v["day"] >= day})


def _run(run_id: str) -> str:
    """A run's id of any length and content -> a short word."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:16] if run_id else ""


def _total(bookings: Mapping[str, Any], name: str, value: str) -> Decimal:
    return sum((Decimal(b["cents"]) for b in bookings.values() if b[name] == value), Decimal(0))
