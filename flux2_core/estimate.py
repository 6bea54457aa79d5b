"""What a forward pass costs before it runs: arithmetic, memory, time.

Sizes are numbers of tokens: `text` rows, `picture` positions (width * height / 256), and for each
reference the patches that stay. Nothing here runs the model but `calibrate`, briefly.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import attend
from .configs import TransformerConfig
from .kv_cache import ReferenceCache, Store, bytes_for
from .layers import Modulation


class Flops(NamedTuple):
    """Floating-point operations, two for each multiply-add."""

    products: float  # of the linear layers
    attention: float


class Rows(NamedTuple):
    """A forward pass as lengths: rows that pass through the blocks, keys that they see, rows of
    references among them that see references only."""

    own: int
    keys: int
    isolated: int


def rows(
    config: TransformerConfig,
    *,
    text: int,
    picture: int,
    references: Sequence[int] = (),
    cached: bool = False,
    kv: bool | None = None,
) -> Rows:
    """`cached`: the references' keys and values are there already, so their rows are not computed.
    `kv`: references see references only; None follows the config."""
    every = sum(references)
    own = text + picture + (0 if cached else every)
    apart = config.kv_references if kv is None else kv
    return Rows(own, text + picture + every, every if apart and not cached else 0)


def flops(config: TransformerConfig, *, text: int, picture: int, batch: int = 1, **more) -> Flops:
    """Of one forward; the other arguments are those of `rows`. The last block's unread rows are not
    computed, and do not count."""
    r = rows(config, text=text, picture=picture, **more)
    c, h = config, config.hidden_size
    blocks = _blocks(c)
    last = min(1, c.single_blocks)
    products = (
        (r.own - text) * c.in_channels * h
        + text * c.context_dim * h
        + (blocks - last) * r.own * _block_weights(c)
        + last * (r.own * _linear1(c) + picture * _linear2(c))
        + _vector_weights(c, bool(r.isolated))
        + picture * h * c.in_channels
    )
    seen = (r.own - r.isolated) * r.keys + r.isolated**2
    pairs = (blocks - last) * seen + last * picture * r.keys
    return Flops(2.0 * batch * products, 4.0 * batch * h * pairs)


def _linear1(c: TransformerConfig) -> int:
    return c.hidden_size**2 * (3 + 2 * c.mlp_ratio)


def _linear2(c: TransformerConfig) -> int:
    return c.hidden_size**2 * (1 + c.mlp_ratio)


def _block_weights(c: TransformerConfig) -> int:
    """Weights that each row of a block meets: as many in a double block as in a single one."""
    return _linear1(c) + _linear2(c)


def _vector_weights(c: TransformerConfig, still: bool) -> int:
    """Weights that the time (and guidance) vector meets: embedders, modulations, the head's. With
    references at t = 0 (`still`) a second one goes through all that concerns their rows."""
    embedders = (1 + c.guidance_embed) * (256 + c.hidden_size)
    both = embedders + (6 + 3) * c.hidden_size
    return c.hidden_size * ((1 + still) * both + (6 + 2) * c.hidden_size)


# ------------------------------------------------------------------------------------------ memory


def activation_bytes(
    config: TransformerConfig,
    *,
    text: int,
    picture: int,
    batch: int = 1,
    itemsize: int = 2,
    decoded: int = 0,
    **more,
) -> int:
    """The most bytes that one forward holds beyond weights and inputs, workspace of the attention
    kernel excepted. `decoded`: for how many pictures of the batch cached keys and values are
    turned back from fp8 or fetched from host memory; the other arguments are those of `rows`.

    The peak is a single block's concatenation before linear2. Alive there, in widths h a row: the
    block's input 1, linear1's output 3 + 2 m (q, k, v and the feed-forward's halves are views of
    it), q and k after norm and rotation 2, the attention's output 1, the gated feed-forward m, and
    the concatenation itself 1 + m: 20 for m = 3. A double block stays below: 19 for each row of
    picture and references, 9 for text. Beside them: the text's rows as the double blocks left them,
    15 modulation vectors and the time's own (twice where references stand at t = 0), and the rotary
    tables in float32.
    """
    r = rows(config, text=text, picture=picture, **more)
    c, m = config, config.mlp_ratio
    until = 1 + (3 + 2 * m) + 2 + 1  # as far as the attention's output
    widths = batch * r.own * (until + m + (1 + m))
    tables = r.keys
    if r.keys > r.own:
        # With a cache, attention itself can be the peak: the output a second time, as rows, and
        # all keys and values in one piece beside their sources. The tables are a part of the whole.
        joined = batch * (r.own * (until + 1) + 2 * r.keys) + decoded * 2 * (r.keys - r.own)
        widths = max(widths, joined)
        tables += r.own
    vectors = 16 * (2 if r.isolated else 1)
    widths += batch * (text + vectors)
    return widths * c.hidden_size * itemsize + tables * c.head_dim * torch.float32.itemsize


def cache_bytes(
    config: TransformerConfig,
    *,
    references: Sequence[int],
    batch: int = 1,
    itemsize: int = 2,
    store: Store = "model",
) -> int:
    """The references' keys and values, of every block."""
    return bytes_for(
        _blocks(config),
        config.hidden_size,
        sum(references),
        batch,
        store,
        head_dim=config.head_dim,
        itemsize=itemsize,
    )


class Memory(NamedTuple):
    """Bytes on the device, at the fullest moment of a run."""

    activations: int
    cache: int


