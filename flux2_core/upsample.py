"""A short prompt into a full one: roles, bounded attempts, and a refusal where it lost something.

    written = upsample(lambda ask: ..., "a red circle", seed=1)    # Upsampled
    written.text, written.said

What writes is a function Ask -> Answer: a text encoder (`local_writer`), a chat endpoint
(chat_endpoint.py), nano's stand-in (upsample_nano.py).
Source of the idea of two roles and of the low temperature: black-forest-labs/flux2 (Apache-2.0).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import Flux2Error
from .generate import Writer
from .protected import lost, protected, respelt

TEMPERATURE = 0.15
ATTEMPTS = 4
LIMIT = 512  # tokens of an answer
CREATE, EDIT = "create", "edit"
TASKS = (CREATE, EDIT)

ROLES = {
    CREATE: """You write prompts for FLUX.2, a model that draws pictures. You are given a short \
prompt and answer with a fuller one for the same picture.
- Leave the subject, how many there are, what they do and every other wish as they are. Add, never contradict.
- Decide what is open, as a photographer or painter would: shape and size, surfaces and materials, \
what stands where, the surroundings, where the light comes from, how hard it is and its colour, lens or medium.
- Describe what can be seen. Say what is there, not what is missing.
- Words to be written in the picture stand in double quotation marks, letter for letter as given. \
If a sign or a screen needs words and has none, give it one to three.
- Copy colours such as #dc2828 and names such as image 1 exactly.
- JSON stays JSON with the same fields. Anything else becomes one paragraph of 60 to 150 words.
Answer with the new prompt and nothing else.""",
    EDIT: """You write instructions for FLUX.2, a model that edits pictures. You are given a wish \
and answer with one clear instruction, 50 to 80 words long, about 30 where the wish is small.
- Say what changes, and name what stays: faces, pose, framing, light, background, whatever the wish leaves alone.
- Call each picture as the wish does: image 1, image 2. Speak of what is in them.
- Use plain and exact words. Turn a vague mood into things that can be seen, and what should not be into what should.
- Words to be written stand in double quotation marks, letter for letter as given. Copy colours \
such as #dc2828 exactly.
- JSON stays JSON with the same fields.
Answer with the instruction and nothing else.""",
}


@dataclass(frozen=True)
class Ask:
    """One question to what writes. `pictures`: PIL images, as many as `references`, or none where it
    sees none. `names`: of the references, empty where they have none. `missed`: what the last
    answer had lost."""

    prompt: str
    task: str = CREATE
    references: int = 0
    names: tuple[str, ...] = ()
    pictures: tuple[Any, ...] = ()
    seed: int = 0
    temperature: float = TEMPERATURE
    limit: int = LIMIT
    missed: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        return ROLES[self.task]

    @property
    def user(self) -> str:
        parts = [self.prompt, self._references()]
        if kept := str(protected(self.prompt)):
            parts.append(f"Copy exactly: {kept}")
        if self.missed:
            parts.append(f"An earlier answer could not be used. It lost {', '.join(self.missed)}")
        return "\n\n".join(part for part in parts if part)

    def _references(self) -> str:
        if not self.references:
            return ""
        names = [*self.names, *[""] * self.references][: self.references]
        called = [f"image {i + 1}" + (f" ({n})" if n else "") for i, n in enumerate(names)]
        where = "The pictures above are" if self.pictures else "There are pictures you cannot see:"
        return f"{where} {', '.join(called)}."


@dataclass(frozen=True)
class Answer:
    """What came back; `ended` False: it was cut off at the limit."""

    text: str
    ended: bool = True


@dataclass(frozen=True)
class Upsampled:
    """The new prompt, or the old one where `kept`; `said`: sentences about it, for people."""

    text: str
    said: tuple[str, ...] = ()
    kept: bool = False


Write = Callable[[Ask], Answer]


def upsample(
    write: Write,
    prompt: str,
    *,
    task: str = "",
    references: int = 0,
    names: Sequence[str] = (),
    pictures: Sequence[Any] = (),
    seed: int = 0,
    temperature: float = TEMPERATURE,
    fits: Callable[[str], bool] | None = None,
    keep: bool = False,
) -> Upsampled:
    """`task`: create or edit; empty means edit where there are references.

    An answer that lost quoted words, a colour or a reference, broke off, or does not fit the text
    encoder (`fits`) is refused, and asked for again with the next seed, ATTEMPTS times in all. Then
    a Flux2Error says what was lost; with `keep` the prompt itself comes back, and `said` says so.
    """
    if not prompt.strip():
        raise Flux2Error("There is no prompt to write on", do="Write a few words as the text")
    task = task or (EDIT if references else CREATE)
    ask = Ask(prompt, task, references, tuple(names), tuple(pictures), seed, temperature)
    refused: list[str] = []
    for attempt in range(ATTEMPTS):
        answer = write(replace(ask, seed=seed + attempt))
        text = tidy(answer.text, prompt, references)
        wrong = _wrong(answer, text, prompt, references, fits)
        if not wrong:
            again = f"Attempt {attempt + 1}: those before lost {_and(refused)}." if refused else ""
            return Upsampled(text, (again,) if again else ())
        refused += [what for what in wrong if what not in refused]
        ask = replace(ask, missed=tuple(wrong))
    seen = f"{ATTEMPTS} attempts lost {_and(refused)}"
    if keep:
        return Upsampled(prompt, (f"Your prompt is used as it is: {seen}.",), True)
    raise Flux2Error(
        "The new prompt would not say what yours says",
        seen,
        "Try another seed or a lower temperature, or let the node keep your prompt",
    )


def _wrong(answer: Answer, text: str, prompt: str, references: int, fits) -> list[str]:
    if not text:
        return ["everything: it was empty"]
    wrong = lost(prompt, text, references)
    if not answer.ended:
        wrong.append("its end: it broke off")
    elif fits and not fits(text):
        wrong.append("its end: it is longer than the text encoder reads")
    return wrong


def tidy(answer: str, prompt: str, references: int = 0) -> str:
    """An answer without the wrapping that language models like: thoughts, a code fence, quotation
    marks around all of it. References are spelt as the prompt spells them."""
    text = respelt(prompt, answer.rpartition("</think>")[2].strip())
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[: -len("```")].partition("\n")[2].strip()
    marks = ('"', '"'), ("“", "”"), ("'", "'")
    if len(text) > 2 and (text[0], text[-1]) in marks:
        inner = text[1:-1].strip()
        if not lost(prompt, inner, references):  # else the marks belong to words that are written
            return inner
    return text


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def local_writer(writer: Writer, on_token: Callable[[int], None] | None = None) -> Write:
    """A text encoder as what writes."""

    def write(ask: Ask) -> Answer:
        options = {"limit": ask.limit, "temperature": ask.temperature, "seed": ask.seed}
        return Answer(
            *writer.write(ask.system, ask.user, ask.pictures, on_token=on_token, **options)
        )

    return write


class Memory:
    """The last results, so that the same question is not asked twice. Threads may share it."""

    def __init__(self, most: int = 64):
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[Hashable, Upsampled] = OrderedDict()

    def get(self, key: Hashable) -> Upsampled | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, value: Upsampled) -> Upsampled:
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return value
