"""Our nodes and the host's in one graph, queued as a user would."""

import pytest
import torch

from flux2_pack.flux2_core import latents, schedule
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.transformer import Flux2Transformer
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host
CLOSE = 1e-4
SIZE = 128


@pytest.fixture(scope="module")
def graph(host):
    toy.write_models(host.models)
    toy.add_nodes(host)
    with toy.heads_from_width():
        yield host


def parts(model: str = "toy-dev.safetensors", native: bool = False) -> dict:
    """Model, VAE, prompts, pictures and an empty latent: the beginning of every graph here."""
    theirs = node("UNETLoader", unet_name=model, weight_dtype="default")
    return {
        "model": theirs if native else node("Flux2KitModelLoader", model=model, variant="auto"),
        "vae": node("Flux2KitVAELoader", vae="toy-vae.safetensors"),
        "prompt": node("ToyPrompt", number=1),
        "other": node("ToyPrompt", number=2),
        "picture1": node("ToyImage", number=3, width=96, height=64),
        "picture2": node("ToyImage", number=4, width=64, height=80),
        "empty": node("EmptyFlux2LatentImage", width=SIZE, height=SIZE, batch_size=1),
    }


def own_references(prompt: str = "prompt") -> dict:
    """Two pictures by our nodes: a chain of one, and a slot."""
    return {
        "chain": node("Flux2KitReference", image=["picture1", 0], name="a"),
        "apply": node(
            "Flux2KitApplyReferences",
            vae=["vae", 0],
            positive=[prompt, 0],
            negative=["other", 0],
            references=["chain", 0],
            image_7=["picture2", 0],
        ),
    }


def host_references() -> dict:
    """The same two pictures by the host's nodes."""
    return {
        "encode1": node("VAEEncode", pixels=["picture1", 0], vae=["vae", 0]),
        "encode2": node("VAEEncode", pixels=["picture2", 0], vae=["vae", 0]),
        "ref1": node("ReferenceLatent", conditioning=["prompt", 0], latent=["encode1", 0]),
        "ref2": node("ReferenceLatent", conditioning=["ref1", 0], latent=["encode2", 0]),
    }


def native_graph(steps: int = 3, guidance: float = 3.0) -> dict:
    """ComfyUI's own FLUX.2 graph, from loader to sampler."""
    return {
        **parts(native=True),
        **host_references(),
        "guidance": node("FluxGuidance", conditioning=["ref2", 0], guidance=guidance),
        "guider": node("BasicGuider", model=["model", 0], conditioning=["guidance", 0]),
        "noise": node("RandomNoise", noise_seed=7),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("Flux2Scheduler", steps=steps, width=SIZE, height=SIZE),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
    }


def sampled(host, prompt: dict, source=("sample", 0)) -> torch.Tensor:
    return host.run(prompt, {"latent": source}).kept["latent"]["samples"]


@pytest.fixture(scope="module")
def native(graph):
    """What ComfyUI's own loader and graph make of the toy file with two references."""
    return sampled(graph, native_graph())


def own_graph(model: dict | None = None, **settings) -> dict:
    settings = {"steps": 3, "guidance": 3.0, "seed": 7, "denoise": 1.0} | settings
    return {
        **(model or parts()),
        **own_references(),
        "sample": node(
            "Flux2KitSampler",
            model=["model", 0],
            positive=["apply", 0],
            latent=["empty", 0],
            **settings,
        ),
    }


def test_our_graph_makes_the_hosts_latents(graph, native):
    ours = sampled(graph, own_graph())
    assert toy.difference(ours, native) < CLOSE  # observed 1.2e-6
    # The test can fail: without the second picture the latents are others.
    alone = own_graph()
    del alone["apply"]["inputs"]["image_7"]
    assert toy.difference(sampled(graph, alone), native) > 0.01


def test_the_hosts_model_under_our_sampler(graph, native):
    ours = sampled(graph, own_graph(parts(native=True)))
    assert toy.difference(ours, native) < CLOSE  # observed 1.1e-6


def test_flex_with_the_hosts_sampler(graph, native):
    prompt = {
        **native_graph(),
        **own_graph(),
        "flex": node(
            "Flux2KitFlex",
            model=["model", 0],
            positive=["apply", 0],
            latent=["empty", 0],
            steps=3,
            guidance=3.0,
        ),
    }
    prompt["sample"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["flex", 0],
        sampler=["euler", 0],
        sigmas=["flex", 1],
        latent_image=["empty", 0],
    )
    result = graph.run(prompt, {"latent": ("sample", 0)})
    assert toy.difference(result.kept["latent"]["samples"], native) < CLOSE  # observed 1.2e-6
    # Previews at every step, though this host's are off.
    assert [step for step, _, preview in result.progress if preview] == [1, 2, 3]


