"""Who sees whom, against the rules written out token by token."""

import itertools

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt, arrange

TEXT, SIZE = 3, (4, 6)
SHAPES = ((2, 2), (3, 2), (2, 4))
LEFT = torch.zeros(SIZE)
LEFT[:, :3] = 1
RIGHT = 1 - LEFT
SOFT = torch.linspace(0, 1, 6).expand(4, 6)
NONE = torch.zeros(SIZE)


def prompt(region, base=0.5, length=2):
    return RegionPrompt(torch.zeros(1, length, 8), region, base)


def written_out(layout):
    """The table of a layout as a matrix (queries, keys) of weights."""
    if layout.table is None:
        n = layout.text + layout.picture + layout.references
        return torch.ones(n, n)
    out = torch.zeros(layout.table.queries, layout.table.keys)
    for group in layout.table.groups:
        for part, keys in ((p, k) for p in group.parts for k in p.keys):
            w = part.weight
            out[group.rows, keys] = w[:, None] if isinstance(w, torch.Tensor) else float(w)
    return out


def names(layout, steer, regions):
    """What each row of the layout is: ("text",), ("prompt", k), ("picture", token), ("reference", i)."""
    rows = [("text",)] * TEXT
    rows += [("prompt", k) for k, r in enumerate(regions) for _ in range(r.context.shape[1])]
    order = range(SIZE[0] * SIZE[1]) if layout.order is None else layout.order.tolist()
    rows += [("picture", token) for token in order]
    for i, (h, w) in enumerate(SHAPES):
        control = steer[i] if i < len(steer) else ReferenceControl()
        if control.seen:
            kept = h * w if control.keep is None else int(control.keep.sum())
            rows += [("reference", i)] * kept
    return rows


def rule(a, b, steer, regions, isolate, kv):
    """The weight with which row a sees row b, straight from the words of visibility.py."""

    def control(i):
        return steer[i] if i < len(steer) else ReferenceControl()

    def at(map_, token):
        return float(map_.flatten()[token])

    def meet(k, i):
        return bool(((regions[k].region > 0) & (control(i).region > 0)).any())

    def inside(token):
        maps = [("prompt", k, r.region) for k, r in enumerate(regions)]
        maps += [
            ("reference", i, control(i).region)
            for i in range(len(SHAPES))
            if control(i).region is not None and control(i).seen
        ]
        return {(kind, i) for kind, i, m in maps if at(m, token) > 0}

    bound = a[0] == "reference" and control(a[1]).region is not None
    if b[0] == "reference":
        i = b[1]
        if a == b:
            return 1.0
        c = control(i)
        if c.region is None:
            return 0.0 if bound else c.strength
        if a[0] == "picture":
            return c.strength * at(c.region, a[1])
        return c.strength if a[0] == "prompt" and meet(a[1], i) else 0.0
    if a[0] == "reference" and kv:
        return 0.0
    if b[0] == "picture":
        if a[0] == "prompt":
            return float(at(regions[a[1]].region, b[1]) > 0)
        if bound:
            return float(at(control(a[1]).region, b[1]) > 0)
        mine = inside(a[1]) if a[0] == "picture" else set()
        return float(not isolate or inside(b[1]) <= mine)
    if b[0] == "prompt":
        if a[0] == "picture":
            return at(regions[b[1]].region, a[1])
        if a[0] == "prompt":
            return float(a[1] == b[1])
        return float(bound and meet(b[1], a[1]))
    if a[0] == "prompt":
        return 0.0
    if a[0] == "picture":
        weight = 1.0
        for r in regions:
            weight *= 1 - at(r.region, a[1]) * (1 - r.base)
        return weight
    return float(not (bound and any(meet(k, a[1]) for k in range(len(regions)))))


