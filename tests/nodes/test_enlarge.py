"""FLUX.2 Noise and FLUX.2 Enlarge in the host: seeds, batches, and a draft finished at full size."""

import pytest
import torch

from flux2_pack.flux2_core import enlarge, latents, noise
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.transformer import Flux2Transformer
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host
CLOSE = 1e-4
SIZE = 64


@pytest.fixture(scope="module")
def graph(host):
    toy.write_models(host.models)
    toy.add_nodes(host)
    with toy.heads_from_width():
        yield host


def drawn(batch=1, **of_noise) -> dict:
    """A draft by Sampler Custom Advanced, with FLUX.2 Noise or, without its values, the host's."""
    stock = node("RandomNoise", noise_seed=7)
    return {
        "model": node("Flux2KitModelLoader", model="toy-dev.safetensors", variant="auto"),
        "prompt": node("ToyPrompt", number=1),
        "empty": node("EmptyFlux2LatentImage", width=SIZE, height=SIZE, batch_size=batch),
        "noise": node("Flux2KitNoise", **of_noise) if of_noise else stock,
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "flex": node(
            "Flux2KitFlex", model=["model", 0], positive=["prompt", 0], latent=["empty", 0],
            steps=2, guidance=3.0, measure=False,
        ),
        "sample": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["flex", 0], sampler=["euler", 0],
            sigmas=["flex", 1], latent_image=["empty", 0],
        ),
    }  # fmt: skip


def samples(graph, prompt, name="sample") -> torch.Tensor:
    return graph.run(prompt, {"latent": (name, 0)}).kept["latent"]["samples"]


def of(seed, other=0, amount=0.0, keep=False) -> dict:
    return {
        "seed": seed, "variation_seed": other, "variation": amount, "keep_composition": keep
    }  # fmt: skip


def test_the_usual_noise_is_the_hosts_bit_for_bit(graph):
    stock = samples(graph, drawn())
    assert torch.equal(samples(graph, drawn(**of(7, other=9))), stock)
    assert torch.equal(samples(graph, drawn(**of(3, other=7, amount=1.0))), stock)
    assert not torch.equal(samples(graph, drawn(**of(7, keep=True))), stock)


@pytest.mark.parametrize("how", [{}, {"keep": True}, {"other": 40, "amount": 0.3, "keep": True}])
def test_a_batch_is_its_single_runs(graph, how):
    """The noise bit for bit, the pictures closely; each picture has its own variation seed."""
    maker = graph.call("Flux2KitNoise", **of(7, **how))[0]
    both = maker.generate_noise({"samples": torch.zeros(3, 128, 4, 4)})
    batch = samples(graph, drawn(batch=3, **of(7, **how)))
    for i in range(3):
        own = {**how, "other": how["other"] + i} if "other" in how else how
        single = graph.call("Flux2KitNoise", **of(7 + i, **own))[0]
        alone = single.generate_noise({"samples": torch.zeros(1, 128, 4, 4)})
        assert torch.equal(both[i : i + 1], alone)
        assert toy.difference(batch[i : i + 1], samples(graph, drawn(**of(7 + i, **own)))) < CLOSE


def finished(scale=2.0, change=0.5, steps=2) -> dict:
    prompt = drawn(**of(7, keep=True))
    prompt["vae"] = node("Flux2KitVAELoader", vae="toy-vae.safetensors")
    prompt["enlarge"] = node(
        "Flux2KitEnlarge", model=["model", 0], latent=["sample", 0], vae=["vae", 0], scale=scale,
        change=change, steps=steps,
    )  # fmt: skip
    prompt["finish"] = node(
        "SamplerCustomAdvanced", noise=["noise", 0], guider=["flex", 0], sampler=["euler", 0],
        sigmas=["enlarge", 1], latent_image=["enlarge", 0],
    )  # fmt: skip
    return prompt


@pytest.mark.parametrize("change", [0.5, 1.0])
def test_a_finish_is_the_noised_draft_drawn_to_the_end(graph, change):
    keep = {"clean": ("enlarge", 0), "sigmas": ("enlarge", 1), "done": ("finish", 0)}
    made = graph.run(finished(change=change), keep | {"prompt": ("prompt", 0)}).kept
    clean, sigmas = made["clean"]["samples"], made["sigmas"]
    assert clean.shape == (1, 128, 8, 8)
    start = enlarge.start_of(change, 2.0)
    assert torch.equal(sigmas, enlarge.sigmas(2, start, width=2 * SIZE, height=2 * SIZE))
    core = Flux2Transformer(toy.DEV).eval()
    core.load_state_dict(toy.transformer(toy.DEV))
    rows = made["prompt"][0][0]
    rows = torch.nn.functional.pad(rows, (0, 0, 512 - rows.shape[1], 0))
    own = noise.composed(7, width=2 * SIZE, height=2 * SIZE)
    with torch.inference_mode():
        x = torch.lerp(clean, own, float(sigmas[0]))
        wanted = denoise(velocity(core, rows, embedded=3.0), x, sigmas)
    assert toy.difference(made["done"]["samples"], wanted) < CLOSE
    usual = latents.noise(7, width=2 * SIZE, height=2 * SIZE)
    with torch.inference_mode():
        x = torch.lerp(clean, usual, float(sigmas[0]))
        other = denoise(velocity(core, rows, embedded=3.0), x, sigmas)
    assert toy.difference(other, wanted) > 0.1


def test_same_size_and_no_change_is_the_draft(graph):
    keep = {"draft": ("sample", 0), "sigmas": ("enlarge", 1), "done": ("finish", 0)}
    made = graph.run(finished(scale=1.0, change=0.0), keep).kept
    assert len(made["sigmas"]) == 0
    assert torch.equal(made["done"]["samples"], made["draft"]["samples"])


def test_no_change_is_the_draft_enlarged(graph):
    keep = {"clean": ("enlarge", 0), "done": ("finish", 0), "draft": ("sample", 0)}
    keep["vae"] = ("vae", 0)
    made = graph.run(finished(change=0.0), keep).kept
    pictures = enlarge.resize(made["vae"].decode(made["draft"]["samples"]), 2 * SIZE, 2 * SIZE)
    wanted = made["vae"].encode(pictures)
    assert toy.difference(made["done"]["samples"], wanted) < CLOSE
    assert torch.equal(made["done"]["samples"], made["clean"]["samples"])


def test_an_empty_latent_is_no_draft(graph):
    prompt = finished()
    prompt["enlarge"]["inputs"]["latent"] = ["empty", 0]
    with pytest.raises(Exception, match="no draft to enlarge"):
        samples(graph, prompt, "finish")
