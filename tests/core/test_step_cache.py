"""Reuse of earlier steps: when it happens, what comes of it, and all that forbids it."""

import copy
from dataclasses import replace

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.kv_cache import ReferenceCache
from flux2_pack.flux2_core.negatives import Negative
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.schedule import share
from flux2_pack.flux2_core.step_cache import StepCache, distance, predict
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt
from flux2_pack.tests.core.toys import DEV, KLEIN, inputs, toy

STEPS = 8
SIZE = (5, 7)
LEFT = torch.zeros(SIZE)
LEFT[:, :3] = 1


@pytest.fixture(scope="module")
def model():
    return toy(KLEIN)


@pytest.fixture
def ran(model):
    """The numbers of the blocks that ran, double blocks first."""
    seen: list[int] = []
    blocks = (*model.double_blocks, *model.single_blocks)
    hooks = [b.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, b in enumerate(blocks)]
    yield seen
    for hook in hooks:
        hook.remove()


def at(handle: StepCache, step: int, steps: int = STEPS, **controls) -> Controls:
    handle.step, handle.steps = step, steps
    return Controls(steps=handle, **controls)


def forward(model, cache, step, *, time=None, controls=None, **given):
    """One forward of a run of STEPS steps that hardly move, on the same inputs."""
    made = inputs(2) | given
    x = made["x"]
    made["timestep"] = torch.full((len(x),), 0.5 - 1e-5 * step if time is None else time)
    with torch.no_grad():
        return model(**made, controls=at(cache, step, **(controls or {})))


def computed(cache) -> tuple[int, int]:
    return cache.statistics.computed, cache.statistics.reused


# ------------------------------------------------------------------------------------------- reuse


def test_only_the_first_block_runs_where_little_has_changed(model, ran):
    cache = StepCache(0.1)
    cache.begin("run")
    whole = list(range(5))
    for step, blocks in enumerate((whole, [0], [0], [0], whole, [0], [0], whole)):
        ran.clear()
        made = forward(model, cache, step)
        assert ran == blocks, step
        plain = forward(model, StepCache(0), step)
        # Observed at most 0.0020, where the value of step 0 was used three times.
        assert distance(made.flatten(2), plain.flatten(2)) < 0.004, step
        assert torch.equal(made, plain) == (blocks == whole)
    seen = cache.statistics
    assert (seen.computed, seen.reused, seen.of) == (3, 5, STEPS)
    assert seen.steps == {1, 2, 3, 5, 6}
    assert seen.saved == pytest.approx(5 / 8 * 4 / 5)


def test_threshold_0_is_stock_bit_for_bit(model):
    cache = StepCache(0)
    made = inputs(2)
    with torch.no_grad():
        plain = model(**made)
        for step in range(4):
            assert torch.equal(model(**made, controls=at(cache, step)), plain)
    assert computed(cache) == (0, 0) and cache.bytes == 0


def test_nothing_is_reused_where_much_has_changed(model, ran):
    cache = StepCache(0.1)
    cache.begin("run")
    for step in range(4):
        forward(model, cache, step, x=inputs(0, seed=10 + step)["x"])
    assert computed(cache) == (4, 0) and len(ran) == 20


def test_the_rest_follows_the_line_through_the_last_two(model):
    """The first block's part is exact, the others' lies on the line: told from the head alone."""
    cache = StepCache(1.0, most=1)
    cache.begin("run")
    streams = []
    head = model.head
    model.head = lambda s: streams.append(s) or head(s)
    try:
        for step in (0, 1, 2, 3):
            forward(model, cache, step)
    finally:
        del model.head
    assert cache.statistics.steps == {1, 3}  # 0 and 2 were computed, 3 carries on from both
    plain = []
    model.head = lambda s: plain.append(s) or head(s)
    try:
        for step in (0, 2, 3):
            forward(model, StepCache(0), step)
    finally:
        del model.head
    a, b, truth = (s.rows for s in plain)
    apart = distance(streams[3].rows, truth)
    # Observed 9.4e-6, against 7.6e-4 for the value of step 2 and 2.3e-3 for that of step 0.
    assert apart < 5e-5 and 5e-4 < distance(b, truth) < distance(a, truth)