def test_basic_guider_with_our_model(graph, native):
    prompt = native_graph()
    prompt["model"] = parts()["model"]
    assert toy.difference(sampled(graph, prompt), native) < CLOSE  # observed 1.3e-6


@pytest.mark.parametrize("file", ["toy-dev.safetensors", "toy-klein.safetensors"])
def test_ksampler_and_lora_with_our_model(graph, file):
    """KSampler with CFG, two references, and a LoRA loaded by the host."""
    from safetensors.torch import save_file

    config = toy.DEV if "dev" in file else toy.KLEIN
    save_file(toy.lora(toy.transformer(config)), graph.models("loras") / "toy-graph.safetensors")

    def run(native: bool) -> torch.Tensor:
        prompt = {**parts(file, native), **host_references()}
        prompt["lora"] = node(
            "LoraLoaderModelOnly",
            model=["model", 0],
            lora_name="toy-graph.safetensors",
            strength_model=0.8,
        )
        prompt["sample"] = node(
            "KSampler",
            model=["lora", 0],
            seed=7,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["ref2", 0],
            negative=["other", 0],
            latent_image=["empty", 0],
            denoise=1.0,
        )
        return sampled(graph, prompt)

    assert toy.difference(run(False), run(True)) < CLOSE  # observed 3.8e-6


def test_cfg_guider_with_our_model(graph):
    def run(native: bool) -> torch.Tensor:
        prompt = native_graph(steps=2)
        prompt["model"] = parts("toy-klein.safetensors", native)["model"]
        prompt["guider"] = node(
            "CFGGuider", model=["model", 0], positive=["ref2", 0], negative=["other", 0], cfg=3.0
        )
        return sampled(graph, prompt)

    assert toy.difference(run(False), run(True)) < CLOSE  # observed 1.1e-5


def test_true_guidance_of_our_sampler_is_the_hosts(graph):
    """The klein form without a release's shapes is taken for a base model: CFG, both with the
    references."""
    ours = own_graph(parts("toy-klein.safetensors"), steps=2)
    ours["sample"]["inputs"]["negative"] = ["apply", 1]
    theirs = own_graph(parts("toy-klein.safetensors", native=True), steps=2)
    theirs |= {key: value for key, value in native_graph(steps=2).items() if key not in theirs}
    theirs["guider"] = node(
        "CFGGuider", model=["model", 0], positive=["apply", 0], negative=["apply", 1], cfg=3.0
    )
    theirs["sample"] = native_graph()["sample"]
    # The two schedules differ in their last bits.
    assert toy.difference(sampled(graph, ours), sampled(graph, theirs)) < CLOSE  # observed 4.5e-5


