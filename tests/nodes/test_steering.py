"""Controls from node to picture: whole graphs against the Pipeline, and caches over several runs."""

import copy
from dataclasses import replace

import pytest
import torch

from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.references import Reference, Region
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.test_nano import complete
from flux2_pack.tests.nodes.test_steer import LEFT, SIZE, TEXT, kit, nag, noise, prompt, rows
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host
CLOSE = 1e-4  # observed at most 3.7e-5, with CFG
EXACT = 1e-5  # observed at most 2.4e-6: the cache for a batch of three
PLACE, WORDS = "a green square", "image 1 beside image 2"
KV = replace(toy.KLEIN, kv_references=True)


def mask(number: int) -> torch.Tensor:
    """White on one side, with a soft edge; (64, 64)."""
    ramp = torch.linspace(0, 1, 64).mul(4).sub(1.5).clamp(0, 1).expand(64, 64)
    return ramp if number else 1 - ramp


class ToyMask:
    """A test-only node: one of the two masks."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0})}}

    def make(self, number):
        return (mask(number)[None],)


@pytest.fixture(scope="module")
def graph(host):
    toy.add_nodes(host)
    toy.write_models(host.models)
    host.mappings["ToyMask"] = ToyMask
    return host


def steered(isolate: bool = False) -> dict:
    """Nano, two references with every control, a region with a prompt of its own."""
    return {
        "load": node("Flux2KitLoader", model="nano (built in)"),
        "text": node("Flux2KitPrompt", clip=["load", 1], text=WORDS),
        "no": node("Flux2KitPrompt", clip=["load", 1], text=""),
        "place": node("Flux2KitPrompt", clip=["load", 1], text=PLACE),
        "picture1": node("ToyImage", number=1, width=64, height=64),
        "picture2": node("ToyImage", number=2, width=96, height=64),
        "mask0": node("ToyMask", number=0),
        "mask1": node("ToyMask", number=1),
        "ref1": node(
            "Flux2KitReference",
            image=["picture1", 0],
            name="",
            strength=0.6,
            mask=["mask0", 0],
            region=["mask1", 0],
        ),
        "ref2": node(
            "Flux2KitReference",
            image=["picture2", 0],
            name="",
            references=["ref1", 0],
            strength=1.8,
            end=0.5,
        ),
        "apply": node(
            "Flux2KitApplyReferences",
            vae=["load", 2],
            positive=["text", 0],
            negative=["no", 0],
            references=["ref2", 0],
        ),
        "main": node(
            "Flux2KitRegionPrompt",
            positive=["apply", 0],
            prompt=["place", 0],
            mask=["mask0", 0],
            base=0.25,
            isolate=isolate,
        ),
        "empty": node("Flux2KitEmptyLatent", model=["load", 0], width=128, height=128),
    }


def own_sampler(guidance: float = 1.0, **settings) -> dict:
    return node(
        "Flux2KitSampler",
        model=["load", 0],
        positive=["main", 0],
        negative=["apply", 1],
        latent=["empty", 0],
        **{"steps": 4, "seed": 7, "guidance": guidance, **settings},
    )


def latents_of(host, made: dict) -> torch.Tensor:
    return host.run(complete(host, made), {"latent": ("sample", 0)}).kept["latent"]["samples"]


@pytest.fixture(scope="module")
def pictures():
    first, second = (toy.images(i, size)[0][0] for i, size in ((1, (64, 64)), (2, (64, 96))))
    return [
        Reference(first, strength=0.6, mask=mask(0), region=mask(1)),
        Reference(second, strength=1.8, end=0.5),
    ]


@pytest.mark.parametrize(("guidance", "isolate"), [(1.0, True), (1.0, False), (2.5, False)])
def test_a_graph_of_controls_draws_what_the_pipeline_draws(graph, pictures, guidance, isolate):
    ours = latents_of(graph, steered(isolate) | {"sample": own_sampler(guidance)})
    how = {"regions": [Region(PLACE, mask(0), 0.25)], "isolate": isolate}
    how |= {"guidance": guidance, "steps": 4, "seed": 7}
    pipe = Pipeline.load("nano")
    assert toy.difference(ours, pipe.sample(WORDS, references=pictures, **how)) < CLOSE
    # The test can fail: another end is another picture.
    other = [pictures[0], replace(pictures[1], end=0.75)]
    assert toy.difference(ours, pipe.sample(WORDS, references=other, **how)) > 0.01


@pytest.mark.parametrize("guider", ["flex", "cfg", "basic"])
def test_the_hosts_sampler_nodes_draw_what_ours_draws(graph, guider):
    """SamplerCustomAdvanced with our guider, CFGGuider or BasicGuider on our MODEL."""
    scale = 1.0 if guider == "basic" else 2.5
    made = steered() | {"sample": own_sampler(scale)}
    ours = latents_of(graph, made)
    common = {"model": ["load", 0], "positive": ["main", 0], "negative": ["apply", 1]}
    made |= {
        "flex": node("Flux2KitFlex", latent=["empty", 0], steps=4, guidance=scale, **common),
        "cfg": node("CFGGuider", cfg=scale, **common),
        "basic": node("BasicGuider", model=["load", 0], conditioning=["main", 0]),
        "noise": node("RandomNoise", noise_seed=7),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=[guider, 0],
            sampler=["euler", 0],
            sigmas=["flex", 1],
            latent_image=["empty", 0],
        ),
    }
    assert toy.difference(latents_of(graph, made), ours) < EXACT


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_ksampler_draws_what_ours_draws(graph, denoise):
    """With its own schedule, and with the end of it alone."""
    from comfy.samplers import KSampler

    from flux2_pack.nodes import host_sampling

    made = steered() | {
        "sample": node(
            "KSampler",
            model=["load", 0],
            seed=7,
            steps=4,
            cfg=2.5,
            sampler_name="euler",
            scheduler="simple",
            positive=["main", 0],
            negative=["apply", 1],
            latent_image=["empty", 0],
            denoise=denoise,
        )
    }
    keep = {"latent": ("sample", 0), "model": ("load", 0), "empty": ("empty", 0)}
    keep |= {"positive": ("main", 0), "negative": ("apply", 1)}
    kept = graph.run(complete(graph, made), keep).kept
    plan = KSampler(kept["model"], 4, "cpu", "euler", "simple", denoise)
    guider = host_sampling.guider(kept["model"], kept["positive"], kept["negative"], 2.5)
    with torch.inference_mode():
        ours = host_sampling.sample(guider, plan.sigmas, kept["empty"], 7)
    assert toy.difference(kept["latent"]["samples"], ours["samples"]) < EXACT


@pytest.mark.parametrize(("steps", "denoise"), [(4, 1.0), (6, 1.0), (4, 0.5)])
def test_a_range_counts_the_steps_that_are_drawn(graph, monkeypatch, steps, denoise):
    """Half of them have the second reference's 24 rows, whatever part of a schedule they are."""
    seen = rows(monkeypatch)
    latents_of(graph, steered() | {"sample": own_sampler(steps=steps, denoise=denoise)})
    lengths = list(dict.fromkeys(seen))
    assert len(lengths) == 2 and lengths[0] - lengths[1] == 24
    assert seen == sorted(seen, reverse=True) and seen.count(lengths[0]) == len(seen) / 2


