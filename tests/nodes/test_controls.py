"""Controls of references and regions: what travels in the conditioning, and what is refused."""

import dataclasses
import logging

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.references import pixels, plan
from flux2_pack.tests.hosting import graph
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
STOCK = {"strength": 1.0, "start": 0.0, "end": 1.0, "keep": None, "region": None, "name": ""}


@pytest.fixture(scope="module")
def models(host):
    toy.write_models(host.models)
    (model,) = host.call("Flux2KitModelLoader", model="toy-klein.safetensors")
    (vae,) = host.call("Flux2KitVAELoader", vae="toy-vae.safetensors")
    return model, vae


@pytest.fixture(scope="module")
def foreign(models):
    """The host's own MODEL of a FLUX.2 file."""
    return toy.native(toy.transformer(toy.KLEIN))


def refusal(call, *args, **kw) -> str:
    with pytest.raises(Flux2Error) as error:
        call(*args, **kw)
    return str(error.value)


def reference(host, seed: int = 1, size=(64, 64), count: int = 1, **controls):
    """The chain that FLUX.2 Reference makes of random pictures."""
    image = torch.cat([toy.images(seed + i, size)[0] for i in range(count)])
    return host.call("Flux2KitReference", image=image, **controls)[0]


def applied(host, vae, chain=(), positive=None, **inputs):
    """positive, negative after FLUX.2 Apply References."""
    positive = positive or toy.conditioning(1)
    return host.call(
        "Flux2KitApplyReferences", vae=vae, positive=positive, references=chain, **inputs
    )[:2]


