"""A chat endpoint that writes prompts: any server that speaks OpenAI's chat completions.

Where it is, its key and its model are set outside the graph, all from the environment or all from
one private file, by the rules of the hosted models' key:
    FLUX2KIT_CHAT_ADDRESS   https://api.example.com/v1, or http on this computer
    FLUX2KIT_CHAT_MODEL     the model's name there
    FLUX2KIT_CHAT_KEY       may be missing for a server of your own
    FLUX2KIT_CHAT_SEES      1 if the model sees pictures
    or the same in FLUX2KIT_CHAT_SETTINGS, by default ~/.config/flux2-kit/chat.json:
    {"address": "https://...", "model": "...", "key": "...", "sees": true}, readable by its owner alone
"""

import asyncio
import base64
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from PIL import Image

from .errors import Flux2Error
from .hosted.addresses import clean_base, origin_of
from .hosted.outcomes import HostedError, plain
from .hosted.settings import LONGEST_KEY, Secret, Settings, read_private
from .hosted.transport import Answer as Reply
from .hosted.transport import Lost, Transport
from .hosted.turns import GLANCE
from .upsample import Answer, Ask
from .vision_tower import MOST_PIXELS

ENVIRONMENT = {
    "address": "FLUX2KIT_CHAT_ADDRESS",
    "model": "FLUX2KIT_CHAT_MODEL",
    "key": "FLUX2KIT_CHAT_KEY",
    "sees": "FLUX2KIT_CHAT_SEES",
}
FILE = "FLUX2KIT_CHAT_SETTINGS"
TEXTS = ("address", "model", "key")
WAIT = 180.0  # seconds for an answer
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class ChatSettings:
    """What read_chat_settings found. `base` ends before /chat/completions; `key` None: none is sent."""

    base: str
    model: str
    key: Secret | None = field(default=None, repr=False)
    sees: bool = False
    gateway: bool = True  # the user's own choice of address: it may be a private one

    @property
    def origin(self) -> str:
        """scheme://host[:port]."""
        return origin_of(self.base)


def read_chat_settings(environ: Mapping[str, str] | None = None) -> ChatSettings:
    """From the environment or from the settings file, never from both. Raises Flux2Error."""
    environ = os.environ if environ is None else environ
    values, source = _values(environ)
    for name in ("address", "model"):
        if not values.get(name):
            raise Flux2Error(
                f"No chat endpoint is set up: its {name} is missing",
                f"{source} has none",
                f"Set {ENVIRONMENT[name]}, or write it into {chat_settings_path(environ) or 'a file'}",
            )
    try:
        base = clean_base(values["address"], gateway=True)
    except HostedError as error:
        raise Flux2Error(
            "The address of the chat endpoint cannot be used",
            error.seen,
            "Write it like https://api.example.com/v1; http is for a server on this computer only",
        ) from None
    model = values["model"]
    if len(model) > 200 or not model.isprintable():
        raise Flux2Error(
            "The chat endpoint's model has no name that can be sent", f"see {source}", "Correct it"
        )
    return ChatSettings(base, model, _key(values.get("key"), source), _sees(values.get("sees")))


def chat_settings_path(environ: Mapping[str, str]) -> Path | None:
    """Where the settings file is looked for; None if FLUX2KIT_CHAT_SETTINGS is set and empty."""
    if FILE in environ:
        return Path(environ[FILE]).expanduser() if environ[FILE] else None
    home = environ.get("APPDATA") if os.name == "nt" else environ.get("XDG_CONFIG_HOME")
    return Path(home or Path.home() / ".config") / "flux2-kit" / "chat.json"


def _values(environ: Mapping[str, str]) -> tuple[Mapping[str, Any], str]:
    found = {k: environ[name].strip() for k, name in ENVIRONMENT.items() if environ.get(name)}
    path = chat_settings_path(environ)
    if path is None or not os.path.lexists(path):
        if path is not None and FILE in environ:
            raise Flux2Error("There is no such settings file", str(path), f"Correct {FILE}")
        return found, "the environment"
    if found:
        raise Flux2Error(
            "The chat endpoint is set up in two places, which must not be mixed",
            f"{', '.join(ENVIRONMENT[k] for k in found)} in the environment, and {path}",
            f"Remove one of them; an empty {FILE} says that there is no file",
        )
    return read_private(path, tuple(ENVIRONMENT), TEXTS), str(path)


