"""Joint attention over weighted segments of keys: text, picture, references, prompt regions.

For every group of queries and every segment of keys there is a weight w >= 0, a number or one for
each query: log w is added to the segment's logits. A segment of weight 0 is not computed at all;
with every weight 1 the whole is one stock call, bit for bit. Strength, regions, isolation and
caches are such weights and nothing else; `visibility.py` says who sees whom.

Every attention call of the transformer goes through one callable (q, k, v) -> out, so that a host
can put its own kernels and patches there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .kernels.attention import attention, attention_lse
from .kernels.attention import explicit as explicit  # the definition belongs to the algebra too

Weight = float | Tensor  # >= 0, for every query alike, or (queries,)
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, Q, D), (B, H, K, D), (B, H, K, D) -> (B, Q, H * D); softmax scale 1 / sqrt(D), no mask.

    PyTorch's call, or on a GPU a library that is right and faster: see kernels/attention.py."""
    return joined(attention(q, k, v))


def attend_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """-> out (B, H, Q, D) and the logits' log-sum-exp (B, H, Q), float32.

    From the attention kernels that compute it anyway; `explicit` where there is none.
    """
    return attention_lse(q, k, v)


def joined(heads: Tensor) -> Tensor:
    """(B, H, Q, D) -> (B, Q, H * D)."""
    return rearrange(heads, "b h q d -> b q (h d)")


# ---------------------------------------------------------------------------------------- segments


@dataclass(frozen=True, eq=False)
class Part:
    """Keys of equal weight."""

    keys: tuple[slice, ...]
    weight: Weight


@dataclass(frozen=True, eq=False)
class Group:
    """Queries of equal sight, and what they see."""

    rows: slice
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """Who sees whom in one forward: groups in the order of their queries, and the numbers of
    queries and keys it was made for."""

    groups: tuple[Group, ...]
    queries: int
    keys: int

    @property
    def stock(self) -> bool:
        """True where one plain call does it: everybody sees everything alike."""
        return len(self.groups) == 1 and _plain(self.groups[0].parts, self.keys)


def table(
    queries: Sequence[int], keys: Sequence[int], weight: Callable[[int, int], Weight]
) -> Table:
    """Lengths of the query segments and of the key segments, weight(query segment, key segment)
    -> Table. Neighbours of equal sight become one group; keys of equal weight one part."""
    spans, groups, start = _spans(keys), [], 0
    sight: list[Weight] = []
    for a, length in enumerate(queries):
        if not length:
            continue
        row = [weight(a, b) for b in range(len(keys))]
        if groups and all(_same(x, y) for x, y in zip(row, sight, strict=True)):
            groups[-1] = Group(slice(groups[-1].rows.start, start + length), groups[-1].parts)
        else:
            groups.append(Group(slice(start, start + length), _parts(row, spans)))
        sight, start = row, start + length
    return Table(tuple(groups), start, sum(keys))


def _spans(lengths: Sequence[int]) -> list[slice]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [slice(s, s + n) for s, n in zip(starts, lengths, strict=True)]


def _same(a: Weight, b: Weight) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _parts(row: Sequence[Weight], spans: Sequence[slice]) -> tuple[Part, ...]:
    found: list[tuple[Weight, list[slice]]] = []
    for weight, span in zip(row, spans, strict=True):
        if span.start == span.stop or (not isinstance(weight, Tensor) and weight == 0):
            continue
        keys = next((keys for known, keys in found if _same(known, weight)), None)
        if keys is None:
            found.append((weight, keys := []))
        if keys and keys[-1].stop == span.start:
            keys[-1] = slice(keys[-1].start, span.stop)
        else:
            keys.append(span)
    if len(found) == 1 and not isinstance(found[0][0], Tensor):
        found = [(1.0, found[0][1])]  # softmax does not see a weight that all keys share
    return tuple(Part(tuple(keys), weight) for weight, keys in found)


def _plain(parts: tuple[Part, ...], keys: int) -> bool:
    return (
        len(parts) == 1
        and not isinstance(parts[0].weight, Tensor)
        and parts[0].keys == (slice(0, keys),)
    )


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, table: Table, kernel: Kernel = attend
) -> Tensor:
    """q (B, H, Q, D), k and v (B, H, K, D), rows and keys as in `table` -> (B, Q, H * D).

    A group with keys of one weight goes through `kernel`; others are merged by their
    log-sum-exp, in float32.
    """
    outs = [attend_group(q[:, :, g.rows], k, v, g.parts, kernel) for g in table.groups]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def attend_group(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], kernel: Kernel = attend
) -> Tensor:
    """Queries of equal sight, (B, H, Q, D), and what they see -> (B, Q, H * D)."""
    if len(parts) == 1 and not isinstance(parts[0].weight, Tensor):
        keys = parts[0].keys
        return kernel(q, _take(k, keys), _take(v, keys))
    return joined(merged(q, k, v, parts)[0].to(q.dtype))


def _take(x: Tensor, keys: tuple[slice, ...]) -> Tensor:
    if len(keys) == 1:
        return x[:, :, keys[0]]
    return torch.cat([x[:, :, span] for span in keys], 2)


def merged(q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """softmax over all parts, each with log w added to its logits -> out (B, H, Q, D) in float32 and
    its log-sum-exp (B, H, Q). Every query sees at least itself: there is a part."""
    done = None
    for part in parts:
        one, lse = attend_lse(q, _take(k, part.keys), _take(v, part.keys))
        w = part.weight
        lse = lse + (math.log(w) if isinstance(w, (int, float)) else w.to(lse).log())
        done = (one.float(), lse) if done is None else merge(done, (one.float(), lse))
    assert done is not None
    return done


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two parts' out and log-sum-exp -> those of both together."""
    out = a[0].lerp(b[0], torch.sigmoid(b[1] - a[1])[..., None])
    return out, torch.logaddexp(a[1], b[1])