def test_our_vae_in_the_hosts_nodes(graph):
    """VAEEncode, VAEDecode and VAEDecodeTiled on our VAE, and ours on the same."""
    prompt = {
        "vae": parts()["vae"],
        "picture": node("ToyImage", number=1, width=160, height=96),
        "encode": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "own": node("Flux2KitVAEEncode", image=["picture", 0], vae=["vae", 0]),
        "decode": node("VAEDecode", samples=["encode", 0], vae=["vae", 0]),
        "decode_own": node("Flux2KitVAEDecode", samples=["own", 0], vae=["vae", 0]),
        "tiled": node(
            "VAEDecodeTiled",
            samples=["encode", 0],
            vae=["vae", 0],
            tile_size=512,
            overlap=64,
            temporal_size=64,
            temporal_overlap=8,
        ),
    }
    keep = {name: (name, 0) for name in ("encode", "own", "decode", "decode_own", "tiled", "vae")}
    kept = graph.run(prompt, keep).kept
    latent = kept["encode"]["samples"]
    assert latent.shape == (1, 128, 6, 10)
    assert torch.equal(latent, kept["own"]["samples"])
    assert kept["decode"].shape == (1, 96, 160, 3)
    assert torch.equal(kept["decode"], kept["decode_own"])
    assert kept["decode"].min() >= 0 and kept["decode"].max() <= 1
    # One tile covers the picture: tiled is the same. (Smaller tiles blend, by the host's design.)
    assert toy.difference(kept["tiled"], kept["decode"]) < 1e-5  # observed 2.6e-7
    # And it is what the core makes of it.
    with torch.inference_mode():
        want = kept["vae"].first_stage_model.decode(latent)
    want = ((want + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert toy.difference(kept["decode"], want) < 1e-5  # observed 0


def test_a_batch_is_its_pictures(graph):
    """Picture 2 of a batch is the one that seed + 1 gives alone."""
    batch = own_graph(steps=1)
    batch["empty"]["inputs"]["batch_size"] = 2
    both = sampled(graph, batch)
    assert both.shape[0] == 2
    second = sampled(graph, own_graph(steps=1, seed=8))
    assert toy.difference(both[1:], second) < 1e-5  # observed 1.6e-6


def test_denoise_starts_from_the_picture(graph):
    """At denoise 0.25, 2 steps are the last two of eight, and begin with the noised picture."""
    prompt = own_graph(steps=2, denoise=0.25, seed=5)
    prompt["start"] = node("ToyImage", number=9, width=SIZE, height=SIZE)
    prompt["empty"] = node("Flux2KitVAEEncode", image=["start", 0], vae=["vae", 0])
    keep = {"latent": ("sample", 0), "start": ("empty", 0), "text": ("apply", 0)}
    kept = graph.run(prompt, keep).kept
    start, (rows, options) = kept["start"]["samples"], kept["text"][0]
    sigmas = schedule.sigmas(8, width=SIZE, height=SIZE)[-3:]
    x = torch.lerp(start, latents.noise(5, width=SIZE, height=SIZE), float(sigmas[0]))
    core = Flux2Transformer(toy.DEV)
    core.load_state_dict(toy.transformer(toy.DEV))
    rows = torch.nn.functional.pad(rows, (0, 0, 512 - rows.shape[1], 0))
    field = velocity(core, rows, embedded=3.0, references=options["reference_latents"])
    with torch.inference_mode():
        want = denoise(field, x, sigmas)
    assert toy.difference(kept["latent"]["samples"], want) < CLOSE  # observed 1.1e-6
    assert toy.difference(start, want) > 0.1


def test_an_empty_latent_of_another_model(graph):
    """EmptyLatentImage (4 channels, 8 pixels a position) becomes FLUX.2's where the host says how."""
    prompt = own_graph(steps=1)
    prompt["empty"] = node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1)
    made = graph.run(prompt, {"latent": ("sample", 0), "empty": ("empty", 0)}).kept
    side = 8 if "downscale_ratio_spacial" in made["empty"] else 16
    assert made["latent"]["samples"].shape == (1, 128, side, side)
    assert "downscale_ratio_spacial" not in made["latent"]


def test_previews_and_progress(graph):
    result = graph.run(own_graph(), {"latent": ("sample", 0)})
    shown = [(step, total, preview) for step, total, preview in result.progress if preview]
    assert [(step, total) for step, total, _ in shown] == [(1, 3), (2, 3), (3, 3)]
    kind, image, _ = shown[0][2]
    assert kind == "JPEG" and image.size == (16, 16)  # linear factors see 1/8 of 128 pixels


def test_interrupt(graph):
    """The run ends at the step in which the user says stop, and the next one runs again."""
    import comfy.model_management as memory

    from flux2_pack.nodes import host_preview

    stock, steps = host_preview.picture, []

    def stop(decode, x0):
        steps.append(1)
        if len(steps) == 2:
            memory.interrupt_current_processing()
        return stock(decode, x0)

    host_preview.picture = stop
    try:
        with pytest.raises(Exception, match=r"execution_interrupted|InterruptProcessing"):
            graph.run(own_graph(steps=6), {"latent": ("sample", 0)})
    finally:
        host_preview.picture = stock
        memory.interrupt_current_processing(False)
    assert len(steps) == 2
    assert sampled(graph, own_graph(steps=1)).shape == (1, 128, 8, 8)


def test_loaders_run_again_when_the_file_changes(graph):
    import os

    from flux2_pack.nodes.loaders import Flux2KitModelLoader

    path = graph.models("diffusion_models") / "toy-klein.safetensors"
    first = Flux2KitModelLoader.fingerprint_inputs(model=path.name)
    assert first == Flux2KitModelLoader.fingerprint_inputs(model=path.name)
    os.utime(path, ns=(1, 1))
    assert first != Flux2KitModelLoader.fingerprint_inputs(model=path.name)
