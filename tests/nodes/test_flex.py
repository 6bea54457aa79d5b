"""Steps & Guidance in the host: curves of guidance, spacings, what it says, and the host's MODEL."""

import pytest
import torch

from flux2_pack.flux2_core import latents, schedule
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import Course, velocity
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.transformer import Flux2Transformer
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host
CLOSE = 1e-4
SIZE = 96


@pytest.fixture(scope="module")
def graph(host):
    toy.write_models(host.models)
    toy.add_nodes(host)
    with toy.heads_from_width():
        yield host


def prompt_graph(file="toy-dev.safetensors", native=False, **flex) -> dict:
    """Flex and Sampler Custom Advanced, with or without the host's own MODEL."""
    loaded = (
        node("UNETLoader", unet_name=file, weight_dtype="default")
        if native
        else node("Flux2KitModelLoader", model=file, variant="auto")
    )
    flex = {"steps": 4, "guidance": 3.0, "measure": False} | flex
    return {
        "model": loaded,
        "prompt": node("ToyPrompt", number=1),
        "other": node("ToyPrompt", number=2),
        "empty": node("EmptyFlux2LatentImage", width=SIZE, height=SIZE, batch_size=1),
        "noise": node("RandomNoise", noise_seed=7),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "flex": node(
            "Flux2KitFlex", model=["model", 0], positive=["prompt", 0], negative=["other", 0],
            latent=["empty", 0], **flex,
        ),
        "sample": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["flex", 0], sampler=["euler", 0],
            sigmas=["flex", 1], latent_image=["empty", 0],
        ),
    }  # fmt: skip


def run(graph, prompt, **keep):
    return graph.run(prompt, {"latent": ("sample", 0), **keep}).kept


def text(number: int) -> torch.Tensor:
    ((rows, _),) = toy.conditioning(number, 20 + number)
    return torch.nn.functional.pad(rows, (0, 0, 512 - rows.shape[1], 0))


def core(config, seed, sigmas, **how):
    model = Flux2Transformer(config).eval()
    model.load_state_dict(toy.transformer(config, seed))
    x = latents.noise(7, width=SIZE, height=SIZE)
    with torch.inference_mode():
        return denoise(velocity(model, text(1), **how), x, sigmas)


COURSES = {
    "interval": ({"course": "interval", "guidance_start": 0.25, "guidance_end": 0.75}, Course(3.0, "interval", 1.0, 0.25, 0.75)),
    "ramp down": ({"course": "ramp down", "low": 2.0}, Course(3.0, "ramp down", 2.0)),
    "curve": ({"course": "curve", "guidance_curve": "1 5, 2"}, Course(3.0, "curve", points=(1.0, 5.0, 2.0))),
}  # fmt: skip


@pytest.mark.parametrize("native", [False, True], ids=["ours", "host's"])
@pytest.mark.parametrize("name", COURSES)
def test_an_embedded_value_over_the_run(graph, name, native):
    asked, course = COURSES[name]
    got = run(graph, prompt_graph(native=native, **asked))["latent"]["samples"]
    sigmas = schedule.sigmas(4, width=SIZE, height=SIZE)
    wanted = core(toy.DEV, 0, sigmas, embedded=course.over(sigmas))
    assert toy.difference(got, wanted) < CLOSE  # seen 1.4e-6
    flat = core(toy.DEV, 0, sigmas, embedded=3.0)
    assert toy.difference(got, flat) > 1e-3


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", COURSES)
def test_cfg_over_the_run(graph, name, rescale):
    asked, course = COURSES[name]
    prompt = prompt_graph("toy-klein.safetensors", rescale=rescale, **asked)
    prompt["model"]["inputs"]["variant"] = "auto"
    got = run(graph, prompt)["latent"]["samples"]
    sigmas = schedule.sigmas(4, width=SIZE, height=SIZE)
    how = {"negative": text(2), "scale": course.over(sigmas), "rescale": rescale}
    assert toy.difference(got, core(toy.KLEIN, 1, sigmas, **how)) < CLOSE  # seen 2.6e-6


def test_a_constant_is_the_hosts_cfg_guider_bit_for_bit(graph):
    ours = run(graph, prompt_graph("toy-klein.safetensors"))["latent"]["samples"]
    theirs = prompt_graph("toy-klein.safetensors")
    theirs["cfg"] = node(
        "CFGGuider", model=["model", 0], positive=["prompt", 0], negative=["other", 0], cfg=3.0
    )
    theirs["sample"]["inputs"]["guider"] = ["cfg", 0]
    assert torch.equal(ours, run(graph, theirs)["latent"]["samples"])


def test_flat_courses_are_the_constant_bit_for_bit(graph):
    stock = run(graph, prompt_graph("toy-klein.safetensors"))["latent"]["samples"]
    for asked in (
        {"course": "interval"},
        {"course": "ramp up", "low": 3.0},
        {"course": "curve", "guidance_curve": "3 3"},
    ):
        flat = run(graph, prompt_graph("toy-klein.safetensors", **asked))["latent"]["samples"]
        assert torch.equal(flat, stock)


