"""Keys and values of reference tokens, kept between steps.

References stand still while the picture is denoised. In the KV form they depend on nothing else,
so their keys and values are computed once (mode "exact"). In all other weights they see the text
and the picture; keeping them for some steps is an approximation (mode "approximate"), refreshed
at an interval and measured at every refresh.

An entry is found by what it was made from: the exact bits of the reference latents, what else the
caller says it depends on, the weights and, in the approximate mode, the run.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .errors import Flux2Error

Mode = Literal["exact", "approximate"]
Store = Literal["model", "fp8"]
Place = Literal["device", "host"]
Print = tuple[int, int]
Block = tuple[Tensor, ...]  # (k, v), or (k's codes, k's scales, v's codes, v's scales)

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}


# ------------------------------------------------------------------------------------ fingerprints


def fingerprint(tensor: Tensor) -> Print:
    """Two 64-bit numbers for a tensor's dtype, shape and exact bits, whatever its strides and device.

    One changed element always changes them; any other two contents agree with a chance below 2^-64.
    """
    return fingerprints([tensor])[0]


def fingerprints(tensors: Sequence[Tensor]) -> list[Print]:
    """`fingerprint` of each, with one host synchronisation for all."""
    if not tensors:
        return []
    sums = [_sums(x) for x in tensors]
    pairs = torch.stack([s.to(sums[0].device) for s in sums]).tolist()
    return [_print(x, pair) for x, pair in zip(tensors, pairs, strict=True)]


def _sums(x: Tensor) -> Tensor:
    """Two sums (2,) of the content's words, each word times a pseudo-random odd number, mod 2^64.

    Words have at most 32 bits: differences in the top bits of 64-bit words would cancel in pairs.
    """
    words = x.detach().contiguous().reshape(-1).view(WORDS[x.element_size()])
    length = 1 << max(0, words.numel() - 1).bit_length()
    return (words.long() * _odd(length, x.device)[:, : words.numel()]).sum(1)


@lru_cache(maxsize=4)
def _odd(length: int, device: torch.device) -> Tensor:
    """(2, length) pseudo-random odd int64, the same on every device."""
    made = torch.empty(2, length, dtype=torch.int64)
    made.random_(generator=torch.Generator().manual_seed(0))
    return (2 * made + 1).to(device)


def _print(x: Tensor, sums: list[int]) -> Print:
    text = repr((str(x.dtype), tuple(x.shape), *sums))
    digest = blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _without_tensors(about: Any, taken: list[Tensor]) -> Hashable:
    """`about` with its tensors taken out, in order: a tensor's own hash is its address."""
    if isinstance(about, Tensor):
        taken.append(about)
        return Tensor
    if isinstance(about, tuple | list):
        return tuple(_without_tensors(part, taken) for part in about)
    return about


# ------------------------------------------------------------------------------------------ blocks


def bytes_for(
    layers: int,
    hidden: int,
    tokens: int,
    batch: int = 1,
    store: Store = "model",
    *,
    head_dim: int = 128,
    itemsize: int = 2,
) -> int:
    """Bytes of one entry: K and V of `tokens` reference tokens in `layers` blocks.

    `itemsize`: bytes of a value as the model computes (bf16: 2); "fp8" does not use it.
    """
    token = hidden + hidden // head_dim * 4 if store == "fp8" else hidden * itemsize
    return 2 * layers * batch * tokens * token


def _encode(x: Tensor, store: Store) -> tuple[Tensor, ...]:
    """A copy of x of its own: x is often a slice of the whole sequence, or is written again."""
    if store == "model":
        return (x.clone(memory_format=torch.contiguous_format),)
    x = x.float().contiguous()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / FP8_MAX  # rows of zeros stay zero
    return (x / scale).to(FP8), scale


def _decode(parts: Sequence[Tensor], like: Tensor, copy: bool = False) -> Tensor:
    x = parts[0].to(like.device, like.dtype, copy=copy)
    return x if len(parts) == 1 else x.mul_(parts[1].to(like.device))


