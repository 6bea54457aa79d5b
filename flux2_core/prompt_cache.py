"""What a text encoder made of a prompt, kept on disk: the same prompt needs no encoder again.

An entry belongs to one text encoder, told by its weights, and to one row of tokens, which holds
template, prompt, length and cut. Rows come back bit for bit. A file is written whole or not at all
and is checked in full before it is used: one that is damaged or of other making is computed anew.
"""

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import Flux2Error
from .formats import Packed
from .text_encoder import TextEncoder
from .tokenizer import PromptTokenizer

KEY, VERSION = "flux2_kit_prompt", 1
MOST_BYTES = 2 << 30  # some 130 prompts of dev, 270 of klein 4B
WHOLE = 1 << 20  # bytes: weights up to this size are read in full
BLOCK, BLOCKS = 4096, 16  # bytes of a larger weight that are read, evenly spread, its end included
HEADER = 1 << 16  # bytes: more than any header of ours
ABANDONED = 3600  # seconds after which a half-written file has no writer any more
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
PART = re.compile(r"[0-9a-f]{64}\..*\.part")
log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------- identity


def fingerprint(*parts: Any) -> str:
    """A digest of weights and of what else tells a text encoder: tensors, Packed, and mappings,
    sequences, numbers and texts of them.

    Of a tensor it holds dtype, shape and bytes: all of them up to WHOLE, samples beyond that (a 24 B
    encoder would take a minute otherwise), so a caller adds the file's date and size.
    Raises TypeError for anything that cannot be told from another of its kind.
    """
    digest = sha256()
    for piece in _pieces(parts):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield _bytes(value)
    elif isinstance(value, Packed):
        yield f"packed {value.format} {value.shape}".encode()
        yield from _pieces(value.parts)
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for name in sorted(value, key=str):
            yield from _pieces(name)
            yield from _pieces(value[name])
    elif isinstance(value, (list, tuple)):
        yield f"sequence {len(value)}".encode()
        for part in value:
            yield from _pieces(part)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        yield f"{type(value).__name__} {value!r}".encode()
    else:
        raise TypeError(type(value).__name__)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    if flat.numel() > WHOLE:
        step = (flat.numel() - BLOCK) // (BLOCKS - 1)
        samples = flat.as_strided((BLOCKS, BLOCK), (step, 1), flat.storage_offset())
        flat = torch.cat((samples.reshape(-1), flat[-BLOCK:]))
    return flat.cpu().numpy().tobytes()


def weights_of(encoder: TextEncoder) -> dict[str, Tensor]:
    """All that is stored of a text encoder, codes and scales included."""
    return dict(encoder.named_parameters()) | dict(encoder.named_buffers())


def key(encoder: str, tokenizer: PromptTokenizer, prompt: str, *how: Any) -> str:
    """The name of an entry. `encoder`: its fingerprint; `how`: what else decides the rows' bits,
    such as dtype and device."""
    config, template = tokenizer.config, tokenizer.template
    tokens = tokenizer.tokens(prompt)[: config.text_length]
    described = repr(config), template.before, template.after
    return fingerprint(VERSION, encoder, described, tokens, how)


# ------------------------------------------------------------------------------------------- cache


class PromptCache:
    """A folder of entries that together take at most `most_bytes`; the least recently used go.

    Several processes may use one folder. A disk that is full or cannot be written is no error: the
    prompt is encoded, and the log says why it was not kept.
    """

    def __init__(self, folder: str | Path, most_bytes: int = MOST_BYTES):
        self.folder, self.most_bytes = Path(folder), most_bytes
        self.hits, self.misses = 0, 0

    @torch.no_grad()
    def encode(self, encoder: TextEncoder, prompts: str | Sequence[str]) -> Tensor:
        """As `encoder.encode`, one prompt at a time: (B, text_length, context_dim)."""
        tokenizer = encoder.tokenizer
        if tokenizer is None:
            return encoder.encode(prompts)  # which says what is missing
        stored, weight = weights_of(encoder), encoder.model.embed_tokens.weight
        edits = sum(0 if p.is_inference() else p._version for p in stored.values())
        which, how = fingerprint(stored, edits), (weight.dtype, weight.device.type)
        rows = [
            self.rows(key(which, tokenizer, prompt, *how), partial(encoder.encode, prompt))
            for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        return torch.cat([r.to(weight.device) for r in rows])

    def rows(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """An entry, made if it is not there."""
        found = self.read(key)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        made = make()
        self.write(key, made)
        return made

    def read(self, key: str) -> Tensor | None:
        """An entry on the CPU, None if there is none. One that is not as it was written goes."""
        path = self._path(key)
        try:
            data = path.read_bytes() if path.stat().st_size <= self.most_bytes else b""
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("A cached prompt cannot be read, it is encoded anew: %s", error)
            return None
        try:
            rows = _unpack(key, data)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError):
            log.warning("The cached prompt %s is damaged, it is encoded anew", path.name)
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return rows

    def write(self, key: str, rows: Tensor) -> None:
        """Keep rows, float of any width, under a name; what was there is replaced."""
        data = _pack(key, rows)
        if len(data) > self.most_bytes:
            log.warning(
                "A prompt of %.1f MB is not cached: the cache has %.1f MB",
                len(data) / 1e6,
                self.most_bytes / 1e6,
            )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(".part", f"{key}.", self.folder)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(data)
                os.replace(part, self._path(key))
            except OSError:
                _remove(Path(part))
                raise
            self._shrink(self._path(key).name)
        except OSError as error:
            log.warning("A prompt could not be cached: %s", error)

    def _path(self, key: str) -> Path:
        if not NAME.fullmatch(f"{key}.safetensors"):
            raise Flux2Error("This is no key of a cached prompt", repr(key)[:60], "Use key()")
        return self.folder / f"{key}.safetensors"

    def _shrink(self, newest: str) -> None:
        """Remove what was used longest ago until the rest fits; files of others are left alone."""
        found = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except OSError:  # another process was quicker
                continue
            if NAME.fullmatch(path.name):
                found.append((path.name == newest, status.st_mtime_ns, status.st_size, path))
            elif PART.fullmatch(path.name) and time.time() - status.st_mtime > ABANDONED:
                _remove(path)
        total = sum(size for *_, size, _ in found)
        for *_, size, path in sorted(found):
            if total <= self.most_bytes:
                break
            _remove(path)
            total -= size


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


# -------------------------------------------------------------------------------------------- file


def _pack(key: str, rows: Tensor) -> bytes:
    """Rows that a bf16 encoder gave as float32 are stored as bf16, if that loses no bit."""
    rows = rows.detach().cpu().contiguous()
    short = rows.bfloat16()
    exact = rows.dtype == torch.float32 and torch.equal(short.float(), rows)
    stored = short if exact else rows
    about: dict[str, Any] = {"version": VERSION, "key": key, "dtype": str(rows.dtype)}
    about["digest"] = _digest(about, stored)
    return save({"rows": stored}, {KEY: json.dumps(about)})


def _unpack(key: str, data: bytes) -> Tensor:
    length = int.from_bytes(data[:8], "little")
    if length > HEADER:
        raise ValueError("a header of another making")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    (rows,) = load(data).values()
    digest = about.pop("digest")
    if about["version"] != VERSION or about["key"] != key or digest != _digest(about, rows):
        raise ValueError("not what was written")
    return rows.to(
        {str(t): t for t in (torch.float32, torch.bfloat16, torch.float16)}[about["dtype"]]
    )


def _digest(about: Mapping[str, Any], rows: Tensor) -> str:
    digest = sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(f"{rows.dtype} {tuple(rows.shape)}".encode())
    digest.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
