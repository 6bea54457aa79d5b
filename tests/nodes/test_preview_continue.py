"""Preview, continue and state files in the host: the run without a pause, bit for bit."""

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.solvers import SOLVERS
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host
SIZE = 96


@pytest.fixture(scope="module")
def graph(host):
    toy.write_models(host.models)
    toy.add_nodes(host)
    with toy.heads_from_width():
        yield host


def parts(solver="euler", guidance=2.5, batch=1, start=0.0, latent="", **flex) -> dict:
    """Two references, true guidance, a range of steps for one of them: all that a run may have."""
    return {
        "model": node("Flux2KitModelLoader", model="toy-klein.safetensors", variant="auto"),
        "vae": node("Flux2KitVAELoader", vae="toy-vae.safetensors"),
        "prompt": node("ToyPrompt", number=1),
        "other": node("ToyPrompt", number=2),
        "third": node("ToyPrompt", number=3),
        "picture": node("ToyImage", number=3, width=64, height=64),
        "canvas": node("ToyImage", number=5, width=SIZE, height=SIZE),
        "chain": node(
            "Flux2KitReference", image=["picture", 0], name="", strength=0.7, start=0.25, end=1.0,
            megapixels=0.0, importance=1.0,
        ),
        "apply": node(
            "Flux2KitApplyReferences", vae=["vae", 0], positive=["prompt", 0],
            negative=["other", 0], references=["chain", 0],
        ),
        "empty": node("EmptyFlux2LatentImage", width=SIZE, height=SIZE, batch_size=batch),
        "encode": node("Flux2KitVAEEncode", image=["canvas", 0], vae=["vae", 0]),
        "mask": node("ImageToMask", image=["canvas", 0], channel="red"),
        "masked": node("SetLatentNoiseMask", samples=["encode", 0], mask=["mask", 0]),
        "flex": node(
            "Flux2KitFlex", model=["model", 0], positive=["apply", 0], negative=["apply", 1],
            latent=["empty", 0], steps=4, guidance=guidance, start=start, measure=False, **flex,
        ),
        "solver": node("Flux2KitSolver", solver=solver, eta=1.0),
        "noise": node("RandomNoise", noise_seed=7),
    }  # fmt: skip


def latent_of(start=0.0, latent="", **_) -> list:
    return [latent or ("encode" if start else "empty"), 0]


def whole(graph, **how) -> torch.Tensor:
    prompt = parts(**how)
    prompt["sample"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["flex", 0], sampler=["solver", 0],
        sigmas=["flex", 1], latent_image=latent_of(**how),
    )  # fmt: skip
    return graph.run(prompt, {"latent": ("sample", 0)}).kept["latent"]["samples"]


def paused(steps: int, **how) -> dict:
    prompt = parts(**how)
    prompt["preview"] = node(
        "Flux2KitPreview", guider=["flex", 0], sigmas=["flex", 1], sampler=["solver", 0],
        latent=latent_of(**how), seed=7, steps=steps,
    )  # fmt: skip
    prompt["continue"] = node(
        "Flux2KitContinue", state=["preview", 0], guider=["flex", 0], strength=0.0, steps=0
    )
    return prompt


@pytest.mark.parametrize(
    ("solver", "steps"), [*((name, 2) for name in SOLVERS), ("unipc", 1), ("unipc", 3)]
)
def test_the_run_without_a_pause_bit_for_bit(graph, solver, steps):
    """With references, a range of steps, and true guidance."""
    kept = graph.run(paused(steps, solver=solver), {"latent": ("continue", 0)}).kept
    assert torch.equal(kept["latent"]["samples"], whole(graph, solver=solver))


HOWS = (
    {"start": 0.5},
    {"start": 0.25, "latent": "masked"},
    {"latent": "masked"},
    {"end": 0.75},  # noise is left, and the host scales what it gives out
    {"course": "ramp down"},
    {"guidance": 1.0},
)


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("solver", ["unipc", "sde"])
def test_pictures_masks_curves_and_no_guidance(graph, solver, how):
    kept = graph.run(paused(2, solver=solver, **how), {"latent": ("continue", 0)}).kept
    assert torch.equal(kept["latent"]["samples"], whole(graph, solver=solver, **how))


