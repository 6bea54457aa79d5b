"""FLUX.2 Negative in the host: under our sampler and the host's, against the core alone."""

import pytest
import torch

from flux2_pack.flux2_core import latents, schedule
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.negatives import Negative
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.schedule import share
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.transformer import Flux2Transformer
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host
CLOSE = 1e-4
SIZE = 96
HOW = {"scale": 3.0, "tau": 1.5, "alpha": 0.6}


@pytest.fixture(scope="module")
def graph(host):
    toy.write_models(host.models)
    toy.add_nodes(host)
    with toy.heads_from_width():
        yield host


def prompt_graph(sampler="Flux2KitSampler", guidance=1.0, batch=1, **how) -> dict:
    prompt = {
        "model": node("Flux2KitModelLoader", model="toy-klein.safetensors", variant="auto"),
        "prompt": node("ToyPrompt", number=1),
        "away": node("ToyPrompt", number=3),
        "other": node("ToyPrompt", number=2),
        "empty": node("EmptyFlux2LatentImage", width=SIZE, height=SIZE, batch_size=batch),
        "negative": node(
            "Flux2KitNegative",
            positive=["prompt", 0],
            negative=["away", 0],
            **(HOW | {"start": 0.0, "end": 1.0} | how),
        ),
    }
    if sampler == "Flux2KitSampler":
        prompt["sample"] = node(
            sampler, model=["model", 0], positive=["negative", 0], negative=["other", 0],
            latent=["empty", 0], steps=4, guidance=guidance, seed=7, denoise=1.0,
        )  # fmt: skip
        return prompt
    prompt |= {
        "guider": node(
            "CFGGuider", model=["model", 0], positive=["negative", 0], negative=["other", 0],
            cfg=guidance,
        ),
        "noise": node("RandomNoise", noise_seed=7),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("Flux2Scheduler", steps=4, width=SIZE, height=SIZE),
        "sample": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0],
            sigmas=["sigmas", 0], latent_image=["empty", 0],
        ),
    }  # fmt: skip
    return prompt


def drawn(graph, prompt):
    return graph.run(prompt, {"latent": ("sample", 0)}).kept["latent"]["samples"]


def text(number: int) -> torch.Tensor:
    ((rows, _),) = toy.conditioning(number, 20 + number)
    return torch.nn.functional.pad(rows, (0, 0, 512 - rows.shape[1], 0))


def core(start=0.0, end=1.0, batch=1, **how):
    model = Flux2Transformer(toy.KLEIN).eval()
    model.load_state_dict(toy.transformer(toy.KLEIN, 1))
    sigmas = schedule.sigmas(4, width=SIZE, height=SIZE)
    away = Controls(negative=Negative(text(3), **HOW))

    def steer(sigma):
        return away if start <= share(sigmas, sigma) < end else Controls()

    x = latents.noise(7, width=SIZE, height=SIZE, batch=batch)
    with torch.inference_mode():
        return denoise(velocity(model, text(1), controls=steer, **how), x, sigmas)


@pytest.mark.parametrize("sampler", ["Flux2KitSampler", "CFGGuider"])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.25, 0.75)])
def test_as_the_core(graph, sampler, window):
    start, end = window
    got = drawn(graph, prompt_graph(sampler, start=start, end=end))
    assert toy.difference(got, core(start, end)) < CLOSE  # seen 1.7e-6


@pytest.mark.parametrize("sampler", ["Flux2KitSampler", "CFGGuider"])
def test_with_true_guidance_and_a_batch(graph, sampler):
    if sampler == "CFGGuider":
        got, wanted = drawn(graph, prompt_graph(sampler, 2.5)), {"batch": 1}
    else:
        got, wanted = drawn(graph, prompt_graph(sampler, 2.5, batch=2)), {"batch": 2}
    out = core(negative=text(2), scale=2.5, **wanted)
    assert toy.difference(got, out) < CLOSE  # seen 2.8e-6


@pytest.mark.parametrize("how", [{"scale": 1.0}, {"alpha": 0.0}])
def test_identity_is_the_prompt_alone_bit_for_bit(graph, how):
    prompt = prompt_graph(**how)
    alone = prompt_graph()
    alone["sample"]["inputs"]["positive"] = ["prompt", 0]
    assert torch.equal(drawn(graph, prompt), drawn(graph, alone))
    kept = graph.run(prompt, {"positive": ("negative", 0)}).kept["positive"]
    assert "flux2_kit" not in kept[0][1]


def test_the_hosts_own_model_refuses_it(graph):
    prompt = prompt_graph()
    prompt["model"] = node("UNETLoader", unet_name="toy-klein.safetensors", weight_dtype="default")
    with pytest.raises(Exception, match="cannot read the controls"):
        drawn(graph, prompt)


def test_sentences(graph):
    positive, other = toy.conditioning(1), toy.conditioning(2, width=100)
    with pytest.raises(Flux2Error, match="another text encoder"):
        graph.call("Flux2KitNegative", positive=positive, negative=other)
    with pytest.raises(Flux2Error, match="several are connected"):
        graph.call("Flux2KitNegative", positive=positive, negative=positive * 2)
    with pytest.raises(Flux2Error, match="never acts"):
        graph.call("Flux2KitNegative", positive=positive, negative=positive, start=0.5, end=0.5)
