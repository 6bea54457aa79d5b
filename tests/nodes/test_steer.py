"""Controls at work in the host: our MODEL under our sampler and the host's, against the core alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.references import active, on_grid
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.schedule import share
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.transformer import Flux2Transformer, SingleBlock
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
CLOSE = 1e-4  # observed at most 2.2e-6: float32, three steps of Euler
SIZE, SHAPES, TEXT = (6, 8), ((4, 6), (5, 3)), 512
STOCK = {"strength": 1.0, "start": 0.0, "end": 1.0, "keep": None, "region": None, "name": ""}
LEFT = torch.zeros(48, 64)
LEFT[:, :30] = 1  # not on a patch's edge: soft there
KEEP = torch.arange(24).reshape(4, 6) % 3 > 0


def kit(*entries, regions=(), isolate=False):
    return {
        "version": 1,
        "references": [STOCK | entry for entry in entries],
        "regions": list(regions),
        "isolate": isolate,
    }


def region(seed, mask, base):
    (((text, _),)) = toy.conditioning(seed, 9)
    return {"context": text, "region": mask, "base": base}


KITS = {
    "strengths": kit({"strength": 0.4}, {"strength": 2.5}),
    "one off": kit({"strength": 0.0}, {}),
    "steps": kit({"end": 0.5}, {"start": 0.3}),
    "mask": kit({"keep": KEEP}, {}),
    "region": kit({"region": LEFT}, {"region": 1 - LEFT}),
    "prompts": kit(
        {"region": LEFT},
        {},
        regions=(region(5, LEFT, 0.25), region(6, 1 - LEFT, 0.0)),
        isolate=True,
    ),
}


@pytest.fixture(scope="module")
def state(host):
    return toy.transformer(toy.KLEIN, 1)


@pytest.fixture(scope="module")
def model(state):
    from flux2_pack.flux2_core.configs import VARIANTS

    return toy.ours(toy.KLEIN, state, VARIANTS["klein-base-4b"])


def noise(batch=1):
    return torch.randn(batch, 128, *SIZE, generator=torch.Generator().manual_seed(3))


def references():
    return toy.latents(4, *SHAPES)


def prompt(seed, steer=None, **options):
    options = {"reference_latents": references(), **options}
    return toy.conditioning(seed, **options, **({"flux2_kit": steer} if steer else {}))


def in_host(model, positive, negative=None, cfg=1.0, steps=3, x=None, sigmas=None, name="euler"):
    """Latents from the host's own sampling call."""
    import comfy.sample
    import comfy.samplers

    x = noise() if x is None else x
    sigmas = torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model.clone(),
            x,
            cfg,
            comfy.samplers.sampler_object(name),
            sigmas,
            positive,
            negative or positive,
            torch.zeros_like(x),
            disable_pbar=True,
            seed=1,
        )


def padded(text):
    return F.pad(text, (0, 0, TEXT - text.shape[1], 0))


def in_core(state, positive, steer, negative=None, cfg=1.0, steps=3, x=None, sigmas=None):
    """The same by flux2_core alone."""
    network = Flux2Transformer(toy.KLEIN).requires_grad_(False)
    network.load_state_dict(state)
    sigmas = torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas

    def at(sigma):
        behind = share(sigmas, sigma)
        entries = tuple(
            ReferenceControl(
                e["strength"],
                active(e["start"], e["end"], behind),
                e["keep"],
                None if e["region"] is None else on_grid(e["region"], SIZE),
            )
            for e in steer["references"]
        )
        regions = tuple(
            RegionPrompt(padded(r["context"]), on_grid(r["region"], SIZE), r["base"])
            for r in steer["regions"]
        )
        return Controls(references=entries, regions=regions, isolate=steer["isolate"])

    field = velocity(
        network,
        padded(positive[0][0]),
        negative=None if negative is None else padded(negative[0][0]),
        scale=cfg,
        references=references(),
        controls=at,
    )
    with torch.inference_mode():
        return denoise(field, noise() if x is None else x, sigmas)


@pytest.mark.parametrize("name", KITS)
def test_under_the_hosts_sampler(model, state, name):
    ours = in_host(model, prompt(1, KITS[name]))
    assert toy.difference(ours, in_core(state, prompt(1), KITS[name])) < CLOSE
    assert toy.difference(ours, in_host(model, prompt(1))) > 0.01