def _to_host(x: Tensor) -> Tensor:
    """Into pinned memory without waiting where x is on a CUDA device; `Recorder.finish` waits."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _size(block: Block) -> int:
    return sum(x.numel() * x.element_size() for x in block)


def _halves(block: Block) -> tuple[Block, Block]:
    middle = len(block) // 2
    return block[:middle], block[middle:]


class _Prefetch:
    """Two device buffers through which blocks come from pinned memory, so that the copy of block
    i + 1 runs beside the work on block i and never more than two blocks lie on the device."""

    def __init__(self, blocks: Sequence[Block], device: torch.device):
        self.blocks, self.device = blocks, device
        self.stream = torch.cuda.Stream(device)
        with torch.inference_mode(False):  # written again in whatever mode `get` is called
            self.buffers = [[torch.empty_like(x, device=device) for x in blocks[0]] for _ in "01"]
        self.coming: dict[int, tuple[int, Any]] = {}  # buffer -> its block, the end of the copy
        for x in (*self.buffers[0], *self.buffers[1]):
            x.record_stream(self.stream)

    def start(self, i: int) -> None:
        if i == len(self.blocks) or (i % 2 in self.coming and self.coming[i % 2][0] == i):
            return
        # the buffer's last block was copied out by work that is already queued here
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for to, x in zip(self.buffers[i % 2], self.blocks[i], strict=True):
                to.copy_(x, non_blocking=True)
            self.coming[i % 2] = i, self.stream.record_event()

    def wait(self, i: int) -> Block:
        """Block i, to be copied out by the current stream; the next one sets out."""
        self.start(i)
        self.start(i + 1)
        torch.cuda.current_stream(self.device).wait_event(self.coming[i % 2][1])
        return tuple(self.buffers[i % 2])


class Kept:
    """An entry that was found."""

    def __init__(self, blocks: Sequence[Block]):
        self._blocks = blocks
        self._prefetch: _Prefetch | None = None

    def get(self, i: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Block i's k and v (B, H, R, D), on the device and in the dtype of `like`; not to be
        written to. B is what was recorded: the caller expands 1."""
        block = self._blocks[i]
        travels = like.is_cuda and not block[0].is_cuda
        if travels:
            if self._prefetch is None or self._prefetch.device != like.device:
                self._prefetch = _Prefetch(self._blocks, like.device)
            block = self._prefetch.wait(i)
        k, v = _halves(block)
        return _decode(k, like, copy=travels), _decode(v, like, copy=travels)


# ------------------------------------------------------------------------------------------- cache


class Key(NamedTuple):
    """What an entry was made from."""

    weights: Hashable
    run: Hashable  # None in the exact mode
    about: Hashable
    content: tuple[Print, ...]  # of the references, then of tensors in `about`


@dataclass(frozen=True, eq=False)
class Entry:
    blocks: list[Block]
    step: int
    bytes: int


@dataclass
class Statistics:
    """hits: forwards served from the cache. misses: forwards that computed the references.
    recorded: entries stored. dropped: entries given up for the limit. drift: the largest
    ||new - old|| / ||new|| of a block's K or V at a refresh, from what is stored; None before one.
    """

    hits: int = 0
    misses: int = 0
    recorded: int = 0
    dropped: int = 0
    drift: float | None = None


class ReferenceCache:
    """Keys and values of reference tokens, kept between steps. One handle for a run or several.

    mode: "exact" for weights in the KV form; "approximate" for all others: a full step whenever
    step < `guard`, and every `interval` steps.
    store: "model" keeps the dtype given, bit for bit; "fp8" keeps e4m3 codes and one float32 scale
    for each row of a head: 52 % of bf16's memory; measured relative error of normally distributed
    K and V 2.6 %, of the worst row 3.3 %.
    place: "device" is where they were computed; "host" is pinned memory, copied one block ahead.
    limit_bytes: the oldest entries go first; None keeps all.
    """

    def __init__(
        self,
        mode: Mode = "exact",
        *,
        interval: int = 4,
        guard: int = 1,
        store: Store = "model",
        place: Place = "device",
        limit_bytes: int | None = None,
    ):
        _check(mode in get_args(Mode), "mode", mode, "Use exact or approximate")
        _check(store in get_args(Store), "store", store, "Use model or fp8")
        _check(place in get_args(Place), "place", place, "Use device or host")
        _check(interval >= 1, "interval", interval, "Use 1 step or more")
        _check(guard >= 0, "guard", guard, "Use 0 steps or more")
        _check(limit_bytes is None or limit_bytes > 0, "limit", limit_bytes, "Use 1 byte or more")
        self.mode: Mode = mode
        self.store: Store = store
        self.place: Place = place
        self.interval, self.guard, self.limit_bytes = interval, guard, limit_bytes
        self.weights: Hashable = None  # who the weights are: model, LoRA, dtype
        self.run: Hashable = None
        self.step = 0
        self.statistics = Statistics()
        self._entries: dict[Key, Entry] = {}  # oldest first

    def __deepcopy__(self, memo) -> "ReferenceCache":
        return self  # a handle: hosts copy the options it travels in

    def begin(self, run: Hashable, weights: Hashable = None) -> None:
        """A run begins, or goes on if `run` is the same. Approximate entries of other runs and all
        entries of other weights are dropped. weights None: as set in `self.weights`."""
        if run != self.run:
            self.run, self.step = run, 0
        if weights is not None:
            self.weights = weights
        run = run if self.mode == "approximate" else None
        self._entries = {
            key: entry
            for key, entry in self._entries.items()
            if key.run == run and key.weights == self.weights
        }

    def key(self, references: Sequence[Tensor], about: Hashable) -> Key:
        """The key for these latents under the present weights (and run).

        about: all else that K and V depend on: positions, kept tokens, strengths, batch, and for
        the approximate mode the texts and the picture's size. Tensors in it, in tuples too, count
        by content.
        """
        tensors = list(references)
        about = _without_tensors(about, tensors)
        run = self.run if self.mode == "approximate" else None
        return Key(self.weights, run, about, tuple(fingerprints(tensors)))

    def due(self, key: Key) -> bool:
        """True where the references must be computed now."""
        entry = self._entries.get(key)
        if entry is None or self.mode == "exact":
            return entry is None
        # a step before the recorded one is another run under the same name
        return self.step < self.guard or not 0 <= self.step - entry.step < self.interval

    def find(self, key: Key) -> Kept | None:
        """The entry, or None where one is `due`."""
        if self.due(key):
            return None
        self.statistics.hits += 1
        return Kept(self._entries[key].blocks)

    def record(self, key: Key, blocks: int) -> "Recorder":
        """Collects `blocks` blocks under this key. What was stored for it is given up at once."""
        self.statistics.misses += 1
        return Recorder(self, key, blocks, self._entries.pop(key, None))

    def clear(self) -> None:
        self._entries.clear()

    @property
    def bytes(self) -> int:
        """Bytes held by all entries. Pinned memory: PyTorch may round each tensor up further."""
        return sum(entry.bytes for entry in self._entries.values())

    def _make_room(self, size: int) -> None:
        limit = self.limit_bytes
        if limit is None:
            return
        if size > limit:
            raise Flux2Error(
                "The references do not fit into the reference cache",
                f"their keys and values take {size / 2**20:.1f} MiB, the limit is {limit / 2**20:.1f} MiB",
                "Raise the limit, store them as fp8, or use fewer or smaller references",
            )
        while self._entries and self.bytes + size > limit:
            del self._entries[next(iter(self._entries))]
            self.statistics.dropped += 1