def _key(text: str | None, source: str) -> Secret | None:
    if not text:
        return None
    if len(text) > LONGEST_KEY or not all("!" <= c <= "~" for c in text) or len(text) < 8:
        raise Flux2Error(
            "The key of the chat endpoint is not one",
            f"{len(text)} characters in {source}",
            f"A key has 8 to {LONGEST_KEY} letters, digits and signs, without spaces",
        )
    return Secret(text)


def _sees(value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return bool(value)
    if (said := str(value).strip().lower()) in (*YES, *NO):
        return said in YES
    raise Flux2Error(
        "Whether the chat endpoint sees pictures is not said clearly",
        "sees is neither yes nor no",
        "Use 1 or 0",
    )


# ------------------------------------------------------------------------------------ the exchange


class ChatTransport(Transport):
    """As for the hosted models: bounded, never redirected, no error carries the key."""

    def __init__(self, settings: ChatSettings):
        super().__init__(cast(Settings, settings))  # base, key and gateway are all it reads
        self._chat = settings

    def _headers(self, body: bytes | None) -> dict[str, str]:
        key = self._chat.key
        own = {"Authorization": f"Bearer {key.reveal()}"} if key else {}
        return {"Content-Type": "application/json", "Accept": "application/json", **own}


def chat_writer(settings: ChatSettings, check: Callable[[], None] | None = None):
    """A chat endpoint as what writes: Ask -> Answer. `check` is called four times a second, and may
    raise to interrupt. Not to be called from a running event loop's thread."""

    def write(ask: Ask) -> Answer:
        return asyncio.run(_write(settings, ask, check or (lambda: None)))

    return write


async def _write(settings: ChatSettings, ask: Ask, check: Callable[[], None]) -> Answer:
    body = json.dumps(body_of(settings, ask)).encode()
    problem = None
    async with ChatTransport(settings) as transport:
        url = f"{settings.base}/chat/completions"
        task = asyncio.ensure_future(transport.call("POST", url, body, WAIT))
        try:
            while not task.done():
                check()
                await asyncio.wait({task}, timeout=GLANCE)
            reply = task.result()
        except Lost as lost:
            reply, problem = None, lost.why
        finally:
            task.cancel()
    if reply is None:
        raise Flux2Error(
            "The chat endpoint does not answer",
            f"{settings.origin}: {problem}",
            "Start its server, or check the address in your settings",
        )
    return _read(settings, reply)


def body_of(settings: ChatSettings, ask: Ask) -> dict[str, Any]:
    """What is sent. Pictures go along only where the endpoint is said to see."""
    words: Any = ask.user
    if settings.sees and ask.pictures:
        images = [{"type": "image_url", "image_url": {"url": _shown(p)}} for p in ask.pictures]
        words = [*images, {"type": "text", "text": ask.user}]
    return {
        "model": settings.model,
        "messages": [{"role": "system", "content": ask.system}, {"role": "user", "content": words}],
        "temperature": ask.temperature,
        "seed": ask.seed % 2**31,
        "max_tokens": ask.limit,
        "stream": False,
    }


def _shown(picture: Image.Image) -> str:
    """A picture as it is looked at, as a data URL."""
    scale = min(1.0, (MOST_PIXELS / (picture.width * picture.height)) ** 0.5)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    data = io.BytesIO()
    picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(data, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _read(settings: ChatSettings, reply: Reply) -> Answer:
    """The words in a reply, without the key should the server have said it back."""
    scrub = settings.key.scrub if settings.key else str
    found = reply.json()
    if reply.status != 200:
        raise Flux2Error(
            "The chat endpoint refuses" if reply.status < 500 else "The chat endpoint fails",
            f"{reply.status}: {plain(scrub(_detail(found)))}".rstrip(": "),
            {
                401: "Check the key in your settings",
                403: "Check the key and the model in your settings",
                404: "Check the address, which usually ends in /v1, and the model in your settings",
                429: "Wait a little: it takes no more requests at present",
            }.get(reply.status, "Look into the server's own log, and check your settings"),
        )
    try:
        choice = found["choices"][0]
        words = choice["message"]["content"]
        if isinstance(words, list):
            words = "".join(part.get("text", "") for part in words)
        ended = choice.get("finish_reason") != "length"
        if not isinstance(words, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Flux2Error(
            "The chat endpoint's answer has no text in it",
            settings.origin,
            "The address in your settings must lead to an OpenAI-style API",
        ) from None
    return Answer(scrub(words), ended)


def _detail(found: Mapping[str, Any]) -> str:
    error = found.get("error", found.get("detail", found.get("message", "")))
    if isinstance(error, dict):
        error = error.get("message", "")
    return error if isinstance(error, str) else ""
