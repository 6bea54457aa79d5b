"""The built-in nano, from loader to picture: the graph and the Pipeline do the same."""

import pytest
import torch

from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.references import Reference, from_pil
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import add_nodes, images, node

pytestmark = pytest.mark.host
CLOSE = 1e-4
TEXT = "image 1 with a blue shape"


@pytest.fixture(scope="module")
def pipe(host):
    add_nodes(host)
    return Pipeline.load("nano")


def graph(text: str, references: int = 0, negative: bool = False, **settings) -> dict:
    """FLUX.2 Loader with every widget at its default, and what follows it."""
    prompt = {
        "load": node("Flux2KitLoader"),
        "text": node("Flux2KitPrompt", clip=["load", 1], text=text),
        "no": node("Flux2KitPrompt", clip=["load", 1], text=""),
        "empty": node("Flux2KitEmptyLatent", model=["load", 0]),
        "apply": node("Flux2KitApplyReferences", vae=["load", 2], positive=["text", 0]),
        "sample": node(
            "Flux2KitSampler",
            model=["load", 0],
            positive=["apply", 0],
            latent=["empty", 0],
            **settings,
        ),
        "decode": node("Flux2KitVAEDecode", samples=["sample", 0], vae=["load", 2]),
    }
    for i in range(1, references + 1):
        prompt[f"picture{i}"] = node("ToyImage", number=i, width=64 * i, height=64)
        prompt["apply"]["inputs"][f"image_{i}"] = [f"picture{i}", 0]
    if negative:
        prompt["apply"]["inputs"]["negative"] = ["no", 0]
        prompt["sample"]["inputs"]["negative"] = ["apply", 1]
    return prompt


def complete(host, prompt: dict) -> dict:
    """The defaults of every widget, as the front end sends them."""
    for entry in prompt.values():
        cls = host.mappings[entry["class_type"]]
        for group in cls.INPUT_TYPES().values():
            for name, (_, *options) in group.items():
                if options and "default" in options[0]:
                    entry["inputs"].setdefault(name, options[0]["default"])
    return prompt


@pytest.mark.parametrize(
    ("references", "settings"),
    [
        (0, {"seed": 3}),
        (2, {"seed": 4, "steps": 4}),
        (1, {"seed": 5, "steps": 4, "guidance": 2.5}),
    ],
)
def test_the_pipeline_makes_the_graphs_latents(host, pipe, references, settings):
    prompt = complete(host, graph(TEXT, references, negative="guidance" in settings, **settings))
    kept = host.run(prompt, {"latent": ("sample", 0), "image": ("decode", 0)}).kept
    options = {**settings, "negative": ""} if "guidance" in settings else settings
    pictures = [Reference(images(i, (64, 64 * i))[0][0]) for i in range(1, references + 1)]
    x = pipe.sample(TEXT, references=pictures, **options)
    assert toy.difference(kept["latent"]["samples"], x) < CLOSE  # observed 3.9e-5, with CFG
    assert kept["image"].shape == (1, 128, 128, 3)
    levels = (kept["image"][0] - from_pil(pipe.decode(x))).abs().max()
    assert levels <= 0.5 / 255 + 1e-4  # the file's pixels are rounded to 8 bits


@pytest.mark.parametrize(
    ("name", "label", "settings", "steps"),
    [
        ("nano-distilled", "nano distilled (built in)", {"guidance": 3.0}, 4),
        ("nano-guided", "nano guided (built in)", {"guidance": 3.0, "steps": 3}, 3),
    ],
)
def test_the_loader_offers_nanos_forms(host, pipe, name, label, settings, steps):
    """Distilled: 4 steps, and a guidance does nothing. Guided: the number is an input."""
    prompt = complete(host, graph(TEXT, 1, seed=6, **settings))
    prompt["load"]["inputs"]["model"] = label
    result = host.run(prompt, {"latent": ("sample", 0)})
    pictures = [Reference(images(1, (64, 64))[0][0])]
    form = Pipeline.load(name)
    x = form.sample(TEXT, references=pictures, seed=6, **settings)
    assert toy.difference(result.kept["latent"]["samples"], x) < CLOSE
    assert len([shown for shown in result.progress if shown[2]]) == steps
    other = form.sample(TEXT, references=pictures, seed=6, **{**settings, "guidance": 6.0})
    same = toy.difference(other, x) < 1e-6
    assert same == (name == "nano-distilled")


def test_nano_is_fast_enough_to_be_a_default(host):
    """Auto means nano's own steps and size, with a preview of full size at each."""
    result = host.run(complete(host, graph(TEXT)), {"image": ("decode", 0)})
    shown = [preview[1].size for _, _, preview in result.progress if preview]
    assert shown == [(128, 128)] * 8


def test_the_hosts_nodes_on_nano(host):
    """CLIPTextEncode, KSampler, VAEDecode: nano is a model like any other."""
    prompt = {
        "load": node("Flux2KitLoader"),
        "text": node("CLIPTextEncode", clip=["load", 1], text=TEXT),
        "empty": node("Flux2KitEmptyLatent", model=["load", 0]),
        "sample": node(
            "KSampler",
            model=["load", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
    }
    image = host.run(complete(host, prompt), {"image": ("decode", 0)}).kept["image"]
    assert image.shape == (1, 128, 128, 3) and torch.isfinite(image).all()