def test_one_per_picture_through_the_nodes(graph):
    """Picture i is what it would be alone with reference i; a wrong count is said in a sentence."""

    def of(count, drawn, seed=7):
        made = steered() | {"sample": own_sampler(seed=seed, steps=2)}
        made["batch"] = node("RepeatImageBatch", image=["picture1", 0], amount=1)
        for i in range(1, count):
            made[f"other{i}"] = node("ToyImage", number=10 + i, width=64, height=64)
            made[f"batch{i}"] = node(
                "ImageBatch",
                image1=["batch" if i == 1 else f"batch{i - 1}", 0],
                image2=[f"other{i}", 0],
            )
        last = ["batch" if count == 1 else f"batch{count - 1}", 0]
        made["ref1"]["inputs"] |= {"image": last, "batch": "one per picture"}
        made["empty"]["inputs"]["batch_size"] = drawn
        return made

    both = latents_of(graph, of(2, 2))
    assert toy.difference(both[:1], latents_of(graph, of(1, 1))) < CLOSE
    second = of(1, 1, seed=8)
    second["picture1"]["inputs"]["number"] = 11
    assert toy.difference(both[1:], latents_of(graph, second)) < CLOSE
    with pytest.raises(
        Exception, match=r"Reference 1 holds 3 pictures\. Seen: 2 pictures are drawn"
    ):
        latents_of(graph, of(3, 2))


