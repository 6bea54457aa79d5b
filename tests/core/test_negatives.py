"""Negatives in attention, against two whole branches in float64 that know nothing of segments.

Errors are max |a - b| / std(b) in float32.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from flux2_pack.flux2_core.attention import attend
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.kv_cache import ReferenceCache
from flux2_pack.flux2_core.negatives import Negative, guide
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt
from flux2_pack.tests.core.toys import DEV, KLEIN, TEXT, error, inputs, toy

LEFT = torch.zeros(5, 7)
LEFT[:, :3] = 1


def text(seed: int, batch: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TEXT, DEV.context_dim, generator=made)


def negative(**how) -> Negative:
    return Negative(text(9), **{"scale": 3.0, "tau": 1.5, "alpha": 0.6, **how})


@pytest.fixture(scope="module")
def model():
    return toy(KLEIN)


@pytest.fixture(scope="module")
def dev():
    return toy(DEV)


def two_branches(net, x, timestep, context, guidance, references, how: Negative):
    """Both texts through all blocks beside one picture, float64: where the picture's rows attend,
    what each branch gives is guided by the paper's formulas. Positions are given out as stock does."""
    net = deepcopy(net).to(torch.float64)
    x, context = x.double(), context.double()
    references = [r.double() for r in references]
    other = how.context.double().expand(len(x), -1, -1)
    guidance = None if guidance is None else guidance.double()
    s = net.embed(x, timestep.double(), context, guidance, references, Controls())
    t = net.embed(x, timestep.double(), other, guidance, references, Controls())
    picture = slice(TEXT, TEXT + s.picture)
    seen = {}

    def watch(q, k, v):
        seen["minus"] = attend(q, k, v)
        return seen["minus"]

    def guided(q, k, v):
        out = attend(q, k, v).clone()
        rows = slice(0, s.picture) if q.shape[2] == s.picture else picture
        plus, minus = out[:, rows], seen["minus"][:, rows]
        away = plus * how.scale - minus * (how.scale - 1)
        ratio = away.abs().sum(-1, keepdim=True) / plus.abs().sum(-1, keepdim=True)
        away = torch.where(ratio > how.tau, away * how.tau / ratio, away)
        out[:, rows] = how.alpha * away + (1 - how.alpha) * plus
        return out

    mods = (s.img_mod, s.txt_mod, s.rope)
    plus, minus, img = s.txt, t.txt, s.img
    for block in net.double_blocks:
        _, after = block(img, minus, *mods, watch)
        img, plus = block(img, plus, *mods, guided)
        minus = after
    for block in net.single_blocks:
        after = block(torch.cat((minus, img), 1), s.single_mod, s.rope, watch)
        whole = block(torch.cat((plus, img), 1), s.single_mod, s.rope, guided)
        plus, img, minus = whole[:, :TEXT], whole[:, TEXT:], after[:, :TEXT]
    s.img = img[:, : s.picture]
    return net.head(s).float()


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("how", [{}, {"scale": 8.0, "tau": 1.1}, {"alpha": 1.0, "tau": 10.0}])
def test_two_whole_branches(model, references, batch, how):
    i, away = inputs(references, batch=batch), negative(**how)
    out = model(**i, controls=Controls(negative=away))
    assert error(out, model(**i)) > 0.05
    assert error(out, two_branches(model, **i, how=away)) < 1e-5  # seen 1.5e-6


def test_two_whole_branches_with_embedded_guidance(dev):
    i, away = inputs(2, batch=2, guidance=4.0), negative()
    out = dev(**i, controls=Controls(negative=away))
    assert error(out, two_branches(dev, **i, how=away)) < 1e-5  # seen 1.3e-6


@pytest.mark.parametrize("how", [{"scale": 1.0}, {"alpha": 0.0}])
def test_identity_is_stock_bit_for_bit(model, how):
    i = inputs(2, batch=2)
    assert torch.equal(model(**i, controls=Controls(negative=negative(**how))), model(**i))


def test_the_prompt_as_its_own_negative_changes_nothing(model):
    """z- is z+ then: but for rounding the picture is stock's."""
    i = inputs(2)
    out = model(**i, controls=Controls(negative=Negative(i["context"], 5.0)))
    assert error(out, model(**i)) < 1e-4  # seen 5e-6