def run_bytes(
    config: TransformerConfig,
    *,
    text: int,
    picture: int,
    references: Sequence[int],
    held: Sequence[int] | None = None,
    batch: int = 1,
    itemsize: int = 2,
    cache: ReferenceCache | None = None,
) -> Memory:
    """A run's fullest moment. `references` are those that act at once, `held` those that a cache
    holds (None: the same); `cache` says how, and None that there is none."""
    sizes = {"text": text, "picture": picture, "references": references}
    with_all = activation_bytes(config, **sizes, batch=batch, itemsize=itemsize)
    if cache is None or not sum(references):
        return Memory(with_all, 0)
    exact, away = cache.mode == "exact", cache.place == "host"
    # exact entries are made once for a whole batch, the approximate ones for each picture
    pictures = 1 if exact else batch
    held = references if held is None else held
    kept = cache_bytes(
        config, references=held, batch=pictures, itemsize=itemsize, store=cache.store
    )
    decoded = pictures if away or cache.store == "fp8" else 0
    later = activation_bytes(
        config, **sizes, batch=batch, itemsize=itemsize, cached=True, decoded=decoded
    )
    # exact: the references run alone first; approximate: some steps run all
    first = dict(sizes, text=0, picture=0) if exact else sizes
    full = activation_bytes(config, **first, batch=pictures, itemsize=itemsize)
    if away:  # two blocks at a time come through buffers
        kept = min(kept, 2 * kept // _blocks(config))
    return Memory(max(later, full), kept)


def tokens_within(limit: int, config: TransformerConfig, **run) -> int:
    """The most reference tokens with which a run stays within `limit` bytes, -1 where it does not
    even without any; `run` as for `run_bytes`."""

    def over(tokens: int) -> bool:
        return sum(run_bytes(config, references=[tokens], **run)) > limit

    low, high = -1, 1
    while not over(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if over(middle) else (middle, high)
    return low


def _blocks(config: TransformerConfig) -> int:
    return config.double_blocks + config.single_blocks


# -------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Clock:
    """What one operation takes on this device, in seconds, as measured by `calibrate`."""

    product: float  # a FLOP of a linear layer, with what comes along: norms, rotation, gates
    attention: float  # a FLOP of attention
    block: float  # a block, however few rows it has

    def seconds(self, config: TransformerConfig, **sizes) -> float:
        """One forward; arguments as for `flops`."""
        work = flops(config, **sizes)
        blocks = config.double_blocks + config.single_blocks
        return self.product * work.products + self.attention * work.attention + self.block * blocks


LENGTHS = tuple(64 * 2**i for i in range(8))  # 64 to 8192 rows


def calibrate(
    model,
    *,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    limit: float = 1.0,
) -> Clock:
    """Time the model's first double and single block and attention alone, each at two lengths or
    more, for about `limit` seconds -> the rates that explain the times best.

    `attend` is the kernel that will run; `device` and `dtype` are the model's own unless given.
    """
    weight = next(model.parameters())
    make = {"device": device or weight.device, "dtype": dtype or weight.dtype}
    samples, spent = [], 0.0
    with torch.inference_mode():
        for i, length in enumerate(LENGTHS):
            begun = time.perf_counter()
            for work, job in _jobs(model, length, attend, make):
                samples.append((work, _timed(job, make["device"])))
            took = time.perf_counter() - begun
            spent += took
            if i and spent + 2.5 * took > limit:
                break
    return _fit(samples)


def _jobs(model, length: int, attend, make: dict):
    """(products, attention, blocks) and the call that does them, for batch 1."""
    c, text = model.config, length // 4
    h = c.hidden_size
    x = torch.randn(1, length, h, **make)
    vector = torch.ones(1, 1, h, **make)
    mod = Modulation(vector, vector, vector)
    rope = tuple(torch.ones(length, c.head_dim // 2, device=make["device"]) for _ in range(2))
    products, pairs = 2.0 * length * _block_weights(c), 4.0 * h * length**2
    if c.double_blocks:
        double, (txt, img) = model.double_blocks[0], x.split((text, length - text), 1)
        sets = (mod, mod)
        yield (products, pairs, 1), lambda: double(img, txt, sets, sets, rope, attend)
    if c.single_blocks:
        single = model.single_blocks[0]
        yield (products, pairs, 1), lambda: single(x, mod, rope, attend)
    q = x.unflatten(-1, (c.heads, -1)).transpose(1, 2).contiguous()
    yield (0.0, pairs, 0), lambda: attend(q, q, q)


def _timed(job: Callable, device: torch.device, least: float = 0.01, groups: int = 3) -> float:
    """Seconds a round: the median of some groups of rounds, each of `least` seconds or more, after
    one round for nothing. On a GPU the rounds of a group are queued together, as blocks are."""

    def took(rounds: int) -> float:
        begun = time.perf_counter()
        for _ in range(rounds):
            job()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begun) / rounds

    took(1)
    rounds = min(10, math.ceil(least / max(1e-6, took(1))))
    return median(took(rounds) for _ in range(groups))


def _fit(samples: list[tuple[tuple[float, float, int], float]]) -> Clock:
    """Rates >= 0 with the least squared error: the best of all choices of which are 0.

    Errors count over the root of the time: short samples are the noisy ones, and long ones are
    what will be asked for.
    """
    weights = np.array([seconds for _, seconds in samples]) ** 0.5
    table = np.array([work for work, _ in samples], dtype=np.float64) / weights[:, None]
    scale = np.abs(table).max(0)
    best, least = np.zeros(3), math.inf
    for count in (1, 2, 3):
        for chosen in map(list, combinations(range(3), count)):
            part = table[:, chosen] / scale[chosen]
            rates = np.linalg.lstsq(part, weights)[0]
            error = float(((part @ rates - weights) ** 2).sum())
            if (rates >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[chosen] = rates / scale[chosen]
    return Clock(*map(float, best))