def test_euler_is_the_hosts_bit_for_bit(graph):
    ours = whole(graph)
    prompt = parts()
    prompt["solver"] = node("KSamplerSelect", sampler_name="euler")
    prompt["sample"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["flex", 0], sampler=["solver", 0],
        sigmas=["flex", 1], latent_image=["empty", 0],
    )  # fmt: skip
    theirs = graph.run(prompt, {"latent": ("sample", 0)}).kept["latent"]["samples"]
    assert torch.equal(ours, theirs)


def on_the_hosts_model(prompt: dict) -> dict:
    """Without controls, which a host's model does not read."""
    prompt["model"] = node("UNETLoader", unet_name="toy-klein.safetensors", weight_dtype="default")
    prompt["flex"]["inputs"] |= {"positive": ["prompt", 0], "negative": ["other", 0]}
    return prompt


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_hosts_own_model(graph, solver):
    """Our guider, sigmas and sampler drive it, with a pause and without."""
    prompt = on_the_hosts_model(paused(2, solver=solver))
    prompt["sample"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["flex", 0], sampler=["solver", 0],
        sigmas=["flex", 1], latent_image=["empty", 0],
    )  # fmt: skip
    kept = graph.run(prompt, {"whole": ("sample", 0), "latent": ("continue", 0)}).kept
    assert torch.equal(kept["latent"]["samples"], kept["whole"]["samples"])
    prompt["model"] = parts()["model"]
    ours = graph.run(prompt, {"whole": ("sample", 0)}).kept["whole"]["samples"]
    assert toy.difference(ours, kept["whole"]["samples"]) < 1e-4  # observed at most 6.1e-6


def test_every_picture_of_a_batch(graph):
    kept = graph.run(paused(2, solver="sde", batch=2), {"latent": ("continue", 0)}).kept
    prompt = parts(solver="sde", batch=2)
    prompt["sample"] = node(
        "Flux2KitSampler", model=["model", 0], positive=["apply", 0], negative=["apply", 1],
        latent=["empty", 0], steps=4, guidance=2.5, seed=7, denoise=1.0, solver="sde", eta=1.0,
    )  # fmt: skip
    wanted = graph.run(prompt, {"latent": ("sample", 0)}).kept["latent"]["samples"]
    assert torch.equal(kept["latent"]["samples"], wanted)
    assert not torch.equal(wanted[0], wanted[1])


def test_the_preview_is_the_clean_estimate(graph):
    """Nearer to the finished picture than the noise that the run still holds."""
    kept = graph.run(
        paused(3), {"seen": ("preview", 1), "state": ("preview", 0), "latent": ("continue", 0)}
    ).kept
    done, state = kept["latent"]["samples"], kept["state"]
    assert (kept["seen"]["samples"] - done).norm() < (state.x - done).norm()
    assert state.step == 3


def test_other_conditions_for_the_rest(graph):
    prompt = paused(2)
    prompt["later"] = {**prompt["flex"], "inputs": prompt["flex"]["inputs"] | {"guidance": 5.0}}
    prompt["continue"]["inputs"]["guider"] = ["later", 0]
    got = graph.run(prompt, {"latent": ("continue", 0)}).kept["latent"]["samples"]
    assert toy.difference(got, whole(graph)) > 1e-3
    assert toy.difference(got, whole(graph, guidance=5.0)) > 1e-3


