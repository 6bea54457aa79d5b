"""The step cache in the host: as in the core, run by run, and what the user is told."""

import copy
import logging

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.schedule import share
from flux2_pack.flux2_core.step_cache import StepCache
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.transformer import Flux2Transformer
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.test_steer import kit, noise, prompt, references

pytestmark = pytest.mark.host
STEPS = 10
SIGMAS = torch.linspace(1e-3, 0, STEPS + 1)  # the toy's field is rough: short steps


@pytest.fixture(scope="module")
def state(host):
    return toy.transformer(toy.KLEIN, 1)


@pytest.fixture(scope="module")
def model(state):
    return toy.ours(toy.KLEIN, state)


def cached(host, model, **settings):
    (made,) = host.call("Flux2KitStepCache", model=model, **settings)
    return made


def cache_of(model):
    return model.model_options.get("transformer_options", {}).get("flux2_kit_steps")


def picture(x):
    """What a run begins from: with so little noise every step looks at almost the same."""
    return noise(x.shape[0] + 1)[1:, :, :, : x.shape[3]]


def drawn(model, positive, negative=None, x=None, cfg=1.0, each=None, sampler="euler"):
    """Latents of the host's own sampling call on this very MODEL: a clone has a new cache."""
    import comfy.sample
    import comfy.samplers

    x = noise() if x is None else x
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model,
            x,
            cfg,
            comfy.samplers.sampler_object(sampler),
            SIGMAS,
            positive,
            negative or positive,
            picture(x),
            callback=each,
            disable_pbar=True,
            seed=1,
        )


def in_core(state, texts, cache, cfg=1.0):
    """The same from the core alone: one call a step for each prompt."""
    model = Flux2Transformer(toy.KLEIN)
    model.load_state_dict(state)
    padded = [
        torch.nn.functional.pad(t, (0, 0, max(0, 512 - t.shape[1]), 0)) for ((t, _),) in texts
    ]

    def steer(sigma):
        cache.step, cache.steps = round(share(SIGMAS, sigma) * STEPS), STEPS
        return Controls(steps=cache)

    field = velocity(
        model, padded[0], negative=padded[1], scale=cfg, references=references(), controls=steer
    )
    with torch.inference_mode():
        return denoise(field, torch.lerp(picture(noise()), noise(), SIGMAS[0]), SIGMAS)


def reused(cache) -> tuple[int, int, set[int]]:
    seen = cache.statistics
    return seen.computed, seen.reused, seen.steps


@pytest.mark.parametrize("negative", [24, 600])
def test_the_host_draws_what_the_core_draws(host, state, model, negative):
    """With references and CFG, in one call a step and in two."""
    made = cached(host, model)
    texts = prompt(1), toy.conditioning(2, negative, reference_latents=references())
    ours = drawn(made, *texts, cfg=3.0)
    core = StepCache()
    core.begin("run")
    wanted = in_core(state, texts, core, cfg=3.0)
    assert toy.difference(ours, wanted) < 1e-5  # observed at most 1.9e-6
    computed, again, steps = reused(cache_of(made))
    calls = STEPS * (1 if negative == 24 else 2)
    assert computed + again == calls and steps == core.statistics.steps
    assert again == core.statistics.reused * calls / (2 * STEPS) > calls / 3
    plain = drawn(model, *texts, cfg=3.0)
    assert 2e-5 < toy.difference(ours, plain) < 2e-4  # observed 2.4e-5 and 5.6e-5