class Recorder:
    """Collects one entry. Nothing is found under its key before `finish`."""

    def __init__(self, cache: ReferenceCache, key: Key, blocks: int, old: Entry | None):
        self._cache, self._key = cache, key
        self._new: list[Block | None] = [None] * blocks
        same = old is not None and len(old.blocks) == blocks and cache.mode == "approximate"
        self._old: list[Block | None] = list(old.blocks) if old and same else [None] * blocks
        self._layout: list | None = None  # of every block
        self._device = torch.device("cpu")
        self._changes: list[Tensor] = []

    def put(self, i: int, k: Tensor, v: Tensor) -> None:
        """Block i's k and v (B, H, R, D), after QK norm and RoPE; they are copied."""
        store, place = self._cache.store, self._cache.place
        # normal tensors even when the forward runs in inference mode: they outlive it
        with torch.inference_mode(False), torch.no_grad():
            block = (*_encode(k, store), *_encode(v, store))
            layout = [(x.shape, x.dtype, x.device) for x in block]
            if self._layout is None:
                self._cache._make_room(len(self._new) * _size(block))
                self._layout, self._device = layout, k.device
            if layout != self._layout:
                raise ValueError(f"block {i} is {layout}, the first one was {self._layout}")
            if (old := self._old[i]) is not None:
                self._measure(block, old)
                self._old[i] = None  # a refresh needs the room of one entry, not of two
            self._new[i] = tuple(_to_host(x) for x in block) if place == "host" else block

    def finish(self) -> Kept:
        """The entry can be found from now on."""
        blocks = [block for block in self._new if block is not None]
        if not blocks or len(blocks) < len(self._new):
            raise ValueError(f"{len(blocks)} of {len(self._new)} blocks were put")
        if self._cache.place == "host" and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copies into pinned memory
        cache, size = self._cache, sum(map(_size, blocks))
        cache._entries.pop(self._key, None)
        cache._make_room(size)
        cache._entries[self._key] = Entry(blocks, cache.step, size)
        cache.statistics.recorded += 1
        if self._changes:
            drift = torch.stack(self._changes).max().item()
            cache.statistics.drift = max(drift, cache.statistics.drift or 0.0)
        return Kept(blocks)

    def _measure(self, new: Block, old: Block) -> None:
        for a, b in zip(_halves(new), _halves(old), strict=True):
            if a[0].shape == b[0].shape:
                like = torch.empty(0, device=a[0].device)
                x, y = _decode(a, like), _decode(b, like)
                self._changes.append((x - y).norm() / x.norm().clamp_min(1e-30))


def _check(right: bool, name: str, seen: object, do: str) -> None:
    if not right:
        raise Flux2Error(f"The reference cache cannot work with this {name}", repr(seen), do)
