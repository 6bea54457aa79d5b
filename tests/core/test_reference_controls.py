"""Strength, steps, masks, regions and caches of references, on the whole model.

Errors are max |a - b| / std(b) in float32.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flux2_pack.flux2_core import stream, transformer, visibility
from flux2_pack.flux2_core.attention import explicit, joined
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kv_cache import ReferenceCache
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt
from flux2_pack.tests.core.toys import DEV, KLEIN, SIZES, TEXT, error, inputs, toy

STOCK = ReferenceControl()
LEFT = torch.zeros(5, 7)
LEFT[:, :3] = 1
SOFT = torch.linspace(0, 1, 7).expand(5, 7)


@pytest.fixture(scope="module")
def model():
    return toy(KLEIN)


@pytest.fixture(scope="module")
def dev():
    return toy(DEV)


def steered(*references, **more):
    return Controls(references=references, **more)


def test_identity_is_stock_bit_for_bit(model, dev):
    for net, i in ((model, inputs(3, batch=2)), (dev, inputs(3, batch=2, guidance=4.0))):
        identity = steered(*(ReferenceControl(1.0, True) for _ in range(3)), isolate=True)
        assert torch.equal(net(**i, controls=identity), net(**i))


def test_a_full_mask_is_stock_bit_for_bit(model):
    i = inputs(2)
    full = steered(ReferenceControl(keep=torch.ones(SIZES[0], dtype=torch.bool)))
    assert torch.equal(model(**i, controls=full), model(**i))


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("off", [{"strength": 0.0}, {"active": False}, {"region": LEFT * 0}])
def test_strength_0_is_absence_with_positions_kept(model, kv, off):
    i = inputs(3)
    out = model(**i, controls=steered(STOCK, ReferenceControl(**off), kv_references=kv))
    i["references"][1] = torch.full_like(i["references"][1], torch.nan)
    assert torch.equal(
        model(**i, controls=steered(STOCK, ReferenceControl(**off), kv_references=kv)), out
    )
    moved = inputs(3)
    del moved["references"][1]
    assert error(model(**moved, controls=Controls(kv_references=kv)), out) > 1e-2


def test_strength_0_of_the_last_is_a_shorter_list(model):
    i = inputs(3)
    out = model(**i, controls=steered(STOCK, STOCK, ReferenceControl(0)))
    i["references"].pop()
    assert torch.equal(model(**i), out)


def test_strength_is_continuous(model):
    i = inputs(2)
    at = [
        model(**i, controls=steered(ReferenceControl(s))) for s in (0, 1e-6, 1 - 1e-6, 1, 1 + 1e-6)
    ]
    assert error(at[1], at[0]) < 1e-4  # seen 1.1e-6
    assert error(at[2], at[3]) < 2e-5  # seen 1.1e-6
    assert error(at[4], at[3]) < 2e-5  # seen 1.1e-6
    assert error(at[0], at[3]) > 0.1


CONTROLS = {
    "strength": steered(ReferenceControl(0.3), ReferenceControl(3.0)),
    "mask": steered(ReferenceControl(keep=torch.arange(60).reshape(6, 10) % 3 > 0), STOCK),
    "region": steered(ReferenceControl(region=LEFT), STOCK),
    "soft region": steered(ReferenceControl(2.0, region=SOFT), ReferenceControl(0.5)),
    "prompts": steered(
        ReferenceControl(region=LEFT),
        regions=(
            RegionPrompt(torch.randn(1, 4, 96), SOFT, 0.25),
            RegionPrompt(torch.randn(1, 3, 96), 1 - LEFT, 0.0),
        ),
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("kv", [False, True])
def test_against_attention_written_out_in_float64(model, monkeypatch, name, kv):
    """The same forward with every attention as one softmax over all keys plus log w, float64."""
    i = inputs(2, batch=2)
    controls = replace(CONTROLS[name], kv_references=kv, isolate=name == "prompts")
    out = model(**i, controls=controls)

    def whole(q, k, v, table, attend):
        bias = torch.full((table.queries, table.keys), -torch.inf, dtype=torch.float64)
        for group in table.groups:
            for part in group.parts:
                w = torch.as_tensor(part.weight).double().log()
                for keys in part.keys:
                    bias[group.rows, keys] = w[:, None] if w.ndim else w
        return joined(explicit(*(x.double() for x in (q, k, v)), bias)[0]).to(q.dtype)

    monkeypatch.setattr(stream, "attend_segments", whole)
    assert error(out, model(**i, controls=controls)) < 1e-5  # seen 1.4e-6


def test_masked_patches_leave_the_sequence(model):
    keep = torch.zeros(SIZES[0], dtype=torch.bool)
    keep[1:4, 2:7] = True
    i = inputs(2)
    control = steered(ReferenceControl(keep=keep))
    out = model(**i, controls=control)
    i["references"][0][:, :, ~keep] = torch.nan
    assert torch.equal(model(**i, controls=control), out)


def changed(model, controls, **more):
    """Where in the picture the result differs when reference 1 does, after the whole model."""
    i = inputs(2)
    before = model(**i, controls=controls)
    i["references"][0] = i["references"][0] + 1
    return (model(**i, controls=controls) != before).any(1)[0]


def test_a_bound_reference_stays_in_its_region_for_one_attention(monkeypatch):
    """With one block nothing travels further than one attention does."""
    one = toy(replace(KLEIN, double_blocks=1, single_blocks=1))
    seen = []

    def record(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v)
        return joined(out)

    i = inputs(2)
    control = steered(ReferenceControl(region=LEFT))

    def first_attention():
        stream = one.embed(i["x"], i["timestep"], i["context"], None, i["references"], control)
        block = one.double_blocks[0]

        def watch(q, k, v):
            out = stream.attention(0)(q, k, v)
            seen.append(stream.layout.restore(out[:, TEXT : TEXT + 35]))
            return out

        block(stream.img, stream.txt, stream.img_mod, stream.txt_mod, stream.rope, watch)

    first_attention()
    i["references"][0] = i["references"][0] + 1
    first_attention()
    differs = (seen[0] != seen[1]).any(-1)[0].reshape(5, 7)
    assert torch.equal(differs, LEFT.bool())


def test_an_isolated_region_keeps_its_reference_after_the_whole_model(model):
    bound = ReferenceControl(region=LEFT)
    assert torch.equal(changed(model, steered(bound, isolate=True)), LEFT.bool())
    assert changed(model, steered(bound)).all()


def test_a_region_prompt_acts_in_its_region_alone(model):
    i = inputs(1)

    def run(shift):
        prompt = RegionPrompt(i["context"] + shift, LEFT, 0.0)
        return model(**i, controls=Controls(regions=(prompt,), isolate=True))

    assert torch.equal((run(0) != run(1)).any(1)[0], LEFT.bool())


def test_regions_work_in_batches(model):
    i = inputs(2, batch=2)
    controls = CONTROLS["prompts"]
    out = model(**i, controls=controls)
    for n in range(2):
        one = {k: None if v is None else v[n : n + 1] for k, v in i.items() if k != "references"}
        refs = [r[n : n + 1] for r in i["references"]]
        assert (
            error(out[n : n + 1], model(**one, references=refs, controls=controls)) < 1e-5
        )  # seen 1.4e-6


# ----------------------------------------------------------------------------------------- cache


def exact(**how):
    return ReferenceCache("exact", **how)


def test_exact_cache_is_no_cache(dev):
    """Batch 3 x CFG x ten references of different sizes, over two steps."""
    i = inputs(10, batch=6, guidance=4.0)
    i["references"] = [r[:3].repeat(2, 1, 1, 1) for r in i["references"]]
    i["guidance"] = torch.full((6,), 4.0)
    cache = exact()
    for t in (0.9, 0.4):
        i["timestep"] = torch.full((6,), t)
        plain = dev(**i, controls=Controls(kv_references=True))
        kept = dev(**i, controls=Controls(kv_references=True, cache=cache))
        assert error(kept, plain) < 1e-5  # seen 0
    assert cache.statistics.recorded == 1 and cache.statistics.hits >= 1


@pytest.mark.parametrize("name", ["strength", "mask", "region", "soft region", "prompts"])
def test_exact_cache_with_controls(model, name):
    i, cache = inputs(2, batch=2), exact()
    for t in (0.9, 0.4):
        i["timestep"] = torch.full((2,), t)
        controls = replace(CONTROLS[name], kv_references=True)
        kept = model(**i, controls=replace(controls, cache=cache))
        assert error(kept, model(**i, controls=controls)) < 1e-5  # seen 0


def test_shared_references_are_computed_and_kept_once(model):
    i = inputs(2, batch=3)
    i["references"] = [r[:1].expand(3, -1, -1, -1) for r in i["references"]]
    cache = exact()
    kept = model(**i, controls=Controls(True, cache=cache))
    assert error(kept, model(**i, controls=Controls(True))) < 1e-5  # seen 1.4e-6
    rows = sum(h * w for h, w in SIZES[:2])
    assert cache.bytes == 5 * 2 * 256 * rows * 4  # one picture's worth


def test_an_exact_cache_wants_the_kv_form(model):
    with pytest.raises(Flux2Error, match="KV form"):
        model(**inputs(1), controls=Controls(cache=exact()))


def test_a_cached_step_has_no_reference_rows(model, monkeypatch):
    i, cache = inputs(2), exact()
    model(**i, controls=Controls(True, cache=cache))
    seen = []
    stock = transformer.SingleBlock.forward
    monkeypatch.setattr(
        transformer.SingleBlock,
        "forward",
        lambda self, x, *a: seen.append(x.shape[1]) or stock(self, x, *a),
    )
    model(**i, controls=Controls(True, cache=cache))
    assert set(seen) == {TEXT + 35}


def test_the_approximate_cache_is_exact_where_nothing_has_moved(model):
    """Between two calls with the same picture and time the kept keys are the true ones."""
    i, cache = inputs(3, batch=2), ReferenceCache("approximate", interval=3)
    cache.begin("run")
    plain = model(**i)
    for step in range(3):
        cache.step = step
        assert error(model(**i, controls=Controls(cache=cache)), plain) < 1e-5  # seen 0
    assert cache.statistics.recorded == 1 and cache.statistics.hits == 2


def test_the_approximate_cache_with_controls(model):
    for name in ("strength", "mask", "soft region", "prompts"):
        i, cache = inputs(2), ReferenceCache("approximate")
        cache.begin("run")
        plain = model(**i, controls=CONTROLS[name])
        for step in range(2):
            cache.step = step
            kept = model(**i, controls=replace(CONTROLS[name], cache=cache))
            assert error(kept, plain) < 1e-5  # seen 0


def test_positive_and_negative_are_kept_apart(model):
    i, cache = inputs(2), ReferenceCache("approximate")
    other = {**i, "context": i["context"] + 1}
    cache.begin("run")
    controls = Controls(cache=cache)
    both = [model(**i), model(**other)]
    for step in range(2):
        cache.step = step
        for one, plain in zip((i, other), both, strict=True):
            assert error(model(**one, controls=controls), plain) < 1e-5  # seen 0


def put(**change):
    def edit(i, controls):
        i.update({k: v(i[k]) if callable(v) else v for k, v in change.items()})
        return controls

    return edit


def nudge(refs, n=0):
    refs = list(refs)
    refs[n] = refs[n].clone()
    refs[n].view(-1)[5] += 1e-3
    return refs


def control(*references, **more):
    return lambda i, controls: replace(controls, references=references, **more)


CHANGES = {
    "one number of a reference": put(references=nudge),
    "one number of the second": put(references=lambda r: nudge(r, 1)),
    "another order": put(references=lambda r: r[::-1]),
    "one reference fewer": put(references=lambda r: r[:1]),
    "one reference more": put(references=lambda r: [*r, r[0]]),
    "another size": put(references=lambda r: [r[0], r[1].transpose(2, 3)[:, :, :3]]),
    "strength of a reference that others see": control(ReferenceControl(0.5)),
    "strength above one": control(STOCK, ReferenceControl(2.0)),
    "a reference switched off": control(ReferenceControl(0.0)),
    "a step without it": control(ReferenceControl(active=False)),
    "a mask": control(ReferenceControl(keep=torch.arange(60).reshape(6, 10) > 7)),
    "another mask of the same size": control(
        ReferenceControl(keep=torch.arange(60).reshape(6, 10) < 52)
    ),
    "bound to a region": control(ReferenceControl(region=LEFT)),
    "positions bent by a host": lambda i, c: replace(c, about="uxo"),
    "a reference for each picture": put(
        references=lambda r: [torch.cat((x, x + 1)) for x in r],
        x=lambda x: x.repeat(2, 1, 1, 1),
        context=lambda x: x.repeat(2, 1, 1),
        timestep=lambda x: x.repeat(2),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(model, name):
    """Fill the cache, change one thing: the result is that of no cache."""
    i, cache = inputs(2), exact()
    controls = Controls(True, cache=cache)
    model(**i, controls=controls)
    changed, recorded = CHANGES[name](i, controls), cache.statistics.recorded
    kept = model(**i, controls=changed)
    assert error(kept, model(**i, controls=replace(changed, cache=None))) < 1e-5  # seen 0
    assert cache.statistics.recorded == recorded + 1


def test_another_dtype_counts():
    net, i, cache = toy(KLEIN), inputs(2), exact()
    net(**i, controls=Controls(True, cache=cache))
    net.to(torch.bfloat16)
    i["x"] = i["x"].bfloat16()
    kept = net(**i, controls=Controls(True, cache=cache))
    plain = net(**i, controls=Controls(True))
    assert (kept - plain).norm() / plain.norm() < 1e-2  # seen 0
    assert cache.statistics.recorded == 2


def test_guidance_counts_where_the_model_embeds_it(dev):
    i, cache = inputs(2, guidance=4.0), exact()
    dev(**i, controls=Controls(True, cache=cache))
    i["guidance"] = torch.tensor([2.0])
    kept = dev(**i, controls=Controls(True, cache=cache))
    assert error(kept, dev(**i, controls=Controls(True))) < 1e-5  # seen 0


def test_other_weights_count(model):
    i, cache = inputs(2), exact()
    cache.begin("first", weights="model")
    model(**i, controls=Controls(True, cache=cache))
    cache.begin("second", weights="model with a LoRA")
    assert cache.bytes == 0


@pytest.mark.parametrize("what", ["text", "picture", "time", "noise"])
def test_what_an_exact_cache_does_not_depend_on(model, what):
    i, cache = inputs(2), exact()
    controls = Controls(True, cache=cache)
    model(**i, controls=controls)
    change = {
        "text": {"context": i["context"] + 1},
        "picture": {"x": torch.randn(1, 128, 3, 9)},
        "time": {"timestep": torch.tensor([0.1])},
        "noise": {"x": i["x"] + 1},
    }[what]
    i.update(change)
    kept = model(**i, controls=controls)
    assert cache.statistics.recorded == 1
    assert error(kept, model(**i, controls=Controls(True))) < 1e-5  # seen 0


APPROXIMATE = {
    "text": put(context=lambda x: x + 1),
    "size": put(x=torch.randn(1, 128, 4, 4)),
    "batch": put(
        x=lambda x: x.repeat(2, 1, 1, 1),
        context=lambda x: x.repeat(2, 1, 1),
        timestep=lambda x: x.repeat(2),
    ),
    "call": lambda i, c: replace(c, call="another area"),
    "isolation": lambda i, c: replace(c, isolate=True),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_never_stale_where_it_is_approximate(model, name):
    i, cache = inputs(2), ReferenceCache("approximate", interval=9)
    cache.begin("run")
    controls = Controls(cache=cache)
    model(**i, controls=controls)
    cache.step = 1
    changed = APPROXIMATE[name](i, controls)
    assert torch.equal(
        model(**i, controls=changed), model(**i, controls=replace(changed, cache=None))
    )


def test_a_forward_that_fails_leaves_nothing_behind(model, monkeypatch):
    cache = exact()
    monkeypatch.setattr(visibility, "tokens", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs(2), controls=Controls(True, cache=cache))
    assert cache.bytes == 0


def test_pictures_of_different_guidance_have_caches_of_their_own(dev):
    i, cache = inputs(2, batch=2, guidance=4.0), exact()
    i["references"] = [r[:1] for r in i["references"]]
    for _ in range(2):
        kept = dev(**i, controls=Controls(True, cache=cache))
        assert error(kept, dev(**i, controls=Controls(True))) < 1e-5  # seen 0
