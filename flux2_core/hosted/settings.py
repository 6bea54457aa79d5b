"""Key, address and ceilings: from the environment or one private file, never from a workflow.

They are read together: an address from one place is never used with a key from another, so nobody
who can change one of them alone can have the key sent to himself.
"""

import base64
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .addresses import clean_base, is_gateway_only, origin_of
from .outcomes import HostedError, cents_of

REGIONS = {
    "global": "https://api.bfl.ai",
    "eu": "https://api.eu.bfl.ai",
    "us": "https://api.us.bfl.ai",
}
PER_RUN, PER_DAY = Decimal(100), Decimal(1000)  # cents
LARGEST_FILE = 64 * 1024
LONGEST_KEY = 512
FILE_FIELDS = ("key", "address", "gateway", "per_run", "per_day")
ENVIRONMENT = {
    "key": "BFL_API_KEY",
    "address": "FLUX2KIT_HOSTED_ADDRESS",
    "gateway": "FLUX2KIT_HOSTED_GATEWAY",
    "per_run": "FLUX2KIT_HOSTED_PER_RUN",
    "per_day": "FLUX2KIT_HOSTED_PER_DAY",
}
FILE = "FLUX2KIT_HOSTED_SETTINGS"
STATE = "FLUX2KIT_HOSTED_STATE"
HIDDEN = "(the key)"


class Secret:
    """A key that shows itself to nobody but `reveal`'s caller, and can be neither stored nor sent
    by accident."""

    __slots__ = ("_forms",)

    def __init__(self, text: str):
        forms = {text, quote(text, safe=""), base64.b64encode(text.encode()).decode()}
        object.__setattr__(self, "_forms", (text, *sorted(forms - {text})))

    def reveal(self) -> str:
        return self._forms[0]

    def scrub(self, text: str) -> str:
        """The text without the key, also as it looks in an address or in base64."""
        for form in self._forms:
            text = re.sub(re.escape(form), HIDDEN, text, flags=re.IGNORECASE)
        return text

    def inside(self, data: bytes) -> bool:
        """Whether the key is in there."""
        return any(form.encode() in data for form in self._forms)

    def __repr__(self) -> str:
        return HIDDEN

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return HIDDEN

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a key does not change")

    def __reduce_ex__(self, protocol):
        raise TypeError("a key is not stored")

    def __deepcopy__(self, memo):
        return self


@dataclass(frozen=True)
class Settings:
    """What read_settings found. `base` is where requests go: scheme, host, port and path prefix."""

    key: Secret = field(repr=False)
    base: str
    gateway: bool  # base is the user's own gateway: it alone may be a private or loopback address
    region: str
    per_run: Decimal  # cents
    per_day: Decimal
    folder: Path  # of the journal and the ledger

    @property
    def origin(self) -> str:
        """scheme://host[:port] of `base`."""
        return origin_of(self.base)


def read_settings(region: str = "global", environ: Mapping[str, str] | None = None) -> Settings:
    """Key, address, gateway and ceilings, from the environment or from the settings file.

    `region` is global, eu or us, and all that a workflow may choose. Raises HostedError.
    """
    environ = os.environ if environ is None else environ
    if region not in REGIONS:
        raise HostedError(
            "settings", "There is no such region", f"'{region}'", f"Use {', '.join(REGIONS)}"
        )
    values, source = _values(environ)
    if not values.get("key"):
        raise HostedError(
            "settings",
            "There is no key for the hosted models",
            f"{source} has none",
            f"Set the environment variable {ENVIRONMENT['key']}, or write the key into"
            f" {settings_path(environ) or 'a settings file'}",
        )
    base, gateway = _base(values, region)
    return Settings(
        _key(values["key"], source),
        base,
        gateway,
        region,
        _ceiling(values.get("per_run"), PER_RUN, "per run", source),
        _ceiling(values.get("per_day"), PER_DAY, "per day", source),
        _folder(environ),
    )


def settings_path(environ: Mapping[str, str]) -> Path | None:
    """Where the settings file is looked for; None if FLUX2KIT_HOSTED_SETTINGS is set and empty."""
    if FILE in environ:
        return Path(environ[FILE]).expanduser() if environ[FILE] else None
    home = environ.get("APPDATA") if os.name == "nt" else environ.get("XDG_CONFIG_HOME")
    return Path(home or Path.home() / ".config") / "flux2-kit" / "hosted.json"