# ------------------------------------------------------------------------------------------- cache


@pytest.fixture(scope="module")
def kv(host):
    return toy.ours(KV, toy.transformer(toy.KLEIN))


def cached(host, model, **settings):
    (made,) = host.call("Flux2KitReferenceCache", model=model, **settings)
    return made


def cache_of(model):
    return model.model_options["transformer_options"]["flux2_kit_cache"]


def drawn(model, positive, negative=None, x=None, cfg=1.0, steps=3, each=None):
    """Latents of the host's own sampling call on this very MODEL: a clone has a new cache."""
    import comfy.sample
    import comfy.samplers

    x = noise() if x is None else x
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model,
            x,
            cfg,
            comfy.samplers.sampler_object("euler"),
            torch.linspace(1, 0, steps + 1),
            positive,
            negative or positive,
            torch.zeros_like(x),
            callback=each,
            disable_pbar=True,
            seed=1,
        )


@pytest.mark.parametrize("other", [24, 600])
def test_exact_for_a_batch_with_cfg_and_references_of_several_sizes(host, kv, other):
    """With prompts of one length (one call a step) and of two (two calls)."""
    some = toy.latents(4, (4, 6), (5, 3), (2, 2), (3, 7))
    steer = kit({"strength": 0.5}, {"end": 0.6}, {}, {"start": 0.3})
    positive = prompt(1, steer, reference_latents=some)
    negative = toy.conditioning(2, other, reference_latents=some, flux2_kit=steer)
    how = {"x": noise(3), "cfg": 3.0}
    plain = drawn(kv, positive, negative, **how)
    made = cached(host, kv)
    assert toy.difference(drawn(made, positive, negative, **how), plain) < EXACT
    seen = cache_of(made).statistics
    # Three sets of active references in three steps: each is computed once, whoever asks.
    assert seen.misses == 3 and seen.hits == (0 if other == 24 else 3)
    assert cache_of(made).bytes == 0


def test_a_kept_cache_is_never_stale(host):
    """Run after run on one MODEL: what changed is computed anew, what did not is not."""
    from comfy.lora import load_lora, model_lora_keys_unet

    state = toy.transformer(toy.KLEIN)
    plain = toy.ours(KV, state)
    made = cached(host, toy.ours(KV, state), keep=True)
    one = toy.latents(4, (4, 6), (5, 3))
    two = [one[0], one[1] + 0.01]
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[0, 0] = False
    runs = {
        "first": (prompt(1), 1),
        "the same": (prompt(1), 0),
        "another prompt": (prompt(7), 0),
        "another reference": (prompt(1, reference_latents=two), 1),
        "another order": (prompt(1, reference_latents=one[::-1]), 1),
        "one less": (prompt(1, reference_latents=one[:1]), 1),
        "another strength": (prompt(1, kit({"strength": 0.5}, {})), 1),
        "a mask": (prompt(1, kit({"keep": keep}, {})), 1),
        "a region": (prompt(1, kit({"region": LEFT}, {})), 1),
        "the first again": (prompt(1), 0),
    }
    for name, (positive, misses) in runs.items():
        wanted = drawn(plain, positive, steps=2)
        assert toy.difference(drawn(made, positive, steps=2), wanted) < EXACT, name
        assert cache_of(made).statistics.misses == misses, name
    before = drawn(plain, prompt(1))
    for model in (plain, made):
        found = load_lora(toy.lora(state), model_lora_keys_unet(model.model, {}))
        model.add_patches(found, 0.8)
    wanted = drawn(plain, prompt(1))
    assert toy.difference(wanted, before) > 0.01
    assert toy.difference(drawn(made, prompt(1)), wanted) < EXACT
    assert cache_of(made).statistics.misses == 1