STEERED = {
    "strength": Controls(references=(ReferenceControl(0.3), ReferenceControl(2.0))),
    "mask": Controls(references=(ReferenceControl(keep=torch.arange(60).reshape(6, 10) % 3 > 0),)),
    "region": Controls(references=(ReferenceControl(region=LEFT),)),
    "prompts": Controls(
        references=(ReferenceControl(region=LEFT),),
        regions=(RegionPrompt(text(5), LEFT, 0.25), RegionPrompt(text(6), 1 - LEFT, 0.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("name", STEERED)
def test_with_every_control_it_changes_and_its_identity_does_not(model, name, kv):
    """With a neutral scale the pass with a control is the control's alone, bit for bit; a scale near
    neutral is near it; a strong one is not."""
    i, steer = inputs(2, batch=2), replace(STEERED[name], kv_references=kv)
    alone = model(**i, controls=steer)
    off = model(**i, controls=replace(steer, negative=negative(scale=1.0)))
    near = model(**i, controls=replace(steer, negative=negative(scale=1 + 1e-6)))
    far = model(**i, controls=replace(steer, negative=negative(tau=10.0)))
    assert torch.equal(off, alone)
    assert error(near, alone) < 1e-4  # seen 6e-6
    assert error(far, alone) > 1e-3


def test_a_region_that_does_not_hear_the_prompt_does_not_hear_the_negative():
    """With one block nothing travels further than one attention does."""
    net = toy(replace(KLEIN, double_blocks=1, single_blocks=1))
    i = inputs(0)
    whole = torch.ones(5, 7)
    deaf = Controls(regions=(RegionPrompt(text(5), whole, 0.0),))
    out = net(**i, controls=replace(deaf, negative=negative(tau=10.0)))
    assert torch.equal(net(**i, controls=replace(deaf, negative=Negative(text(3), 3.0))), out)


def test_the_exact_cache(model):
    """References in the KV form do not depend on the negative: computed once, the same result."""
    i = inputs(2, batch=2)
    cache = ReferenceCache("exact")
    cache.begin("run", weights=0)
    plain = Controls(kv_references=True, negative=negative())
    wanted = model(**i, controls=plain)
    for _ in range(2):
        got = model(**i, controls=replace(plain, cache=cache))
        assert error(got, wanted) < 1e-5  # seen 1.3e-6


def test_an_approximate_cache_knows_another_negative(model):
    """What references see of the picture depends on it: keys of another negative are not used."""
    i = inputs(2)
    cache = ReferenceCache("approximate", interval=10, guard=0)
    cache.begin("run", weights=0)

    def call(step, away):
        cache.step = step
        return model(**i, controls=Controls(cache=cache, negative=away))

    call(0, negative())
    other = Negative(text(3), 3.0)
    assert torch.equal(call(1, other), model(**i, controls=Controls(negative=other)))


def test_cfg_steers_the_positive_pass_alone(model):
    i = inputs(1)
    v = velocity(
        model, i["context"], negative=text(4), scale=2.5, references=i["references"],
        controls=Controls(negative=negative()),
    )  # fmt: skip
    plus = model(**i, controls=Controls(negative=negative()))
    minus = model(**{**i, "context": text(4)})
    got = v(i["x"], i["timestep"])
    assert error(got, minus + 2.5 * (plus - minus)) < 1e-5


def test_the_norm_stays_within_tau():
    made = torch.Generator().manual_seed(0)
    plus, minus = (torch.randn(2, 5, 8, generator=made) for _ in range(2))
    out = guide(plus, minus, Negative(plus, 50.0, tau=1.5, alpha=1.0))
    ratio = out.abs().sum(-1) / plus.abs().sum(-1)
    assert torch.allclose(ratio, torch.full_like(ratio, 1.5), atol=1e-5)


def test_a_negative_of_another_length_or_width_is_one_sentence(model):
    for shape in ((1, TEXT + 1, DEV.context_dim), (1, TEXT, DEV.context_dim + 1)):
        with pytest.raises(Flux2Error, match="does not go with the prompt"):
            model(**inputs(0), controls=Controls(negative=Negative(torch.zeros(shape), 3.0)))
