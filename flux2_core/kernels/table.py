"""Which implementation serves an operation, and why not a faster one.

Every operation has candidates, the eager definition last. What a call looks like (device, dtypes,
widths, number of rows in powers of two) picks one of them, once; later calls of that kind cost a
look in a dictionary. A candidate that fails is switched off for that device, with one line in the
log, and the next one takes over.
"""

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import Flux2Error

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
DEFINITION = ("eager", "reference")  # what serves when nothing else may


class Case(NamedTuple):
    """A kind of call. `widths` are the sizes that do not grow with the picture, in the order the
    operation states; `rows` is the least power of two that the number of rows does not exceed."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    rows: int

    @property
    def arch(self) -> str:
        return architecture(self.device)

    def __str__(self) -> str:
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(self.dtypes))
        return f"up to {self.rows} rows, {' x '.join(map(str, self.widths))}, {dtypes}"


class Candidate(NamedTuple):
    """An implementation: `refuses` says why it does not serve a case, or None if it does."""

    name: str
    priority: int
    refuses: Callable[[Case], str | None]
    call: Callable[..., Any]


class Row(NamedTuple):
    """What status() says of one kind of call; `refused` pairs faster candidates with reasons."""

    op: str
    device: str
    case: str
    chosen: str
    refused: tuple[tuple[str, str], ...]


class Op:
    """One operation. Call it with a case's device, dtypes and widths, the number of rows, and the
    operation's own arguments."""

    def __init__(self, name: str):
        self.name = name
        self.typical: tuple = ()  # dtypes, widths, rows: what status() asks about before any call
        self.candidates: list[Candidate] = []
        self.chosen: dict[tuple, Candidate] = {}
        self.broken: dict[tuple[str, str], str] = {}  # (candidate, device) -> why

    def __call__(self, device, dtypes: tuple, widths: tuple, rows: int, *args):
        key = (device, dtypes, widths, (rows - 1).bit_length())
        candidate = self.chosen.get(key)
        if candidate is None:
            candidate = self.chosen[key] = self.resolve(_case(key))[0]
        try:
            return candidate.call(*args)
        except (Flux2Error, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            return self._go_on(key, candidate, error, args)

    def resolve(self, case: Case) -> tuple[Candidate, tuple[tuple[str, str], ...]]:
        """-> the candidate that serves this case, and why those before it do not."""
        refused = []
        for candidate in self._order():
            reason = self.broken.get((candidate.name, str(case.device))) or candidate.refuses(case)
            if reason is None:
                return candidate, tuple(refused)
            refused.append((candidate.name, reason))
        raise Flux2Error(
            f"Nothing here computes {self.name}",
            f"{case} on {case.device}: " + "; ".join(f"{n}: {why}" for n, why in refused),
            "Choose another precision for the model",
        )

    def _order(self) -> list[Candidate]:
        ranked = sorted(self.candidates, key=lambda c: -c.priority)
        names = _names()
        if names == (AUTO,):
            return ranked
        last = [name for name in DEFINITION if name not in names]
        return [c for name in (*names, *last) for c in ranked if c.name == name]

    def _go_on(self, key: tuple, failed: Candidate, error: Exception, args):
        """The result by the candidates after `failed`. What failed is switched off if one of them
        does it; if none does, the call is at fault, and the first error is raised."""
        case = _case(key)
        device = str(case.device)
        order = self._order()
        failures = [(failed.name, error)]
        for candidate in order[order.index(failed) + 1 :]:
            if (candidate.name, device) in self.broken or candidate.refuses(case):
                continue
            try:
                result = candidate.call(*args)
            except (Flux2Error, torch.cuda.OutOfMemoryError):
                raise
            except Exception as another:
                failures.append((candidate.name, another))
                continue
            for name, why in failures:
                reason = f"it failed: {type(why).__name__}: {_first_line(why)}"
                self.broken[name, device] = reason
                log.warning(
                    "%s: %s is switched off on %s, %s serves instead; %s",
                    self.name, name, device, candidate.name, reason,
                )  # fmt: skip
            _forget(self)
            return result
        raise error


OPS: dict[str, Op] = {}


def operation(name: str, dtypes: tuple, widths: tuple, rows: int) -> Op:
    """An operation, and a typical case of it."""
    op = OPS.setdefault(name, Op(name))
    op.typical = (dtypes, widths, rows)
    return op


def register(
    op: str,
    name: str,
    priority: int,
    call: Callable[..., Any],
    refuses: Callable[[Case], str | None] = lambda case: None,
) -> None:
    """Add an implementation of `op`; one of the same name is replaced. The higher the priority,
    the earlier it is asked. The eager definition has 0, its fast form 10."""
    table = OPS.setdefault(op, Op(op))
    table.candidates = [c for c in table.candidates if c.name != name]
    table.candidates.append(Candidate(name, priority, refuses, call))
    _forget(table)


_changes = 0  # what served before these may not serve now: compiled graphs look at this number


def _forget(*ops: Op) -> None:
    global _changes
    _changes += 1
    for op in ops:
        op.chosen.clear()


def serves(op: str, device: torch.device, dtypes: tuple, widths: tuple, rows: int = 4096) -> bool:
    """True where a call of this kind is served by more than plain PyTorch, or where the user has
    named what serves. Remembered until a candidate or the wish changes."""
    return _serves(op, device, dtypes, widths, rows, _changes)


def _serves(op: str, device: torch.device, dtypes, widths, rows: int, changes: int) -> bool:
    table = OPS[op]
    key = (device, dtypes, widths, (rows - 1).bit_length())
    candidate = table.chosen.get(key)
    if candidate is None:
        candidate = table.chosen[key] = table.resolve(_case(key))[0]
    return _wish != OFF and (candidate.name not in DEFINITION or candidate.name in _named)


# Constant for torch.compile until `changes` is another, which it guards. The decorator
# torch.compiler.assume_constant_result does this, but imports the whole compiler.
_serves._dynamo_marked_constant = True


def differentiated(*tensors: torch.Tensor) -> bool:
    """True where gradients are wanted, which our operations do not give: PyTorch's own then serve."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ---------------------------------------------------------------------------------- the user's wish


def _split(wish: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in wish.split(","))


_wish = os.environ.get("FLUX2_KERNELS", "").strip() or AUTO
_named = _split(_wish)


class Wish:
    """What is `put` from now on, or for a `with` block: then `before` comes back."""

    def __init__(self, put: Callable[[str], None], name: str, before: str):
        self.put, self.before = put, before
        put(name)

    def __enter__(self) -> "Wish":
        return self

    def __exit__(self, *_) -> None:
        self.put(self.before)


def use(names: str) -> Wish:
    """use("reference"): from now on, or for a `with` block, these implementations come first.

    auto (the fastest that serves), off (the model's own layers, bit for bit what they are without
    this package), reference (the definition), eager (plain PyTorch), triton, a provider's name, or
    several with commas. What they do not serve, plain PyTorch does. The
    environment's FLUX2_KERNELS says the same at the start. Raises Flux2Error for an unknown name.
    """
    return Wish(_set, names, _wish)


def _set(names: str) -> None:
    global _wish, _named
    before, _wish = _wish, names
    _named = _split(names)
    try:
        _names()
    except Flux2Error:
        _wish, _named = before, _split(before)
        raise
    _forget(*OPS.values())


def _names() -> tuple[str, ...]:
    names = _named
    known = {AUTO, OFF} | {c.name for op in OPS.values() for c in op.candidates}
    if unknown := [name for name in names if name not in known]:
        raise Flux2Error(
            "FLUX2_KERNELS names what is not there",
            ", ".join(unknown),
            f"Use one of {', '.join(sorted(known))}",
        )
    return names


# ------------------------------------------------------------------------------------------ status


def status(device: torch.device | str | None = None) -> list[Row]:
    """Which implementation serves each operation here, and why not the faster ones: for the calls
    seen so far on `device` (default: the GPUs, else the CPU), or for a typical one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    devices = here if device is None else [torch.device(device)]
    return [row for place in devices for op in OPS.values() for row in _rows(op, place)]


def _rows(op: Op, device: torch.device) -> list[Row]:
    dtypes, widths, rows = op.typical
    cases = [_case(key) for key in op.chosen if key[0] == device]
    made = []
    for case in cases or [Case(device, dtypes, widths, rows)]:
        chosen, refused = op.resolve(case)
        made.append(Row(op.name, str(device), str(case), chosen.name, refused))
    return made


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """cpu, sm_89, gfx1201, mps, ...: what an implementation is built for. Each GPU by itself."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _case(key: tuple) -> Case:
    device, dtypes, widths, rows = key
    return Case(device, dtypes, widths, 1 << rows)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
