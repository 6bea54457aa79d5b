"""What can go wrong with a hosted run, each with its word and its sentence."""

import json
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import Any

from ..errors import Flux2Error

CODES = {
    "settings": "key, address or ceilings are missing or cannot be trusted",
    "ceiling": "it would cost more than is allowed; nothing was sent",
    "key": "the service does not know the key (401)",
    "credit": "the account has no credit left (402)",
    "forbidden": "the account may not do this (403)",
    "absent": "there is no such model at this address (404)",
    "inputs": "the service refuses the inputs (400, 422)",
    "busy": "too many requests for longer than we wait (429)",
    "service": "the service fails again and again (5xx), or speaks another language",
    "network": "the service cannot be reached",
    "unsure": "the answer to a submission was lost: it may have been paid",
    "moderated": "the service declined to show the picture, or to read the prompt",
    "failed": "the service could not make the picture",
    "gone": "the service no longer knows the task",
    "expired": "the link of the result has expired",
    "waited": "the picture was not ready in time; the task goes on",
    "address": "an address that the key or we may not go to",
    "download": "what came is not the picture: too large, too slow, of another type, cut short",
    "state": "the files about tasks and money on this computer cannot be used",
}
LATER = "Queue it again later: the same inputs go on with the task that is paid for"
AGAIN = "Queue it again later: nothing was charged"


class HostedError(Flux2Error):
    """A Flux2Error of a hosted run; `code` is one of CODES."""

    def __init__(self, code: str, wrong: str, seen: str = "", do: str = ""):
        assert code in CODES
        self.code = code
        super().__init__(wrong, seen, do)

    def hide(self, scrub: Callable[[str], str]) -> None:
        """Take the key out of everything it says, should a server have said it back to us."""
        self.__init__(self.code, scrub(self.wrong), scrub(self.seen), scrub(self.do))


def of_status(status: int, detail: str, submitting: bool) -> HostedError:
    """An HTTP status that is no success -> its sentence. Only a submission can have wrong inputs;
    a poll that is refused leaves its task as it was."""
    do = AGAIN if submitting else LATER
    doing = "taking the request" if submitting else "being asked for the result"
    known = {
        401: (
            "key",
            "The service does not accept the key",
            "Check the key in your settings: make a new one in your account if it was revoked",
        ),
        402: ("credit", "The account has no credit left", "Add credit to your account"),
        403: (
            "forbidden",
            "The account is not allowed to do this",
            "Look into your account: the key may be limited to other models or to one region",
        ),
        404: (
            "absent",
            "There is nothing at this address of the service",
            "Choose another model, or correct the address in your settings",
        ),
        429: ("busy", "The service takes no more requests at present", do),
    }
    code, wrong, do = known.get(status) or (
        ("service", f"The service fails while {doing}", do)
        if status >= 500
        else (
            "inputs",
            "The service refuses the inputs",
            "Change what it names; nothing was charged",
        )
        if submitting and status in (400, 413, 422)
        else ("service", f"The service gives an unexpected answer while {doing}", do)
    )
    return HostedError(code, wrong, f"{status}: {detail}" if detail else str(status), do)


def detail_of(body: bytes, scrub: Callable[[str], str]) -> str:
    """The words in an error's body, without the key: {"detail": text or a list of fields}."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:200].decode("utf-8", "replace")
        return "" if text.lstrip().startswith("<") else plain(scrub(text))
    found = answer.get("detail", answer.get("message", "")) if isinstance(answer, dict) else answer
    fields = found if isinstance(found, list) else [found]
    return plain(scrub("; ".join(filter(None, map(_field, fields[:5])))))


def _field(entry: Any) -> str:
    """{"loc": ["body", "width"], "msg": "..."} -> "width: ..."."""
    if not isinstance(entry, dict):
        return str(entry)
    place = entry.get("loc")
    names = [str(p) for p in place if p != "body"] if isinstance(place, list) else []
    says = str(entry.get("msg") or entry.get("message") or "not accepted")
    return f"{'.'.join(names)}: {says}" if names else says


def plain(text: str) -> str:
    """At most 300 printable characters: it goes into an error box."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:300]


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a Retry-After asks for, given as a number or as a date; None without one."""
    text = headers.get("Retry-After", "").strip()
    if text.replace(".", "", 1).isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def cents_of(value: Any) -> Decimal | None:
    """A reported cost in credits -> cents; None for what is no amount of money."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        cents = Decimal(str(value))
    except InvalidOperation:
        return None
    if not cents.is_finite() or not 0 <= cents < 10**7:
        return None
    cents = cents.quantize(Decimal("0.0001")).normalize()  # services count money in floats
    return cents.quantize(Decimal(1)) if cents == cents.to_integral_value() else cents


def of_state(state: str, detail: str) -> HostedError:
    """A task's last state, other than Ready -> its sentence."""
    if "moderated" in state.lower():
        what = "prompt or references" if "request" in state.lower() else "picture it made"
        return HostedError(
            "moderated",
            f"The service's moderation stopped the {what}",
            ", ".join(filter(None, (state, detail))),
            "Change the prompt or the references, or raise safety tolerance; another seed may do",
        )
    if state == "Task not found":
        return HostedError(
            "gone",
            "The service no longer knows this task",
            "results are kept for minutes only",
            "Queue it again: that makes, and pays for, a new picture",
        )
    return HostedError(
        "failed",
        "The service could not make the picture",
        ", ".join(filter(None, (state, detail))),
        "Queue it again: that submits it anew, and is paid anew if the service charged this one",
    )