def test_in_three_parts_and_with_strength(graph):
    prompt = paused(1, solver="unipc")
    prompt["continue"]["inputs"]["steps"] = 2
    prompt["last"] = node(
        "Flux2KitContinue", state=["continue", 1], guider=["flex", 0], strength=0.0, steps=0
    )
    got = graph.run(prompt, {"latent": ("last", 0)}).kept["latent"]["samples"]
    assert torch.equal(got, whole(graph, solver="unipc"))
    prompt["last"]["inputs"]["strength"] = 0.5
    again = graph.run(prompt, {"latent": ("last", 0)}).kept["latent"]["samples"]
    assert toy.difference(again, got) > 1e-3
    prompt["last"]["inputs"]["strength"] = 1.0
    anew = graph.run(prompt, {"latent": ("last", 0)}).kept["latent"]["samples"]
    assert toy.difference(anew, got) > 0.1


def test_what_a_latent_carries_goes_on(graph):
    """The mask of an inpainted window, and where the window belongs."""
    state = graph.run(paused(2, latent="masked"), {"state": ("preview", 0)}).kept["state"]
    guider = graph.run(parts(), {"guider": ("flex", 0)}).kept["guider"]
    latent = {"samples": state.latent, "noise_mask": state.mask, "flux2_kit_place": "here"}
    sigmas = state.sigmas
    seen, shown = graph.call("Flux2KitPreview", guider=guider, sigmas=sigmas, latent=latent)
    done, _ = graph.call("Flux2KitContinue", state=seen, guider=guider)
    for made in (shown, done):
        assert made["flux2_kit_place"] == "here" and made["noise_mask"] is state.mask


def test_a_dropped_memory_is_said(graph, caplog):
    caplog.set_level("INFO")
    prompt = paused(2, solver="unipc")
    graph.run(prompt, {"latent": ("continue", 0)})
    assert "is dropped" not in caplog.text
    prompt["other solver"] = node("Flux2KitSolver", solver="dpmpp_2m", eta=1.0)
    prompt["continue"]["inputs"]["sampler"] = ["other solver", 0]
    graph.run(prompt, {"latent": ("continue", 0)})
    assert "what unipc remembers is dropped" in caplog.text


@pytest.mark.parametrize("solver", ["euler", "unipc", "sde"])
def test_through_a_file(graph, solver):
    prompt = paused(2, solver=solver)
    prompt["save"] = node("Flux2KitSaveState", state=["preview", 0], name=f"runs/{solver}")
    name = graph.run(prompt, {"name": ("save", 0)}).kept["name"]
    again = parts(solver=solver)
    again["load"] = node("Flux2KitLoadState", name=name)
    again["continue"] = node(
        "Flux2KitContinue", state=["load", 0], guider=["flex", 0], strength=0.0, steps=0
    )
    kept = graph.run(again, {"latent": ("continue", 0), "about": ("load", 1)}).kept
    assert torch.equal(kept["latent"]["samples"], whole(graph, solver=solver))
    assert f"96 x 96: 2 of 4 steps done with {solver}, seed 7" in kept["about"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "", "a/../../b.safetensors", "link/x.safetensors"],
)
def test_names_that_lead_elsewhere(graph, name, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    link = graph.output / "link"
    if not link.exists():
        link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(Flux2Error, match=r"output and input folders only|no such paused run"):
        graph.call("Flux2KitLoadState", name=name)


def test_a_run_of_another_model(graph):
    state = graph.run(paused(2), {"state": ("preview", 0)}).kept["state"]
    prompt = parts()
    prompt["model"] = node("Flux2KitModelLoader", model="toy-dev.safetensors", variant="auto")
    guider = graph.run(prompt, {"guider": ("flex", 0)}).kept["guider"]
    with pytest.raises(Flux2Error, match="Another model began this run"):
        graph.call("Flux2KitContinue", state=state, guider=guider)


def test_sentences(graph):
    prompt = paused(4)
    with pytest.raises(Exception, match="This run is finished"):
        graph.run(prompt, {"latent": ("continue", 0)})
    prompt = paused(2)
    prompt["solver"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    with pytest.raises(Exception, match="cannot be paused"):
        graph.run(prompt, {"latent": ("preview", 1)})