def test_predict_and_distance():
    x, slope = torch.randn(2, 2, 3, 4).unbind()
    line = [(t, x + t * slope) for t in (0.6, 0.9)]
    assert torch.allclose(predict(line, 0.2), x + 0.2 * slope, atol=1e-6)
    assert predict(line[:1], 0.2) is line[0][1]
    b = torch.ones(2, 3, 4)
    a = b.clone()
    a[1, 0, 0] = 4  # 3 of 12
    assert distance(a, b) == pytest.approx(0.25)  # of the picture that changed, not the mean


def test_the_measured_error_is_that_of_reuse(model):
    """At the end of three reused steps: what they added, against the truth of a fourth."""
    cache = StepCache(0.5, most=3)
    cache.begin("run")
    for step in range(5):
        forward(model, cache, step)
    rest = {}
    block, rows = model.double_blocks[0], SIZE[0] * SIZE[1]
    for step in (0, 4):
        first, head = [], model.head
        hook = block.register_forward_hook(lambda _, __, out, to=first: to.append(out[0]))
        model.head = lambda s, to=first, head=head: to.append(s.rows) or head(s)
        try:
            forward(model, StepCache(0), step)
        finally:
            hook.remove()
            del model.head
        rest[step] = first[1] - first[0][:, :rows]
    (error,) = cache.statistics.error
    assert error == pytest.approx(distance(rest[0], rest[4]), rel=1e-4) and error > 0


# -------------------------------------------------------------------------------------- where, when


def steps_of(model, steps=STEPS, **settings) -> set[int]:
    cache = StepCache(1.0, **settings)
    cache.begin("run")
    for step in range(steps):
        made = inputs(0) | {"timestep": torch.tensor([0.5 - 1e-5 * step])}
        with torch.no_grad():
            model(**made, controls=at(cache, step, steps))
    return cache.statistics.steps


@pytest.mark.parametrize(
    ("settings", "reused"),
    [
        ({"most": 99}, {1, 2, 3, 4, 5, 6}),
        ({"most": 1}, {1, 3, 5}),
        ({"most": 2}, {1, 2, 4, 5}),
        ({"most": 99, "start": 0.5}, {4, 5, 6}),
        ({"most": 99, "end": 0.5}, {1, 2, 3}),
        ({"most": 99, "start": 0.3, "end": 0.6}, {3, 4}),
        ({"start": 0.5, "end": 0.5}, set()),
    ],
)
def test_the_window_the_ends_and_how_many_in_a_row(model, settings, reused):
    assert steps_of(model, **settings) == reused


@pytest.mark.parametrize("steps", [1, 2])
def test_short_runs_compute_everything(model, steps):
    assert steps_of(model, steps) == set()


def test_a_run_of_unknown_length_computes_everything(model):
    cache = StepCache(1.0)
    for _ in range(4):
        with torch.no_grad():
            model(**inputs(0), controls=Controls(steps=cache))
    assert computed(cache) == (4, 0)