def test_the_node(host, model):
    """Its settings arrive; the MODEL that came in is as it was; every execution has its own."""
    made = cached(host, model, threshold=0.2, start=0.1, end=0.9, in_a_row=5)
    cache = cache_of(made)
    assert (cache.threshold, cache.start, cache.end, cache.most) == (0.2, 0.1, 0.9, 5)
    assert cache_of(model) is None and not model.wrappers.get("outer_sample")
    other = cache_of(made.clone())  # a LoRA loader after it
    assert other is not cache and (other.threshold, other.most) == (0.2, 5)
    assert copy.deepcopy(made.model_options)["transformer_options"]["flux2_kit_steps"] is cache
    again = cached(host, made, threshold=0.3)
    assert cache_of(again).threshold == 0.3 and cache_of(made) is cache
    off = cached(host, again, threshold=0)
    assert cache_of(off) is None and not off.get_all_wrappers("outer_sample")
    assert cache_of(off.clone()) is None


def test_threshold_0_is_stock(host, model):
    texts = prompt(1), prompt(2)
    plain = drawn(model, *texts, cfg=2.0)
    assert torch.equal(drawn(cached(host, model, threshold=0), *texts, cfg=2.0), plain)


def test_a_model_of_the_hosts_loader_is_refused(host, state):
    with pytest.raises(Flux2Error) as error:
        cached(host, toy.native(state))
    assert str(error.value) == (
        "This model cannot use the step cache. Seen: a model from the host's own loader. "
        "Load it with FLUX.2 Load Model or FLUX.2 Loader."
    )


def test_the_report(host, model, caplog, monkeypatch):
    """In the log, and on the node, after each run."""
    from flux2_pack.nodes import host_steps

    shown = []
    monkeypatch.setattr(host_steps, "show", lambda hidden, text: shown.append(text))
    made = cached(host, model, in_a_row=2)
    with caplog.at_level(logging.INFO):
        drawn(made, prompt(1))
    (line,) = shown
    assert line in caplog.messages
    assert line.startswith(
        "Step cache: 6 of 10 passes reused, in steps 2-3, 5-6, 8-9 of 10; 48% of the work in "
        "blocks saved. Measured error of what was reused: "
    )
    assert cache_of(made).bytes == 0
    drawn(cached(host, model, threshold=1e-6), prompt(1))
    assert shown[1] == "Step cache: nothing was reused, all 10 passes were computed."


def test_numbers():
    from flux2_pack.nodes.host_steps import numbers

    assert numbers({5, 1, 2, 3, 8}) == "2-4, 6, 9" and numbers(set()) == ""


def test_a_run_says_nothing_to_the_next(host, model):
    """Another prompt, noise, size or batch on the same MODEL is drawn as by a fresh one."""
    made = cached(host, model)
    for positive, x in (
        (prompt(1), noise()),
        (prompt(7), noise()),
        (prompt(7), noise(2)),
        (prompt(7), noise()[..., :6]),
        (prompt(1), noise()),
    ):
        fresh = cached(host, model)
        assert torch.equal(drawn(made, positive, x=x), drawn(fresh, positive, x=x))
        assert reused(cache_of(made)) == reused(cache_of(fresh))
        assert cache_of(made).statistics.reused > 0


def test_an_interrupted_run_leaves_nothing(host, model):
    """Between two steps, and in the middle of a forward."""
    import comfy.model_management as memory

    def stop(i, *_):
        if i == 4:
            raise memory.InterruptProcessingException

    def stuck(*_):
        raise memory.InterruptProcessingException

    made = cached(host, model)
    with pytest.raises(memory.InterruptProcessingException):
        drawn(made, prompt(1), each=stop)
    assert cache_of(made).bytes == 0 and cache_of(made).statistics.reused > 0
    hook = made.model.diffusion_model.single_blocks[1].register_forward_pre_hook(stuck)
    try:
        with pytest.raises(memory.InterruptProcessingException):
            drawn(made, prompt(1))
    finally:
        hook.remove()
    assert cache_of(made).bytes == 0
    assert torch.equal(drawn(made, prompt(1)), drawn(cached(host, model), prompt(1)))