KEEP = torch.tensor([[True, False], [True, True], [False, True]])
STEER = {
    "strengths": (ReferenceControl(0.5), ReferenceControl(), ReferenceControl(3)),
    "one left out": (ReferenceControl(), ReferenceControl(0), ReferenceControl(2)),
    "not at this step": (ReferenceControl(active=False), ReferenceControl(), ReferenceControl()),
    "masked": (ReferenceControl(), ReferenceControl(keep=KEEP), ReferenceControl(1.5)),
    "bound": (ReferenceControl(region=LEFT), ReferenceControl(2, region=RIGHT)),
    "soft": (ReferenceControl(region=SOFT), ReferenceControl(0.5), ReferenceControl()),
    "nowhere": (ReferenceControl(region=NONE), ReferenceControl(), ReferenceControl(0.25)),
}
REGIONS = {
    "no prompts": (),
    "one": (prompt(LEFT, 0.25),),
    "two, soft": (prompt(SOFT, 0.0, 3), prompt(RIGHT)),
}


@pytest.mark.parametrize(
    "steer, regions, isolate, kv",
    list(itertools.product(STEER, REGIONS, (False, True), (False, True))),
)
def test_weights(steer, regions, isolate, kv):
    steer, regions = STEER[steer], REGIONS[regions]
    layout = arrange(TEXT, SIZE, SHAPES, steer, regions, isolate=isolate, kv=kv)
    rows = names(layout, steer, regions)
    wanted = torch.tensor([[rule(a, b, steer, regions, isolate, kv) for b in rows] for a in rows])
    seen = written_out(layout)
    # a weight that all keys of a row share is as good as 1
    assert torch.allclose(seen / seen.amax(1, True), wanted / wanted.amax(1, True), atol=1e-6)


def test_stock_has_no_table():
    layout = arrange(TEXT, SIZE, SHAPES, (ReferenceControl(), ReferenceControl(1.0)))
    assert layout.table is layout.last is layout.rows is layout.order is None
    assert layout.references == sum(h * w for h, w in SHAPES)


def test_rows_keep_their_positions():
    steer = (ReferenceControl(0), ReferenceControl(keep=KEEP), ReferenceControl(region=LEFT))
    layout = arrange(TEXT, SIZE, SHAPES, steer, (prompt(RIGHT),))
    picture = 24
    wanted = [*range(TEXT), *range(2), *(TEXT + layout.order).tolist()]
    wanted += [TEXT + picture + 4 + n for n in (0, 2, 3, 5)]
    wanted += [TEXT + picture + 4 + 6 + n for n in range(8)]
    assert layout.rows.tolist() == wanted
    assert layout.present == (1, 2)


def test_the_picture_comes_back_in_order():
    layout = arrange(TEXT, SIZE, SHAPES, (ReferenceControl(region=RIGHT),))
    x = torch.arange(24.0).reshape(1, 1, *SIZE).expand(1, 128, *SIZE)
    rows = layout.tokens(x, [torch.zeros(1, 128, *shape) for shape in SHAPES])[:, :24]
    assert not torch.equal(rows[0, :, 0], torch.arange(24.0))
    assert torch.equal(layout.restore(rows)[0, :, 0], torch.arange(24.0))


def test_cached_references_are_keys_and_no_rows():
    steer = (ReferenceControl(0.5), ReferenceControl(region=LEFT))
    whole = arrange(TEXT, SIZE, SHAPES, steer, kv=True)
    cached = arrange(TEXT, SIZE, SHAPES, steer, kv=True, cached=True)
    assert cached.references == 0 and cached.present == ()
    n = cached.table.queries
    assert torch.equal(written_out(cached), written_out(whole)[:n])


def test_the_last_blocks_table_is_the_pictures_rows():
    steer = (ReferenceControl(0.5), ReferenceControl(2, region=SOFT))
    layout = arrange(TEXT, SIZE, SHAPES, steer, (prompt(LEFT),))
    last = written_out(layout)[layout.text : layout.text + layout.picture]
    layout = type(layout)(**{**vars(layout), "table": layout.last})
    assert torch.equal(written_out(layout), last)


def test_a_map_of_another_grid_is_refused():
    with pytest.raises(Flux2Error, match="reference 2 has another grid"):
        arrange(TEXT, SIZE, SHAPES, (ReferenceControl(), ReferenceControl(region=torch.ones(4, 4))))
    with pytest.raises(Flux2Error, match="mask of reference 1"):
        arrange(TEXT, SIZE, SHAPES, (ReferenceControl(keep=KEEP),))