CHANGES = {
    "prompt": {"context": inputs(2)["context"].index_fill(1, torch.tensor([3]), 0.0)},
    "a reference": {"references": [inputs(2)["references"][0] + 1e-6, inputs(2)["references"][1]]},
    "order": {"references": inputs(2)["references"][::-1]},
    "one less": {"references": inputs(2)["references"][:1]},
    "inactive": {"controls": {"references": (ReferenceControl(active=False),)}},
    "strength": {"controls": {"references": (ReferenceControl(0.99),)}},
    "kept tokens": {"controls": {"references": (ReferenceControl(keep=torch.eye(6, 10) < 1),)}},
    "region": {"controls": {"references": (ReferenceControl(region=LEFT),)}},
    "prompt region": {"controls": {"regions": (RegionPrompt(inputs(0)["context"], LEFT),)}},
    "a negative": {"controls": {"negative": Negative(inputs(0, seed=5)["context"])}},
    "KV form": {"controls": {"kv_references": True}},
    "references at t = 0": {"controls": {"still": True}},
    "place": {"controls": {"origin": (0, 2)}},
    "another call": {"controls": {"call": ("uncond",)}},
    "positions": {"controls": {"about": ("offset",)}},
    "size": {"x": inputs(0, (7, 5))["x"]},
    "batch": {"x": inputs(0, batch=2)["x"], "context": inputs(0, batch=2)["context"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_computes(model, change):
    """At the step where it comes, and again where it goes: that history is a step too old."""
    plain, changed = StepCache(1.0, most=99), StepCache(1.0, most=99)
    for cache in (plain, changed):
        cache.begin("run")
    for step in range(5):
        forward(model, plain, step)
        forward(model, changed, step, **(CHANGES[change] if step == 2 else {}))
    assert plain.statistics.steps == {1, 2, 3, 4}
    assert changed.statistics.steps == {1, 4}


def test_guidance_and_weights_compute():
    dev = toy(DEV)
    for guidance, weights in ((3.9, "one"), (4.0, "two")):
        cache = StepCache(1.0, most=99)
        cache.begin("run")
        for step in range(5):
            cache.weights = weights if step == 2 else "one"
            value = guidance if step == 2 else 4.0
            forward(dev, cache, step, guidance=torch.tensor([value]))
        assert cache.statistics.steps == {1, 4}


def test_a_later_time_computes(model):
    """A solver that steps back, or another run that nobody announced."""
    cache = StepCache(1.0)
    cache.begin("run")
    for step, time in ((0, 0.5), (1, 0.4999), (2, 0.49995), (3, 0.4998)):
        forward(model, cache, step, time=time)
    assert cache.statistics.steps == {1, 3}


def test_pictures_at_different_times_go_without(model):
    cache = StepCache(1.0)
    made = inputs(0, batch=2)
    with torch.no_grad():
        for step in range(3):
            assert torch.equal(model(**made, controls=at(cache, step)), model(**made))
    assert computed(cache) == (0, 0)


# -------------------------------------------------------------------------------------- whole runs


def run(model, cache, *, scale=1.0, solver="euler", steps=20, batch=1, controls=None, seed=1):
    """A picture drawn with CFG or without, with two references; the cache steered as a caller does."""
    made, sigmas = inputs(2, batch=batch, seed=seed), torch.linspace(1, 0, steps + 1)
    sigmas = (
        sigmas * 0.001
    )  # the toy's field is rough: short steps, so that something can be reused

    def steer(sigma):
        if cache is None:
            return controls
        cache.step, cache.steps = round(share(sigmas, sigma) * steps), steps
        return replace(controls or Controls(), steps=cache)

    field = velocity(
        model,
        made["context"],
        negative=inputs(0, seed=5)["context"],
        scale=scale,
        references=made["references"],
        controls=steer,
    )
    with torch.inference_mode():
        return denoise(field, made["x"], sigmas, solver=solver)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_run_with_references_cfg_and_solvers_of_two_calls(model, solver, scale):
    cache = StepCache(0.1)
    cache.begin("run")
    plain, made = (run(model, c, scale=scale, solver=solver) for c in (None, cache))
    seen = cache.statistics
    calls = (20 if solver == "euler" else 39) * (1 if scale == 1 else 2)
    assert seen.computed + seen.reused == calls and seen.reused > calls / 3
    # Observed at most 1.2e-6: the whole run is as short as its steps.
    assert 0 < distance(made.flatten(2), plain.flatten(2)) < 5e-6
    again = StepCache(0)
    again.begin("run")
    assert torch.equal(run(model, again, scale=scale, solver=solver), plain)


def test_the_two_calls_of_cfg_do_not_see_each_other(model):
    """The positive's forwards are those that it would have alone on the same path."""
    cache, alone = StepCache(0.1), StepCache(0.1)
    positive, negative = inputs(2)["context"], inputs(2, seed=5)["context"]
    for step in range(6):
        one = forward(model, cache, step, context=positive)
        two = forward(model, cache, step, context=negative)
        assert torch.equal(forward(model, alone, step, context=positive), one)
        assert not torch.equal(one, two)
    assert cache.statistics.reused == 2 * alone.statistics.reused == 8


def test_a_picture_of_a_batch_counts_like_one_alone(model):
    """One that has changed keeps the whole batch from being reused."""
    x = inputs(0, batch=2)["x"]
    other = torch.stack((x[0], -x[1]))
    text = inputs(0, batch=2)["context"]
    cache = StepCache(0.1)
    for step, now in enumerate((x, x, other)):
        forward(model, cache, step, x=now, context=text, references=[])
    assert cache.statistics.steps == {1}


def test_a_run_says_nothing_to_the_next(model):
    cache = StepCache(0.2)
    pictures = []
    for seed in (1, 2, 1):
        cache.begin(object())
        pictures.append(run(model, cache, seed=seed))
    assert torch.equal(pictures[0], pictures[2])
    assert cache.statistics.reused > 0 and cache.bytes > 0
    cache.clear()
    assert cache.bytes == 0 and cache.statistics.reused > 0


def test_a_run_that_goes_on_computes_first(model):
    """Paused after step 3, continued with a new cache as after a new start of the program."""
    cache = StepCache(1.0, most=99)
    for step in range(3):
        forward(model, cache, step)
    cache.begin("the rest")
    for step in range(3, 6):
        forward(model, cache, step)
    assert cache.statistics.steps == {4, 5} and cache.statistics.computed == 1


def test_an_interrupt_in_the_middle_of_a_forward(model):
    """What was remembered stays whole: the run drawn next is the one that a fresh cache draws."""

    class Interrupt(Exception):
        pass

    def stop(*_):
        raise Interrupt

    cache = StepCache(0.1)
    cache.begin("first")
    forward(model, cache, 0)
    hook = model.single_blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(Interrupt):
        forward(model, cache, 1, x=inputs(0, seed=9)["x"])
    hook.remove()
    fresh = StepCache(0.1)
    fresh.begin("second")
    cache.begin("second")
    for step in range(4):
        assert torch.equal(forward(model, cache, step), forward(model, fresh, step))


def test_beside_a_reference_cache(model):
    """Its refreshes compute all blocks, whatever the step cache would have liked."""
    cache, references = StepCache(1.0, most=99), ReferenceCache("approximate", interval=3, guard=0)
    references.begin("run")
    for step in range(7):
        references.step = step
        forward(model, cache, step, controls={"cache": references})
    assert cache.statistics.steps == {1, 2, 4, 5}
    assert references.statistics.recorded == 3
    exact = ReferenceCache("exact")
    cache.begin("run")
    for step in range(4):
        forward(model, cache, step, controls={"cache": exact, "kv_references": True})
    assert cache.statistics.steps == {1, 2, 3} and exact.statistics.recorded == 1
    assert computed(cache) == (1, 3)  # the references' own pass does not count


def test_memory_is_that_of_two_steps_of_each_call(model):
    cache = StepCache(0.1, most=1)
    for step in range(6):
        for seed in (1, 5):
            forward(model, cache, step, context=inputs(2, seed=seed)["context"])
    one = SIZE[0] * SIZE[1] * KLEIN.hidden_size * 4
    assert cache.bytes == 2 * 2 * 2 * one
    for step in (6, 7):  # the second prompt has gone
        forward(model, cache, step)
    assert cache.bytes == 2 * 2 * one


def test_a_block_that_writes_into_what_it_is_given(model):
    """As patches of other packs do: what the first block returned is remembered as it was."""

    def write(_, args):
        args[0].mul_(1.5)

    cache = StepCache(0.1)
    hook = model.double_blocks[1].register_forward_pre_hook(write)
    try:
        for step in range(3):
            made = forward(model, cache, step)
            plain = forward(model, StepCache(0), step)
            assert distance(made.flatten(2), plain.flatten(2)) < 0.004, step  # observed 0.00094
    finally:
        hook.remove()
    assert cache.statistics.steps == {1, 2}


def test_the_pipeline_draws_with_it():
    """nano at its own number of steps: a run of its own each time, near what it draws without."""
    pipe, cache = Pipeline.load("nano"), StepCache()
    plain = pipe.sample("a red circle left on white background", seed=3)
    made = [
        pipe.sample("a red circle left on white background", seed=3, step_cache=cache)
        for _ in range(2)
    ]
    assert torch.equal(*made)
    assert computed(cache) == (5, 3)
    assert 0 < distance(made[0].flatten(2), plain.flatten(2)) < 0.02  # observed 0.0026


def test_it_is_a_handle():
    cache = StepCache()
    assert copy.deepcopy({"options": cache})["options"] is cache


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": -0.1}, "this threshold. Seen: -0.1. Use a number from 0 (off) to 1."),
        ({"start": 0.6, "end": 0.4}, "this window. Seen: (0.6, 0.4). Use 0 <= start <= end <= 1."),
        ({"most": 0}, "this number of steps in a row. Seen: 0. Use 1 or more."),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(Flux2Error) as error:
        StepCache(**settings)
    assert str(error.value) == f"The step cache cannot work with {said}"
