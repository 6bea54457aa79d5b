"""Who sees whom: from controls to the rows of a sequence and the weights between them.

Rows stand as [text | negative | region prompts | picture | references]. Text sees itself, the picture and the
references that are not bound to a region; a region's prompt sees itself, its region and what may
act there, and is seen by its region alone; a bound reference sees itself, its region and that
region's prompt; in the KV form references see references only. A negative prompt sees what the prompt
sees, but itself in its place, and is seen by nobody here: `negatives.py` brings it to the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Table, Weight, table
from .errors import Flux2Error
from .latents import tokens


@dataclass(frozen=True, eq=False)
class ReferenceControl:
    """What is wanted of one reference at one step; the defaults are stock.

    `strength` >= 0 weighs its keys; `keep` (h_i, w_i) bool names the patches that stay in the
    sequence; `region` (h, w) in [0, 1], on the picture's grid, says where it may act.
    """

    strength: float = 1.0
    active: bool = True
    keep: Tensor | None = None
    region: Tensor | None = None

    @property
    def seen(self) -> bool:
        """False where nobody would see anything of it: then it is not computed."""
        parts = (part for part in (self.keep, self.region) if part is not None and part.numel())
        return self.active and self.strength > 0 and all(bool(part.any()) for part in parts)


@dataclass(frozen=True, eq=False)
class RegionPrompt:
    """A prompt of its own for a part of the picture.

    `context` (B or 1, T, ctx); `region` (h, w) in [0, 1] on the picture's grid; `base` is the
    weight that the main prompt keeps inside.
    """

    context: Tensor
    region: Tensor
    base: float = 0.5


STOCK = ReferenceControl()


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of one kind. A piece of the picture knows the regions that it lies in."""

    kind: str  # "text", "prompt", "picture", "reference"
    index: int
    length: int
    inside: frozenset = frozenset()  # of (kind, index) of prompts and references
    start: int = 0  # of a piece, within the picture

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows of one forward.

    `present`: references in the sequence; `kept`: their tokens that stay (None: all). `order`: the
    picture's tokens as they stand, pieces of equal sight together (None: as ever). `rows`: where
    each row stands in the stock sequence [text, picture, all references] (None: the same).
    `table` and `last` (the picture's rows alone) are None where one plain call does it.
    """

    present: tuple[int, ...]
    kept: tuple[Tensor | None, ...]
    order: Tensor | None
    rows: Tensor | None
    text: int
    picture: int
    references: int
    table: Table | None
    last: Table | None
    negative: int = 0  # rows of the negative prompt, after the prompt's
    lengths: tuple[int, ...] = ()  # tokens of each reference in the sequence

    def tokens(self, x: Tensor, references: Sequence[Tensor]) -> Tensor:
        """(B, 128, h, w) and all references -> (B, rows after the text, 128)."""
        picture = tokens(x)
        parts = [picture if self.order is None else picture[:, self.order]]
        for i, kept in zip(self.present, self.kept, strict=True):
            part = tokens(references[i].to(x).expand(x.shape[0], -1, -1, -1))
            parts.append(part if kept is None else part[:, kept])
        return torch.cat(parts, 1)

    def restore(self, picture: Tensor) -> Tensor:
        """The picture's rows (B, L, ...) in their usual order again."""
        return picture if self.order is None else picture[:, torch.argsort(self.order)]


def arrange(
    text: int,
    size: tuple[int, int],
    shapes: Sequence[tuple[int, int]],
    references: Sequence[ReferenceControl] = (),
    regions: Sequence[RegionPrompt] = (),
    *,
    negative: int = 0,
    isolate: bool = False,
    kv: bool = False,
    cached: bool = False,
    device: torch.device | str = "cpu",
) -> Layout:
    """Text length, the picture's and the references' grids (h, w), and what is wanted -> Layout.

    `negative`: length of a negative prompt. `kv`: references see references only. `cached`: the references' keys come from elsewhere, after
    all others; their rows do not. Raises Flux2Error for maps of another size.
    """
    steer = [references[i] if i < len(references) else STOCK for i in range(len(shapes))]
    present = tuple(i for i, control in enumerate(steer) if control.seen)
    check_maps(size, shapes, steer, regions)
    maps = {("prompt", k): r.region.flatten().float().cpu() for k, r in enumerate(regions)}
    for i in present:
        if (region := steer[i].region) is not None:
            maps["reference", i] = region.flatten().float().cpu()
    order, pieces = _pieces(size[0] * size[1], maps)
    kept = [steer[i].keep for i in present]
    kept = [None if k is None or bool(k.all()) else k.flatten().nonzero()[:, 0] for k in kept]

    lengths = [
        shapes[i][0] * shapes[i][1] if k is None else len(k)
        for i, k in zip(present, kept, strict=True)
    ]
    segments = [Segment("text", 0, text)]
    segments += [Segment("negative", 0, negative)] if negative else []
    segments += [Segment("prompt", k, r.context.shape[1]) for k, r in enumerate(regions)]
    segments += pieces
    queries = list(segments)
    segments += [Segment("reference", i, n) for i, n in zip(present, lengths, strict=True)]
    if not cached:
        queries = segments
    sight = Sight(steer, regions, maps, order, isolate, kv, device)
    whole = _table(queries, segments, sight)
    return Layout(
        () if cached else present,
        () if cached else tuple(k if k is None else k.to(device) for k in kept),
        None if order is None else order.to(device),
        _rows(
            text, negative, size, shapes, regions, () if cached else present, kept, order, device
        ),
        text=sum(s.length for s in segments if s.kind in ("text", "negative", "prompt")),
        picture=size[0] * size[1],
        references=0 if cached else sum(lengths),
        table=whole,
        last=None if whole is None else _table(pieces, segments, sight),
        negative=negative,
        lengths=() if cached else tuple(lengths),
    )


def isolation(text: int, picture: int, references: int) -> Table | None:
    """The KV form alone: the last rows see each other only, all others see everything."""
    if not references:
        return None
    rows = [Segment("text", 0, text + picture), Segment("reference", 0, references)]
    return _table(rows, rows, Sight([STOCK], (), {}, None, False, True, "cpu"))


def check_maps(size, shapes, steer: Sequence[ReferenceControl], regions) -> None:
    """Raise unless every map has the grid that it speaks of."""
    named = [(f"The mask of reference {i + 1}", c.keep, shapes[i]) for i, c in enumerate(steer)]
    named += [(f"The region of reference {i + 1}", c.region, size) for i, c in enumerate(steer)]
    named += [(f"The region of prompt {k + 1}", r.region, size) for k, r in enumerate(regions)]
    for name, found, wanted in named:
        if found is not None and tuple(found.shape) != tuple(wanted):
            raise Flux2Error(
                f"{name} has another grid than the picture it belongs to",
                f"{tuple(found.shape)}, wanted {tuple(wanted)} patches of 16 pixels",
                "Make the map anew for this size",
            )


def _pieces(length: int, maps: dict) -> tuple[Tensor | None, list[Segment]]:
    """Cut the picture's tokens by the regions they lie in -> order, one segment a piece."""
    if not maps:
        return None, [Segment("picture", 0, length, frozenset(), 0)] if length else []
    code = torch.zeros(length, dtype=torch.long)
    for bit, region in enumerate(maps.values()):
        code += (region > 0).long() << bit
    found = code.unique().tolist()
    order = torch.argsort(code, stable=True) if len(found) > 1 else None
    pieces = []
    for value in found:
        inside = frozenset(key for bit, key in enumerate(maps) if value >> bit & 1)
        start = sum(piece.length for piece in pieces)
        pieces.append(Segment("picture", len(pieces), int((code == value).sum()), inside, start))
    return order, pieces


def _rows(text, negative, size, shapes, regions, present, kept, order, device) -> Tensor | None:
    """Where each row stands in the stock sequence [text, picture, references]."""
    every = present == tuple(range(len(shapes))) and all(k is None for k in kept)
    if every and order is None and not regions and not negative:
        return None
    picture = size[0] * size[1]
    parts = [
        torch.arange(text),
        torch.arange(negative),
        *(torch.arange(r.context.shape[1]) for r in regions),
    ]
    parts.append(text + (torch.arange(picture) if order is None else order))
    starts = [text + picture + sum(h * w for h, w in shapes[:i]) for i in range(len(shapes))]
    for i, keep in zip(present, kept, strict=False):
        h, w = shapes[i]
        parts.append(starts[i] + (torch.arange(h * w) if keep is None else keep.cpu()))
    return torch.cat(parts).to(device)


def _table(queries: Sequence[Segment], keys: Sequence[Segment], sight: "Sight") -> Table | None:
    if sight.alike(keys):
        return None
    made = table(
        [s.length for s in queries],
        [s.length for s in keys],
        lambda a, b: sight(queries[a], keys[b]),
    )
    return None if made.stock else made


class Sight:
    """weight(a sees b), for two segments: a number, or one for each row of a."""

    def __init__(self, steer, regions, maps, order, isolate, kv, device):
        self.steer, self.regions, self.isolate, self.kv = steer, regions, isolate, kv
        self.maps = {key: m if order is None else m[order] for key, m in maps.items()}
        self.device = device

    def alike(self, keys: Sequence[Segment]) -> bool:
        """True where all weights are 1, seen at once: torch.compile ties a table to one size."""
        if self.maps or any(s.kind == "negative" for s in keys):
            return False
        strengths = [self.steer[s.index].strength for s in keys if s.kind == "reference"]
        return not strengths or (not self.kv and all(s == 1 for s in strengths))

    def __call__(self, a: Segment, b: Segment) -> Weight:
        if a == b:
            return 1.0
        if b.kind == "negative":
            return 0.0
        if b.kind == "reference":
            return self._reference(a, b.index)
        if a.kind == "reference" and self.kv:
            return 0.0
        if b.kind == "picture":
            return float(self._picture(a, b))
        if b.kind == "prompt":
            return self._prompt(a, ("prompt", b.index))
        return self._text(a)

    def _reference(self, a: Segment, i: int) -> Weight:
        strength, key = self.steer[i].strength, ("reference", i)
        if key not in self.maps:
            return (
                0.0 if a.kind == "reference" and ("reference", a.index) in self.maps else strength
            )
        if a.kind == "picture":
            return self._part(key, a, strength)
        return strength if a.kind == "prompt" and self._meet(("prompt", a.index), key) else 0.0

    def _picture(self, a: Segment, b: Segment) -> bool:
        if a.kind == "prompt":
            return ("prompt", a.index) in b.inside
        if a.kind == "reference" and ("reference", a.index) in self.maps:
            return ("reference", a.index) in b.inside
        return not self.isolate or b.inside <= a.inside

    def _prompt(self, a: Segment, key) -> Weight:
        if a.kind == "picture":
            return self._part(key, a)
        bound = ("reference", a.index)
        return float(a.kind == "reference" and bound in self.maps and self._meet(key, bound))

    def _text(self, a: Segment) -> Weight:
        """The main prompt: where a region has its own, `base` of it is left."""
        if a.kind == "reference":
            bound = ("reference", a.index)
            prompts = (key for key in self.maps if key[0] == "prompt")
            return float(bound not in self.maps or not any(self._meet(p, bound) for p in prompts))
        if a.kind in ("prompt", "negative"):
            return 0.0
        own = [k for k in range(len(self.regions)) if ("prompt", k) in a.inside]
        if not own:
            return 1.0
        weight = torch.ones(a.length)
        for k in own:
            weight *= 1 - self.maps["prompt", k][a.rows] * (1 - self.regions[k].base)
        return self._short(weight)

    def _part(self, key, a: Segment, factor: float = 1.0) -> Weight:
        """A region's map on a piece of the picture."""
        return self._short(self.maps[key][a.rows] * factor) if key in a.inside else 0.0

    def _short(self, weight: Tensor) -> Weight:
        """One number where all are alike."""
        alike = len(weight) == 0 or bool((weight == weight[0]).all())
        return float(weight[0]) if alike and len(weight) else weight.to(self.device)

    def _meet(self, one, other) -> bool:
        """True where two regions share ground."""
        return bool(((self.maps[one] > 0) & (self.maps[other] > 0)).any())