@pytest.mark.parametrize("name", ["strengths", "steps", "prompts"])
def test_with_a_negative(model, state, name):
    """Region prompts belong to the positive alone; the negative has the references' controls."""
    bare = KITS[name] | {"regions": [], "isolate": False}
    ours = in_host(model, prompt(1, KITS[name]), prompt(2, bare), cfg=3.0)
    wanted = in_core(state, prompt(1), KITS[name], prompt(2), 3.0)
    assert toy.difference(ours, wanted) < CLOSE


def test_under_our_sampler(model, state):
    from flux2_pack.nodes import host_sampling

    for name in ("strengths", "steps", "prompts"):
        guider = host_sampling.guider(model, prompt(1, KITS[name]), prompt(2, KITS[name]), 1.0)
        sigmas = torch.linspace(1, 0, 4)
        with torch.inference_mode():
            out = host_sampling.sample(guider, sigmas, {"samples": torch.zeros(1, 128, *SIZE)}, 7)
        x = host_sampling.noise(7, torch.zeros(1, 128, *SIZE))
        wanted = in_core(state, prompt(1), KITS[name], x=x)
        assert toy.difference(out["samples"], wanted) < CLOSE


def test_a_range_is_a_share_of_the_run_that_is_made(model, state):
    """Fewer steps, and the end of a schedule alone: shares count the steps that are run."""
    for sigmas in (torch.linspace(1, 0, 6), torch.linspace(0.6, 0, 3)):
        ours = in_host(model, prompt(1, KITS["steps"]), sigmas=sigmas, x=noise() * sigmas[0])
        # the host scales the noise that it is given by the first sigma
        x = noise() * sigmas[0] * sigmas[0]
        wanted = in_core(state, prompt(1), KITS["steps"], sigmas=sigmas, x=x)
        assert toy.difference(ours, wanted) < CLOSE


def rows(monkeypatch):
    """The lengths of the sequence in every single block that runs."""
    seen, stock = [], SingleBlock.forward
    spy = lambda self, x, *a, **k: seen.append(x.shape[1]) or stock(self, x, *a, **k)  # noqa: E731
    monkeypatch.setattr(SingleBlock, "forward", spy)
    return seen


def test_steps_without_a_reference_have_none_of_its_rows(model, monkeypatch):
    seen = rows(monkeypatch)
    in_host(model, prompt(1, kit({"end": 0.5}, {"start": 0.5})), steps=4)
    a, b = (h * w for h, w in SHAPES)
    blocks, base = toy.KLEIN.single_blocks, TEXT + 48
    assert seen == [base + a] * 2 * blocks + [base + b] * 2 * blocks


def test_prompts_of_different_controls_are_not_drawn_in_one_call(model, monkeypatch):
    import comfy.model_base as base

    batches, stock = [], base.BaseModel.apply_model
    spy = lambda self, x, *a, **k: batches.append(len(x)) or stock(self, x, *a, **k)  # noqa: E731
    monkeypatch.setattr(base.BaseModel, "apply_model", spy)
    same = KITS["strengths"], kit({"strength": 0.4}, {"strength": 2.5})
    in_host(model, prompt(1, same[0]), prompt(2, same[1]), cfg=2.0, steps=1)
    assert batches == [2]
    batches.clear()
    in_host(model, prompt(1, same[0]), prompt(2, KITS["mask"]), cfg=2.0, steps=1)
    assert batches == [1, 1]


def test_a_picture_for_each_latent(model):
    """Latent i sees picture i of the reference, as it would alone."""
    pictures = torch.cat(toy.latents(9, (4, 4), (4, 4)))
    steer = kit({"strength": 0.5})
    both = in_host(model, prompt(1, steer, reference_latents=[pictures]), x=noise(2))
    for i in range(2):
        alone = prompt(1, steer, reference_latents=[pictures[i : i + 1]])
        assert toy.difference(both[i : i + 1], in_host(model, alone, x=noise(2)[i : i + 1])) < CLOSE
    with pytest.raises(Flux2Error, match="Reference 1 holds 2 pictures"):
        in_host(model, prompt(1, steer, reference_latents=[pictures]), x=noise(3))