def test_zero_init(graph):
    got = run(graph, prompt_graph("toy-klein.safetensors", zero_init=True))["latent"]["samples"]
    sigmas = schedule.sigmas(4, width=SIZE, height=SIZE)
    how = {"negative": text(2), "scale": 3.0, "zero_above": float(sigmas[0])}
    assert toy.difference(got, core(toy.KLEIN, 1, sigmas, **how)) < CLOSE


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, {"steps": 4}),
        ({"spacing": "karras"}, {"steps": 4, "spacing": "karras"}),
        ({"mu": 1.5}, {"steps": 4, "shift_by": 1.5}),
        ({"start": 0.5}, {"steps": 4, "start": 0.5}),
        ({"preset": "art", "steps": 0}, {"steps": 30}),
        ({"preset": "fine type"}, {"steps": 4}),  # what is set by hand stays
    ],
)
def test_sigmas(graph, asked, wanted):
    prompt = prompt_graph(**asked)
    got = graph.run(prompt, {"sigmas": ("flex", 1)}).kept["sigmas"]
    steps = wanted.pop("steps")
    assert torch.equal(got, schedule.sigmas(steps, width=SIZE, height=SIZE, **wanted))


def test_a_list_of_sigmas_is_run_as_it_is(graph):
    prompt = prompt_graph(spacing="sigmas", curve="1 0.7 0.2 0", steps=0)
    got = graph.run(prompt, {"sigmas": ("flex", 1)}).kept["sigmas"]
    assert torch.equal(got, torch.tensor([1, 0.7, 0.2, 0]))


def test_what_it_shows_and_says(graph):
    prompt = prompt_graph(
        "toy-klein.safetensors", course="interval", guidance_start=0.5, measure=True
    )
    kept = graph.run(prompt, {"chart": ("flex", 2), "plan": ("flex", 3)}).kept
    assert kept["chart"].ndim == 4 and kept["chart"].shape[-1] == 3
    assert "4 steps, 6 passes; 36 picture tokens and 512 of text" in kept["plan"]
    assert f"mu {schedule.mu(36, 4):.3f}" in kept["plan"]
    assert "a pass here" in kept["plan"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"start": 0.8, "end": 0.2}, "schedule must begin before it ends"),
        ({"course": "interval", "guidance_start": 0.8, "guidance_end": 0.2}, "guidance must begin"),
        ({"spacing": "curve", "curve": "1 2 0"}, "out of range"),
        ({"spacing": "curve", "curve": "1 0.2 0.5"}, "up and down"),
        ({"spacing": "sigmas", "curve": "1 0.5 0"}, "another length"),
        ({"spacing": "sigmas", "curve": "red"}, "no number"),
        ({"course": "curve", "guidance_curve": "4"}, "at least 2 numbers"),
    ],
)
def test_contradictions_are_one_sentence(graph, asked, said):
    model = graph.call("Flux2KitModelLoader", model="toy-dev.safetensors", variant="auto")[0]
    prompt = graph.call("ToyPrompt", number=1)[0]
    latent = {"samples": torch.zeros(1, 128, 6, 6)}
    asked = {"steps": 4, "measure": False} | asked
    with pytest.raises(Flux2Error, match=said):
        graph.call("Flux2KitFlex", model=model, positive=prompt, latent=latent, **asked)


def test_what_does_nothing_is_said(graph, caplog):
    model = graph.call("Flux2KitLoader", model="nano (built in)")[0]
    model.model.variant = schedule_variant()
    prompt = graph.call("ToyPrompt", number=1)[0]
    latent = {"samples": torch.zeros(1, 128, 8, 8)}
    asked = {"guidance": 4.0, "course": "ramp up", "steps": 60, "measure": False}
    *_, plan = graph.call("Flux2KitFlex", model=model, positive=prompt, latent=latent, **asked)
    assert "course does nothing" in plan and "beyond 50" in plan
    assert "takes no guidance" in caplog.text


def schedule_variant():
    from flux2_pack.flux2_core.configs import VARIANTS

    return VARIANTS["klein-4b"]


WORKFLOWS = [
    "flex_text_to_image",
    "preview_and_continue",
    "draft_small_finish_large",
    "upscale_in_windows",
]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_shipped_workflows_plan_klein_s_own_run(graph, name):
    """With the loader switched to klein: four steps at 1024 x 1024, whatever nano wanted."""
    from flux2_pack.tests.workflows.shipped import load

    model = graph.call("Flux2KitLoader", model="nano (built in)")[0]
    model.model.variant = schedule_variant()
    prompt = graph.call("ToyPrompt", number=1)[0]
    nodes = {n["type"]: n for n in reversed(load(name)["nodes"])}

    def values(kind: str) -> dict:
        slots = [slot["name"] for slot in nodes[kind]["inputs"] if "widget" in slot]
        return dict(zip(slots, nodes[kind]["widgets_values"], strict=True))

    latent = graph.call("Flux2KitEmptyLatent", model=model, **values("Flux2KitEmptyLatent"))[0]
    assert latent["samples"].shape[2:] == (64, 64)
    asked = values("Flux2KitFlex") | {"measure": False}
    _, sigmas, _, plan = graph.call(
        "Flux2KitFlex", model=model, positive=prompt, negative=prompt, latent=latent, **asked
    )
    assert torch.equal(sigmas, schedule.sigmas(4, width=1024, height=1024))
    assert "4 steps, 4 passes; 4,096 picture tokens" in plan