def test_approximate_is_stock_in_its_guarded_steps(host):
    model = toy.ours(toy.KLEIN, toy.transformer(toy.KLEIN))
    seen = {}
    for name, made in (
        ("stock", model),
        ("guarded", cached(host, model, mode="approximate", guard=2, interval=9)),
    ):
        seen[name] = {}
        keep = lambda i, x0, *_, steps=seen[name]: steps.setdefault(i, x0)  # noqa: E731
        drawn(made, prompt(1), prompt(2), cfg=3.0, steps=4, each=keep)
    apart = [
        toy.difference(a, b)
        for a, b in zip(*(seen[k].values() for k in ("guarded", "stock")), strict=True)
    ]
    assert apart[:2] == [0, 0] and min(apart[2:]) > 1e-3
    assert cache_of(made).statistics.hits == 2 and cache_of(made).bytes == 0
    whole = cached(host, model, mode="approximate", interval=1)
    assert torch.equal(drawn(whole, prompt(1)), drawn(model, prompt(1)))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("mode", ["exact", "approximate"])
def test_an_interrupted_run_leaves_nothing_wrong(host, kv, mode, keep):
    """Between two steps, and in the middle of the forward that records."""
    import comfy.model_management as memory

    def stop(i, *_):
        if i == 1:
            raise memory.InterruptProcessingException

    def stuck(*_):
        raise memory.InterruptProcessingException

    made = cached(host, kv, mode=mode, keep=keep, guard=1, interval=9)
    block = made.model.diffusion_model.single_blocks[1]
    with pytest.raises(memory.InterruptProcessingException):
        drawn(made, prompt(1), each=stop)
    assert (cache_of(made).bytes > 0) == keep
    cache_of(made).clear()
    hook = block.register_forward_pre_hook(stuck)
    try:
        with pytest.raises(memory.InterruptProcessingException):
            drawn(made, prompt(1))
    finally:
        hook.remove()
    assert cache_of(made).bytes == 0
    for positive in (prompt(1), prompt(1, reference_latents=toy.latents(8, (4, 6), (5, 3)))):
        fresh = cached(host, kv, mode=mode, guard=1, interval=9)
        assert toy.difference(drawn(made, positive), drawn(fresh, positive)) < EXACT


def test_the_cache_is_neither_saved_nor_copied(host, kv):
    made = cached(host, kv, keep=True)
    names = set(kv.model.state_dict())
    drawn(made, prompt(1))
    cache = cache_of(made)
    assert cache.bytes > 0
    assert set(made.model.state_dict()) == names and set(made.model_state_dict()) == names
    held = cache.bytes
    options = copy.deepcopy(made.model_options)
    assert options["transformer_options"]["flux2_kit_cache"] is cache
    clone = made.clone()
    assert cache_of(clone) is not cache and cache_of(clone).bytes == 0
    assert cache.bytes == held


def test_the_hosts_nag_beside_our_cache(host, kv):
    """Its patch sees the references computed alone, once, and makes of them what it would make of
    both prompts' copies."""
    guided = nag(kv)
    how = {"cfg": 2.0}
    plain = drawn(guided, prompt(1), prompt(2), **how)
    assert toy.difference(plain, drawn(kv, prompt(1), prompt(2), **how)) > 1e-3
    assert toy.difference(drawn(cached(host, guided), prompt(1), prompt(2), **how), plain) < EXACT


def test_control_networks_before_the_single_blocks(host, kv):
    """What is added after double blocks follows the picture's rows into a region's order.

    In the KV form references do not look at the picture: a region that is nearly nothing on the
    right does what one does that is nothing there, but leaves the rows as they are.
    """
    net, t, text = kv.model.diffusion_model, torch.tensor([0.5]), torch.randn(1, TEXT, 384)
    hard = torch.zeros(SIZE)
    hard[:, ::2] = 1
    adds = {"input": [torch.randn(1, 48, 256), torch.randn(1, 48, 256)]}

    def velocity(region, control):
        how = {"ref_latents": toy.latents(4, (4, 6)), "transformer_options": {}}
        return net(noise(), t, text, flux2_kit=kit({"region": region}), control=control, **how)

    with torch.inference_mode():
        reordered, usual = (velocity(r, adds) for r in (hard, hard.clamp(min=1e-20)))
        assert toy.difference(reordered, usual) < EXACT
        assert toy.difference(reordered, velocity(hard, None)) > 0.01