def test_a_reference_that_comes_or_goes_computes(host, model):
    """At the step from which it acts: step 6 of 10."""
    made = cached(host, model, threshold=1.0, in_a_row=99)
    drawn(made, prompt(1))
    assert reused(cache_of(made))[2] == set(range(1, 9))
    drawn(made, prompt(1, kit({"end": 0.5}, {})))
    assert reused(cache_of(made))[2] == set(range(1, 9)) - {5}
    drawn(made, prompt(1, kit({}, {"start": 0.3})))
    assert reused(cache_of(made))[2] == set(range(1, 9)) - {3}


def test_weights_that_hooks_change_compute(host, state):
    """A LoRA scheduled for the second half of the run."""
    import comfy.hooks
    from comfy.lora import load_lora, model_lora_keys_unet

    made = cached(host, toy.ours(toy.KLEIN, state), threshold=1.0, in_a_row=99)
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights = load_lora(toy.lora(state), model_lora_keys_unet(made.model, {}))
    hook.need_weight_init = False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    keyframes = comfy.hooks.HookKeyframeGroup()
    early, late = 0.0, 1.0  # the host counts in a share of its own: that of the middle step
    for _ in range(60):
        middle = (early + late) / 2
        sigma = made.model.model_sampling.percent_to_sigma(middle)
        early, late = (middle, late) if sigma > SIGMAS[5] else (early, middle)
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=late))
    group.set_keyframes_on_hooks(keyframes)
    drawn(made, prompt(1, hooks=group))
    assert reused(cache_of(made))[2] == set(range(1, 9)) - {5}


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "res_multistep"])
def test_under_other_samplers(host, model, sampler):
    plain = drawn(model, prompt(1), sampler=sampler)
    made = cached(host, model)
    ours = drawn(made, prompt(1), sampler=sampler)
    assert reused(cache_of(made))[1] > 0
    assert 0 < toy.difference(ours, plain) < 1e-4  # observed at most 2.2e-5


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_paused_run_computes_first_when_it_goes_on(host, model, solver):
    """And lies as near to the run without a cache as one that was not paused."""
    from flux2_pack.nodes import host_run, host_sampling

    def whole(model, *stops):
        guider = host_sampling.guider(model, prompt(1), None, 1.0)
        sampler, told = host_run.Solver(solver), []
        state = host_run.begin(guider, SIGMAS, {"samples": picture(noise())}, 5, sampler)
        with torch.inference_mode():
            for stop in stops:
                state = host_run.go_on(guider, state, stop)
                told.append(cache_of(model) and set(cache_of(model).statistics.steps))
        return state.x, told

    made = cached(host, model, threshold=1.0, in_a_row=99)
    x, told = whole(made, 4, STEPS)
    # Heun looks ahead: its second call of a step counts as the next one's.
    assert told == [{1, 2, 3} if solver == "euler" else {1, 2, 3, 4}, {5, 6, 7, 8}]
    plain, _ = whole(model, STEPS)
    # Observed at most 6.7e-5 with the pause, 1.4e-4 without.
    for seen in (x, whole(made, STEPS)[0]):
        assert 0 < toy.difference(seen, plain) < 3e-4


def test_beside_windows_and_the_reference_cache(host, model):
    """Each window has a history of its own."""
    (through,) = host.call("Flux2KitWindows", model=model, window=64, overlap=32)
    made = cached(host, through)
    x = toy.latents(3, (6, 8))[0]
    plain = drawn(through, prompt(1), x=x)
    # observed 2.2e-5
    assert 0 < toy.difference(drawn(made, prompt(1), x=x), plain) < 1e-4
    computed, again, _ = reused(cache_of(made))
    assert again > computed > 0 and (computed + again) % STEPS == 0
    (kept,) = host.call("Flux2KitReferenceCache", model=model, mode="approximate", interval=4)
    both = cached(host, kept, threshold=1.0, in_a_row=99)
    drawn(both, prompt(1))
    assert reused(cache_of(both))[2] == {1, 2, 3, 5, 6, 7}  # computed with the references, and last