def test_control_networks_reach_the_right_tokens(model):
    """A region reorders the picture's rows inside; what is added after a block follows."""
    net, t, text = model.model.diffusion_model, torch.tensor([0.5]), torch.randn(1, 32, 384)
    steer = kit({"region": LEFT})
    how = {"ref_latents": references()[:1], "transformer_options": {}}
    with torch.inference_mode():
        same = net(noise(), t, text, flux2_kit=steer, **how)
        none = {"input": [torch.zeros(1, 48, 256)] * 2, "output": [torch.zeros(1, 48, 256)] * 3}
        assert torch.equal(net(noise(), t, text, flux2_kit=steer, control=none, **how), same)
        # added to one token after the last block, it shows in that token alone
        added = torch.zeros(1, 48, 256)
        added[:, 13] = 5
        last = {"output": [None] * (toy.KLEIN.single_blocks - 1) + [added]}
        out = net(noise(), t, text, flux2_kit=steer, control=last, **how)
    changed = (out != same).any(1).flatten(1)[0]
    assert changed.nonzero().flatten().tolist() == [13]


@pytest.mark.parametrize("what", ["mask", "sequence"])
def test_what_controls_cannot_be_combined_with(model, what):
    net, t, text = model.model.diffusion_model, torch.tensor([0.5]), torch.randn(1, 32, 384)
    how = {"ref_latents": references(), "flux2_kit": KITS["mask"]}
    if what == "mask":
        how |= {"attention_mask": torch.zeros(1, 1), "transformer_options": {}}
    else:
        how |= {"transformer_options": {"patches": {"post_input": [lambda state: state]}}}
    with pytest.raises(Flux2Error, match=r"cannot (be combined|follow)|which controlled"):
        net(noise(), t, text, **how)


def nag(model):
    """The host's NAGuidance on a clone, where the host has it."""
    module = pytest.importorskip("comfy_extras.nodes_nag", reason="this ComfyUI has no NAGuidance")
    return module.NAGuidance.execute(model, 2.0, 0.5, 1.5)[0]


def test_the_hosts_nag_beside_controls(model):
    """It works on the picture's rows after each attention, wherever they stand."""
    guided = nag(model)
    steer = KITS["strengths"]
    one = in_host(guided, prompt(1, steer), prompt(2, steer), cfg=2.0)
    assert torch.isfinite(one).all()
    assert toy.difference(one, in_host(model, prompt(1, steer), prompt(2, steer), cfg=2.0)) > 1e-3
    stock = in_host(guided, prompt(1, kit({}, {})), prompt(2, kit({}, {})), cfg=2.0)
    assert torch.equal(stock, in_host(guided, prompt(1), prompt(2), cfg=2.0))


def upstream_cache(model):
    """The host's FluxKVCache on a clone, where the host has it."""
    import comfy_extras.nodes_flux as flux

    node = getattr(flux, "FluxKVCache", None) or pytest.skip("this ComfyUI has no FluxKVCache")
    return node.execute(model)[0]


@pytest.fixture(scope="module")
def kv_model(state):
    return toy.ours(replace(toy.KLEIN, kv_references=True), state)


def our_cache(model):
    from flux2_pack.flux2_core.kv_cache import ReferenceCache
    from flux2_pack.nodes import host_cache

    return host_cache.with_cache(model, ReferenceCache("exact"), kv=True)


def test_the_hosts_cache_refuses_controls(kv_model):
    with pytest.raises(Flux2Error, match="which controlled references cannot follow"):
        in_host(upstream_cache(kv_model), prompt(1, KITS["strengths"]))


@pytest.mark.parametrize("cfg, other", [(1.0, 24), (3.0, 24), (3.0, 600)])
def test_ours_is_exact_where_the_hosts_is_not(host, state, cfg, other):
    """Upstream computes the first step without isolation, and mixes up prompts of two lengths.

    Three rows: one prompt; two in one call; two in two calls.
    """
    stock, kv = toy.native(state), toy.ours(replace(toy.KLEIN, kv_references=True), state)
    negative = toy.conditioning(2, other, reference_latents=references())
    plain = in_host(kv, prompt(1), negative, cfg)
    ours = in_host(our_cache(kv), prompt(1), negative, cfg)
    assert toy.difference(ours, plain) < 1e-5  # observed 2.2e-6
    theirs = in_host(upstream_cache(stock), prompt(1), negative, cfg)
    assert toy.difference(theirs, plain) > 1e-3


def test_ours_works_for_a_batch_on_dev(host):
    """There the host's own dies: its time has two rows a picture, its guidance one."""
    dev = replace(toy.DEV, kv_references=True)
    model = toy.ours(dev, toy.transformer(toy.DEV))
    positive = prompt(1, guidance=4.0)
    plain = in_host(model, positive, x=noise(2))
    assert (
        toy.difference(in_host(our_cache(model), positive, x=noise(2)), plain) < 1e-5
    )  # observed 8.3e-7