def left(size=(64, 64)) -> torch.Tensor:
    """A MASK that is white on its left half."""
    mask = torch.zeros(1, *size)
    mask[..., : size[1] // 2] = 1
    return mask


def plain(entry: dict) -> dict:
    return {k: v for k, v in entry.items() if k not in ("keep", "region")}


def test_at_the_defaults_the_conditioning_is_the_hosts_own(host, models):
    """No key of ours: names, importance, whole maps and smaller sizes are no controls."""
    chain = reference(
        host,
        name="hero",
        mask=torch.ones(1, 64, 64),
        region=torch.ones(1, 8, 8),
        importance=2.0,
        strength=1.0,
        start=0.0,
        end=1.0,
    )
    positive, negative = applied(host, models[1], chain, negative=toy.conditioning(2))
    for made, before in ((positive, toy.conditioning(1)), (negative, toy.conditioning(2))):
        ((text, options),) = made
        assert torch.equal(text, before[0][0])
        assert set(options) == {"pooled_output", "reference_latents"}
        (latent,) = options["reference_latents"]
        with torch.inference_mode():
            wanted = models[1].encode(pixels(chain[0], plan(chain)[0]).movedim(1, -1) / 2 + 0.5)
        assert torch.equal(latent, wanted)


def test_controls_stand_parallel_to_the_latents(host, models):
    """After references of another node, for positive and negative, strength 0 included."""
    chain = reference(host, name="a", strength=0.0)
    chain = reference(host, 2, (64, 96), references=chain, start=0.25, end=0.5, mask=left((64, 96)))
    chain = reference(host, 3, references=chain, region=left((32, 32)))
    before = toy.conditioning(1, reference_latents=toy.latents(1, (4, 4)))
    made = applied(host, models[1], chain, before, negative=toy.conditioning(2))
    for ((_, options),), others in zip(made, ([STOCK], []), strict=True):
        kit = options["flux2_kit"]
        (*first, a, b, c) = kit["references"]
        assert first == others
        assert len(options["reference_latents"]) == len(kit["references"])
        assert (kit["version"], kit["regions"], kit["isolate"]) == (1, [], False)
        assert plain(a) == plain(STOCK) | {"strength": 0.0, "name": "a"}
        assert plain(b) == plain(STOCK) | {"start": 0.25, "end": 0.5}
        assert b["keep"].tolist() == [[True, True, True, False, False, False]] * 4
        assert b["region"] is None and c["keep"] is None
        assert torch.equal(c["region"], left((32, 32))[0])


def test_one_apply_after_another(host, models):
    """Lists add up and stay parallel, whichever of the two brings controls."""
    strong, stock = reference(host, strength=2.0), reference(host, 2)
    for first, second, wanted in ((strong, stock, [2.0, 1.0]), (stock, strong, [1.0, 2.0])):
        once, _ = applied(host, models[1], first)
        ((_, kept),) = once
        seen = {key: list(value) for key, value in kept.items() if isinstance(value, (list, dict))}
        ((_, options),), _ = applied(host, models[1], second, once)
        assert [e["strength"] for e in options["flux2_kit"]["references"]] == wanted
        assert len(options["reference_latents"]) == 2
        # The conditioning that came in is as it was.
        assert seen == {k: list(v) for k, v in kept.items() if isinstance(v, (list, dict))}


def test_a_host_reference_after_ours(host, models):
    """ReferenceLatent appends: the controls still belong to the first."""
    once, _ = applied(host, models[1], reference(host, strength=2.0))
    (more,) = host.call(
        "ReferenceLatent", conditioning=once, latent={"samples": toy.latents(1, (4, 4))[0]}
    )
    ((_, options),), _ = applied(host, models[1], reference(host, 2, strength=0.5), more)
    assert [e["strength"] for e in options["flux2_kit"]["references"]] == [2.0, 1.0, 0.5]


def test_references_taken_away_from_their_controls(host, models):
    once, _ = applied(host, models[1], reference(host, strength=2.0))
    cut = [[once[0][0], once[0][1] | {"reference_latents": []}]]
    said = refusal(applied, host, models[1], reference(host, 2), cut)
    assert said.startswith("A node between has taken references away from their controls. Seen: ")


def test_ten_in_all(host, models):
    chain = reference(host, count=6, strength=2.0)
    once, _ = applied(host, models[1], chain)
    ((_, options),), _ = applied(host, models[1], reference(host, 20, count=4), once)
    assert len(options["flux2_kit"]["references"]) == 10
    said = refusal(applied, host, models[1], reference(host, 20, count=5), once)
    assert said.startswith("FLUX.2 takes at most 10 reference images. Seen: 11, with those")


def test_a_batch_of_pictures(host, models):
    """One reference each as ever; or one reference that has a picture for each latent."""
    each = reference(host, count=3, strength=0.5, name="a")
    assert [(r.strength, r.name, r.image.shape) for r in each] == [
        (0.5, name, (64, 64, 3)) for name in ("a", "", "")
    ]
    (one,) = shared = reference(host, count=3, batch="one per picture", name="a", mask=left())
    assert one.image.shape == (3, 64, 64, 3) and one.name == "a"
    ((_, options),), _ = applied(host, models[1], shared)
    (latent,) = options["reference_latents"]
    assert latent.shape == (3, 128, 4, 4)
    for i in range(3):  # each encoded as it would be alone
        ((_, alone),), _ = applied(host, models[1], reference(host, 1 + i))
        assert toy.difference(latent[i : i + 1], alone["reference_latents"][0]) < 1e-4  # seen 2e-6
    (single,) = reference(host, batch="one per picture")
    assert single.image.shape == (64, 64, 3)


def test_masks_of_a_batch(host):
    masks = torch.cat([left(), 1 - left()])
    first, second = reference(host, count=2, mask=masks)
    assert torch.equal(first.mask, masks[0]) and torch.equal(second.mask, masks[1])
    assert all(torch.equal(r.mask, masks[0]) for r in reference(host, count=2, mask=masks[:1]))
    assert torch.equal(reference(host, mask=masks[0])[0].mask, masks[0])
    said = refusal(reference, host, count=3, mask=masks, name="a")
    assert said == (
        'The mask of Reference 1 ("a") does not go with the number of pictures. Seen: a mask of '
        "shape (2, 64, 64) for 3 pictures. Connect one mask, or 3."
    )
    said = refusal(reference, host, count=2, region=masks, batch="one per picture")
    assert said.endswith("for 1 picture. Connect one mask.")


def test_a_mask_of_another_size_is_noted(host, caplog):
    with caplog.at_level(logging.WARNING):
        reference(host, size=(64, 96), mask=left((64, 96)))
        assert not caplog.messages
        reference(host, size=(64, 96), mask=left((32, 32)), name="a")
    assert caplog.messages == [
        'The mask of Reference 1 ("a") has 32 x 32 pixels, the picture 96 x 64: it is stretched.'
    ]


REFUSED = {
    "steps the wrong way round": ({"start": 0.5, "end": 0.5}, "Reference 1 would act in no step."),
    "steps outside the run": ({"end": 1.5}, "Reference 1 would act in no step."),
    "too strong": ({"strength": 3.5}, "The strength of Reference 1 is out of range."),
    "black mask": ({"mask": torch.zeros(1, 64, 64)}, "The mask of Reference 1 is black"),
    "black region": ({"region": torch.zeros(1, 8, 8)}, "The region of Reference 1 is black"),
    "mask of NaN": ({"mask": torch.full((1, 64, 64), torch.nan)}, "The mask of Reference 1 is not"),
    "a picture as mask": ({"mask": torch.ones(1, 64, 64, 3)}, "The mask of Reference 1 does not"),
    "no importance": ({"importance": 0.0}, "The importance of Reference 1 must be above 0."),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_when_the_reference_is_made(host, mistake):
    controls, sentence = REFUSED[mistake]
    assert refusal(reference, host, **controls).startswith(sentence)


def test_megapixels(host, models):
    ((_, options),), _ = applied(
        host, models[1], reference(host, size=(128, 128), megapixels=64 * 64 / 1e6)
    )
    assert options["reference_latents"][0].shape == (1, 128, 4, 4) and "flux2_kit" not in options


def old(kind: str, values: list) -> dict:
    """A saved workflow of one node, with the widget values that the first release had."""
    node = {"id": 1, "type": kind, "widgets_values": values, "inputs": []}
    return {"nodes": [node], "links": []}


def test_old_workflows_keep_their_values(host):
    """The first widget is still the name, new ones follow, and none of them is required."""
    cls = host.mappings["Flux2KitReference"]
    info = {"input": cls.INPUT_TYPES(), "display_name": "x"}
    prompt = graph.to_prompt(
        old("Flux2KitReference", ["hero"]), {"Flux2KitReference": info | {"output": []}}
    )
    assert prompt["1"]["inputs"] == {"name": "hero"}
    assert [name for name, *_ in graph.widgets(info)] == [
        "name", "strength", "start", "end", "megapixels", "importance", "batch",
    ]  # fmt: skip
    assert set(info["input"]["required"]) == {"image", "name"}
    assert next(iter(info["input"]["optional"])) == "references"


def region(host, positive, mask=None, prompt=None, **settings):
    mask = left() if mask is None else mask
    prompt = prompt or toy.conditioning(9, 12)
    (made,) = host.call(
        "Flux2KitRegionPrompt", positive=positive, prompt=prompt, mask=mask, **settings
    )
    return made


def test_regions_follow_each_other(host, models):
    start = toy.conditioning(1)
    once = region(host, start)
    ((text, options),) = region(host, once, 1 - left(), base=0.0, isolate=True)
    assert torch.equal(text, start[0][0]) and "flux2_kit" not in start[0][1]
    kit = options["flux2_kit"]
    assert len(once[0][1]["flux2_kit"]["regions"]) == 1 and not once[0][1]["flux2_kit"]["isolate"]
    assert kit["isolate"] and kit["references"] == [] and kit["version"] == 1
    first, second = kit["regions"]
    assert (first["base"], second["base"]) == (0.5, 0.0)
    assert torch.equal(first["context"], toy.conditioning(9, 12)[0][0])
    assert torch.equal(first["region"], left()[0])
    assert torch.equal(second["region"], 1 - left()[0])
    # isolate stays on, wherever in the chain it was asked for
    assert region(host, [[text, options]])[0][1]["flux2_kit"]["isolate"]


def test_regions_and_references_in_either_order(host, models):
    chain = reference(host, strength=2.0)
    a = region(host, applied(host, models[1], chain)[0])
    b, _ = applied(host, models[1], chain, region(host, toy.conditioning(1)))
    for ((_, options),) in (a, b):
        kit = options["flux2_kit"]
        assert len(kit["regions"]) == len(options["reference_latents"]) == 1
        assert [e["strength"] for e in kit["references"]] == [2.0]


def test_every_entry_of_a_main_prompt_gets_the_region(host):
    made = region(host, toy.conditioning(1) + toy.conditioning(2))
    assert [len(options["flux2_kit"]["regions"]) for _, options in made] == [1, 1]


def test_regions_that_are_refused(host, models):
    start = toy.conditioning(1)
    with_reference, _ = applied(host, models[1], reference(host), toy.conditioning(2))
    calls = (
        (
            {"prompt": with_reference},
            "A region's prompt is text alone. Seen: it carries references",
        ),
        (
            {"prompt": region(host, start)},
            "A region's prompt is text alone. Seen: it carries contr",
        ),
        ({"prompt": toy.conditioning(1, start_percent=0.5)}, "A region's prompt is text alone."),
        ({"prompt": start + start}, "A region takes one prompt. Seen: a conditioning of 2 parts"),
        ({"prompt": toy.conditioning(1, width=7680)}, "The region's prompt and the main prompt co"),
        ({"mask": torch.zeros(1, 8, 8)}, "The mask of a region must be white somewhere. Seen: 8 x"),
        ({"mask": torch.ones(2, 8, 8)}, "The mask of a region does not go with the number of pict"),
    )
    for inputs, sentence in calls:
        assert refusal(region, host, start, **inputs).startswith(sentence), inputs


def test_a_model_that_cannot_read_controls(host, models, foreign):
    from flux2_pack.nodes.host_controls import check_host_model

    steered, _ = applied(host, models[1], reference(host, strength=2.0))
    regional, stock = region(host, toy.conditioning(1)), toy.conditioning(1)
    check_host_model(foreign, stock, stock)
    check_host_model(foreign, applied(host, models[1], reference(host))[0])
    for positive, negative in ((steered, None), (stock, steered), (regional, stock)):
        check_host_model(models[0], positive, negative)
        said = refusal(check_host_model, foreign, positive, negative)
        assert said == (
            "This model cannot read the controls of FLUX.2 references and regions. Seen: controls "
            "of references, regions or a negative, and a model from the host's own loader. Load it with FLUX.2 "
            "Load Model or FLUX.2 Loader."
        )


def kv_model():
    """A MODEL whose weights are in the KV form."""
    return toy.ours(dataclasses.replace(toy.KLEIN, kv_references=True), toy.transformer(toy.KLEIN))


def cached(host, model, **settings):
    (made,) = host.call("Flux2KitReferenceCache", model=model, **settings)
    return made


def cache_of(model):
    return model.model_options.get("transformer_options", {}).get("flux2_kit_cache")


def test_the_cache_node(host, models):
    """Its settings arrive; the MODEL that came in is as it was; every execution has its own."""
    model = models[0]
    made = cached(
        host, model, mode="approximate", interval=3, guard=2, store="fp8", place="host memory"
    )
    cache = cache_of(made)
    assert (cache.mode, cache.interval, cache.guard) == ("approximate", 3, 2)
    assert (cache.store, cache.place) == ("fp8", "host")
    assert cache_of(model) is None and not model.wrappers.get("outer_sample")
    assert cache_of(cached(host, model, mode="approximate")) is not cache
    assert "flux2_kit_kv" not in made.model_options["transformer_options"]
    # A LoRA loader after it clones: the clone has a cache of its own, with the same settings.
    other = cache_of(made.clone())
    assert other is not cache and other.interval == 3 and other.place == "host"
    # One node after another: the last counts, and off takes it away.
    again = cached(host, made, mode="approximate", interval=7)
    assert cache_of(again).interval == 7
    assert len(again.get_all_wrappers("outer_sample")) == 1
    off = cached(host, again, mode="off")
    assert cache_of(off) is None and not off.get_all_wrappers("outer_sample")
    assert cache_of(off.clone()) is None and cache_of(again).interval == 7


def test_auto_follows_the_weights(host, models, caplog):
    assert cache_of(cached(host, kv_model())).mode == "exact"
    assert cache_of(cached(host, kv_model(), mode="exact")).mode == "exact"
    with caplog.at_level(logging.INFO):
        assert cache_of(cached(host, models[0])) is None
    assert "Reference cache: off, because this model's weights are not in the KV form." in (
        caplog.messages
    )


def test_nano_runs_in_the_kv_form_where_it_is_asked_for(host):
    (nano,) = host.call("Flux2KitModelLoader", model="nano (built in)")
    assert cache_of(cached(host, nano)) is None
    made = cached(host, nano, kv_form=True)
    assert (
        cache_of(made).mode == "exact" and made.model_options["transformer_options"]["flux2_kit_kv"]
    )
    plain = cached(host, nano, kv_form=True, mode="off")
    assert cache_of(plain) is None and plain.model_options["transformer_options"]["flux2_kit_kv"]
    assert "flux2_kit_kv" not in cached(host, plain).model_options["transformer_options"]


def test_caches_that_are_refused(host, models, foreign):
    from flux2_pack.nodes.host_controls import check_host_model

    said = refusal(cached, host, models[0], mode="exact")
    assert said.startswith("An exact reference cache needs a model in the KV form. Seen: a model")
    said = refusal(cached, host, models[0], kv_form=True)
    assert said.startswith("This model was not trained in the KV form. Seen: kv_form on. Switch")
    said = refusal(cached, host, foreign)
    assert said.startswith("This model cannot use the reference cache. Seen: a model from the host")
    theirs = foreign.clone()
    theirs.model_options["transformer_options"]["flux2_kit_cache"] = object()
    assert "Seen: a reference cache, and" in refusal(
        check_host_model, theirs, toy.conditioning(1), toy.conditioning(2)
    )


def test_our_sampler_and_guider_refuse_what_would_be_lost(host, models, foreign):
    """On the host's own MODEL; on ours the same inputs draw."""
    (latent,) = host.call("Flux2KitEmptyLatent", model=models[0], width=64, height=64)
    steered, _ = applied(host, models[1], reference(host, strength=2.0))
    for positive in (steered, region(host, toy.conditioning(1))):
        inputs = {"positive": positive, "latent": latent, "negative": toy.conditioning(2)}
        for node in ("Flux2KitSampler", "Flux2KitFlex"):
            said = refusal(host.call, node, model=foreign, steps=1, **inputs)
            assert said.startswith("This model cannot read the controls of FLUX.2 references")
        host.call("Flux2KitSampler", model=models[0], steps=1, **inputs)


@pytest.fixture
def watched(monkeypatch):
    """What the cache is told during runs: ("begin", run, weights), ("clear",), in order."""
    from flux2_pack.flux2_core.kv_cache import ReferenceCache

    told, begin, clear = [], ReferenceCache.begin, ReferenceCache.clear

    def on_begin(self, run, weights=None):
        told.append(("begin", run, weights))
        begin(self, run, weights)

    def on_clear(self):
        told.append(("clear", len(self._entries)))
        clear(self)

    monkeypatch.setattr(ReferenceCache, "begin", on_begin)
    monkeypatch.setattr(ReferenceCache, "clear", on_clear)
    return told


def test_a_run_begins_and_ends(host, watched, caplog):
    """Each with a name of its own; without `keep` nothing is left after it."""
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            made = cached(host, kv_model())
            toy.sampled(made)
    kinds = [kind for kind, *_ in watched]
    assert kinds == ["begin", "clear"] * 2
    assert watched[0][1] != watched[2][1] and watched[0][2] != watched[2][2]
    assert sum(line.startswith("Reference cache") for line in caplog.messages) == 2


def test_what_the_user_gets(host):
    """The same picture, from references that were computed once, under the host's sampler."""
    model = kv_model()
    plain = toy.sampled(model, steps=4)
    made = cached(host, model)
    assert toy.difference(toy.sampled(made, steps=4), plain) < 1e-5  # observed 3.1e-6
    kept = toy.sampled(cached(host, model, store="fp8"), steps=4)
    assert 1e-5 < toy.difference(kept, plain) < 0.02  # observed 2.3e-3


def test_nano_in_the_kv_form(host):
    """Another form draws another picture; within it the cache changes nothing."""
    (nano,) = host.call("Flux2KitModelLoader", model="nano (built in)")
    plain = toy.sampled(nano, cfg=1.0)
    form = toy.sampled(cached(host, nano, kv_form=True, mode="off"), cfg=1.0)
    assert toy.difference(form, plain) > 0.01  # observed 1.6
    exact = toy.sampled(cached(host, nano, kv_form=True), cfg=1.0)
    assert toy.difference(exact, form) < 1e-5  # observed 0


def test_keep_leaves_entries_for_the_next_run(host, watched):
    made = cached(host, kv_model(), keep=True)
    counts = []
    for _ in range(2):
        toy.sampled(made, prepare=lambda model: made)
        counts.append((cache_of(made).statistics.misses, cache_of(made).statistics.hits))
    assert counts == [(1, 1), (0, 2)]  # two steps a run
    assert [kind for kind, *_ in watched] == ["begin", "begin"]
    (_, first, weights), (_, second, same) = watched
    assert first != second and weights == same


def test_a_lora_is_other_weights(host, watched):
    import comfy.sd

    made = cached(host, kv_model())
    toy.sampled(made)
    lora = toy.lora(toy.transformer(toy.KLEIN))
    patched, _ = comfy.sd.load_lora_for_models(made, None, lora, 0.5, 0.0)
    toy.sampled(patched)
    begun = [weights for kind, *_, weights in watched if kind == "begin"]
    assert len(begun) == 2 and begun[0] != begun[1]


def test_a_prompt_with_weights_of_its_own(host):
    """A LoRA hooked to the positive prompt alone: neither prompt takes the other's keys."""
    import comfy.hooks
    import comfy.sample
    import comfy.samplers

    model = kv_model()
    hooks = comfy.hooks.create_hook_lora(toy.lora(toy.transformer(toy.KLEIN)), 1.0, 0.0)
    options = {"reference_latents": toy.latents(4, (8, 6), (4, 8))}
    positive, negative = (toy.conditioning(seed, **options) for seed in (1, 2))
    positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)

    def drawn(model, positive):
        noise = toy.latents(3, (8, 8))[0]
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model,
                noise,
                4.0,
                comfy.samplers.sampler_object("euler"),
                torch.linspace(1, 0, 3),
                positive,
                negative,
                torch.zeros_like(noise),
                disable_pbar=True,
                seed=1,
            )

    plain = drawn(model, positive)
    made = cached(host, model)
    assert toy.difference(drawn(made, positive), plain) < 1e-5  # observed 0
    assert cache_of(made).statistics.misses == 2
    assert toy.difference(drawn(model, toy.conditioning(1, **options)), plain) > 0.01


def test_a_run_that_fails_leaves_nothing(host, watched):
    made = cached(host, kv_model())

    def broken(*_):
        raise RuntimeError("stop")

    made.set_model_unet_function_wrapper(broken)
    with pytest.raises(RuntimeError, match="stop"):
        toy.sampled(made)
    assert [kind for kind, *_ in watched] == ["begin", "clear"]


def test_what_a_run_says_of_its_cache():
    from flux2_pack.flux2_core.kv_cache import ReferenceCache, Statistics
    from flux2_pack.nodes.host_cache import report

    cache = ReferenceCache("approximate", place="host")
    assert report(cache) == "Reference cache: this run had nothing to keep."
    cache.statistics = Statistics(hits=6, misses=2, recorded=2, drift=0.0213)
    assert report(cache) == (
        "Reference cache (approximate): references computed 2 times, taken from the cache 6 times, "
        "0.0 MiB in host memory, changed by at most 2.1% between refreshes."
    )