def _values(environ: Mapping[str, str]) -> tuple[Mapping[str, Any], str]:
    """All fields from one place, and what messages call it."""
    found = {k: environ[name].strip() for k, name in ENVIRONMENT.items() if environ.get(name)}
    path = settings_path(environ)
    if path is None or not os.path.lexists(path):
        if FILE in environ and path is not None:
            raise HostedError(
                "settings", "There is no such settings file", str(path), f"Correct {FILE}"
            )
        return found, "the environment"
    if found:
        raise HostedError(
            "settings",
            "The hosted models are set up in two places, which must not be mixed",
            f"{', '.join(ENVIRONMENT[k] for k in found)} in the environment, and {path}",
            f"Remove one of them; an empty {FILE} says that there is no file",
        )
    return read_private(path, FILE_FIELDS, ("key", "address", "gateway")), str(path)


def read_private(path: Path, fields: tuple[str, ...], texts: tuple[str, ...]) -> dict[str, Any]:
    """A settings file's fields, of which `texts` are text; refused if anybody but its owner may read
    or change it. Raises HostedError."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise HostedError(
            "settings",
            "The settings file cannot be opened",
            f"{path}: {error.strerror}",
            "Make it a file that you own and can read",
        ) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
            raise HostedError(
                "settings",
                "The settings are not a small file",
                str(path),
                f"Write a file with {', '.join(fields)} in it",
            )
        if os.name != "nt":
            _check_private(path, status)
        raw = os.read(handle, LARGEST_FILE + 1)
    finally:
        os.close(handle)
    problem = ""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):  # its message would quote the file, hence the key
        values, problem = None, "it is not JSON"
    if not isinstance(values, dict):
        values, problem = {}, problem or "it is not a table in curly brackets"
    elif unknown := sorted(str(name) for name in values if name not in fields):
        problem = f"{len(unknown)} of its names mean nothing here"
    elif any(not isinstance(values.get(n, ""), str) for n in texts):
        problem = f"{', '.join(texts[:-1])} and {texts[-1]} must be text in quotation marks"
    if problem:
        raise HostedError(
            "settings",
            f"The settings file {path} cannot be used",
            problem,
            f"It may hold {', '.join(fields)}, nothing else",
        )
    return {k: v.strip() if isinstance(v, str) else v for k, v in values.items()}


def _check_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise HostedError(
            "settings",
            "The settings file belongs to another user",
            str(path),
            "Make a file of your own",
        )
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise HostedError(
            "settings",
            "Others can read or change the settings file, which holds your key",
            f"{path} has mode {stat.S_IMODE(status.st_mode):o}",
            f"Run chmod 600 {path}; if others use this computer, make a new key as well",
        )


def _base(values: Mapping[str, Any], region: str) -> tuple[str, bool]:
    address, gateway = values.get("address"), values.get("gateway")
    if address and gateway:
        raise HostedError(
            "settings",
            "Both an address and a gateway are set",
            "requests can go to one place only",
            "Keep the gateway, or the address",
        )
    if (address or gateway) and region != "global":
        raise HostedError(
            "settings",
            f"The region {region.upper()} cannot be had through your own address or gateway",
            "it decides where requests go",
            "Choose the region global, or remove the address from your settings",
        )
    if gateway:
        return clean_base(gateway, gateway=True), True
    base = clean_base(address or REGIONS[region], gateway=False)
    if is_gateway_only(base):
        raise HostedError(
            "settings",
            "The address is a private one",
            base,
            "Set it as the gateway if it is your own",
        )
    return base, False


def _key(text: str, source: str) -> Secret:
    if len(text) > LONGEST_KEY or not all("!" <= c <= "~" for c in text) or len(text) < 8:
        raise HostedError(
            "settings",
            "The key is not one",
            f"{len(text)} characters in {source}",
            f"A key has 8 to {LONGEST_KEY} letters, digits and signs, without spaces",
        )
    return Secret(text)


def _ceiling(value: Any, standard: Decimal, what: str, source: str) -> Decimal:
    if value is None or value == "":
        return standard
    cents = cents_of(value)
    if cents is None:
        raise HostedError(
            "settings",
            f"The ceiling {what} is no amount of money",
            f"see {source}",
            "Use a number of US cents",
        )
    return cents


def _folder(environ: Mapping[str, str]) -> Path:
    if environ.get(STATE):
        return Path(environ[STATE]).expanduser()
    home = environ.get("LOCALAPPDATA") if os.name == "nt" else environ.get("XDG_STATE_HOME")
    return Path(home or Path.home() / ".local" / "state") / "flux2-kit" / "hosted"
