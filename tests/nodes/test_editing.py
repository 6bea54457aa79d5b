"""Inpaint, outpaint, edit lock and windows in the host, under its samplers and ours."""

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.transformer import Flux2Transformer
from flux2_pack.flux2_core.windows import Windowed
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def graph(host):
    toy.write_models(host.models)
    toy.add_nodes(host)
    with toy.heads_from_width():
        yield host


@pytest.fixture(scope="module")
def picture():
    return torch.rand(1, 96, 120, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mask():
    out = torch.zeros(1, 96, 120)
    out[:, 30:60, 40:80] = 1
    return out


@pytest.fixture(scope="module")
def vae(graph):
    return graph.call("Flux2KitVAELoader", vae="toy-vae.safetensors")[0]


def steps(graph, latent, name: str, **settings):
    """Draw on a latent with a sampler node -> the finished LATENT."""
    model = graph.call("Flux2KitModelLoader", model="toy-klein.safetensors", variant="auto")[0]
    prompt = graph.call("ToyPrompt", number=1)[0]
    if name == "Flux2KitSampler":
        how = {"steps": 2, "guidance": 1.0, "seed": 3, "denoise": 1.0} | settings
        return graph.call(name, model=model, positive=prompt, latent=latent, **how)[0]
    how = {"steps": 2, "cfg": 1.0, "seed": 3, "sampler_name": "euler", "scheduler": "simple"}
    return graph.call(
        name, model=model, positive=prompt, negative=prompt, latent_image=latent, **how
    )[0]


@pytest.mark.parametrize("name", ["Flux2KitSampler", "KSampler"])
@pytest.mark.parametrize("context", [0.3, 10.0])
def test_outside_the_mask_no_pixel_changes(graph, vae, picture, mask, name, context):
    latent, window, inside = graph.call(
        "Flux2KitInpaint", image=picture, mask=mask, vae=vae, context=context
    )
    assert window.shape[1:3] == inside.shape[1:]
    assert (window.shape[1] % 16, window.shape[2] % 16) == (0, 0)
    out = steps(graph, latent, name)
    image = graph.call("Flux2KitVAEDecode", samples=out, vae=vae)[0]
    assert image.shape == picture.shape
    assert torch.equal(image[mask == 0], picture[mask == 0])
    assert not torch.equal(image[mask == 1], picture[mask == 1])


def test_what_is_held_comes_back_from_the_sampler(graph, vae, picture, mask):
    latent, *_ = graph.call("Flux2KitInpaint", image=picture, mask=mask, vae=vae, context=10.0)
    out = steps(graph, latent, "Flux2KitSampler")
    still = (latent["noise_mask"] == 0).expand_as(out["samples"])
    assert bool(still.any())
    difference = (out["samples"][still] - latent["samples"][still]).abs().max()
    assert difference < 1e-5  # seen 0: the host puts it back


@pytest.mark.parametrize("file", ["toy-klein", "toy-dev"])
def test_with_a_reference_a_region_and_guidance(graph, vae, picture, mask, file):
    """Guidance as an input (dev) and as two passes: what is held is held in both."""
    latent, window, _ = graph.call("Flux2KitInpaint", image=picture, mask=mask, vae=vae)
    model = graph.call("Flux2KitModelLoader", model=f"{file}.safetensors", variant="auto")[0]
    prompt, other, negative = (graph.call("ToyPrompt", number=n)[0] for n in (1, 2, 3))
    refs = graph.call("Flux2KitReference", image=window, strength=1.5)[0]
    positive, negative, _ = graph.call(
        "Flux2KitApplyReferences", positive=prompt, negative=negative, vae=vae, references=refs
    )
    positive = graph.call(
        "Flux2KitRegionPrompt", positive=positive, prompt=other, mask=mask, base=0.3
    )[0]
    negative = negative if file == "toy-klein" else None

    def drawn(positive, guidance):
        how = {"model": model, "positive": positive, "latent": latent, "steps": 2, "seed": 3}
        out = graph.call("Flux2KitSampler", negative=negative, guidance=guidance, **how)[0]
        return graph.call("Flux2KitVAEDecode", samples=out, vae=vae)[0]

    images = [drawn(positive, 3.0), drawn(positive, 1.5), drawn(prompt, 3.0)]
    for image in images:
        assert torch.equal(image[mask == 0], picture[mask == 0])
    inside = [image[mask == 1] for image in images]
    assert not torch.equal(inside[0], inside[1])
    assert not torch.equal(inside[0], inside[2])


def test_several_drawings_of_one_picture(graph, vae, picture, mask):
    """Repeat Latent Batch, as the host has it: every drawing goes back into the picture."""
    latent, *_ = graph.call("Flux2KitInpaint", image=picture, mask=mask, vae=vae)
    twice = graph.call("RepeatLatentBatch", samples=latent, amount=2)[0]
    out = steps(graph, twice, "Flux2KitSampler")
    image = graph.call("Flux2KitVAEDecode", samples=out, vae=vae)[0]
    assert image.shape == (2, *picture.shape[1:])
    for one in image:
        assert torch.equal(one[mask[0] == 0], picture[0][mask[0] == 0])
    assert not torch.equal(image[0], image[1])


def test_outpaint_keeps_the_picture(graph, vae, picture):
    latent, window, _ = graph.call("Flux2KitOutpaint", image=picture, vae=vae, left=32, bottom=16)
    assert window.shape == (1, 112, 160, 3)
    out = steps(graph, latent, "Flux2KitSampler")
    image = graph.call("Flux2KitVAEDecode", samples=out, vae=vae)[0]
    assert image.shape == (1, 112, 152, 3)
    assert torch.equal(image[:, :96, 32:], picture)


def test_edit_lock_in_a_graph(graph, picture, mask):
    tinted = (picture * 0.9 + 0.05).clamp(0, 1)
    image, report, text, alpha = graph.call(
        "Flux2KitEditLock", original=picture, edited=tinted, mask=mask, feather=4.0
    )
    assert torch.equal(image[mask == 0], picture[mask == 0])
    assert report.shape[-1] == 3
    assert "colour difference" in text
    assert alpha.shape == mask.shape


def test_a_batch_of_edits_of_one_original(graph, picture, mask):
    edits = torch.cat((picture * 0.9, picture * 0.8))
    image, *_ = graph.call("Flux2KitEditLock", original=picture, edited=edits, mask=mask)
    assert image.shape == edits.shape
    assert torch.equal(image[1][mask[0] == 0], picture[0][mask[0] == 0])


def test_compare(graph, picture):
    report, text = graph.call("Flux2KitCompare", first=picture, second=picture)
    assert "inf dB" in text and "SSIM 1.0000" in text
    assert report.ndim == 4
    with pytest.raises(Flux2Error, match="do not pair up"):
        graph.call(
            "Flux2KitCompare", first=picture.repeat(3, 1, 1, 1), second=picture.repeat(2, 1, 1, 1)
        )


def windowed(graph, window: int, overlap: int):
    prompt = {
        "loader": node("Flux2KitModelLoader", model="toy-klein.safetensors", variant="auto"),
        "model": node("Flux2KitWindows", model=["loader", 0], window=window, overlap=overlap),
        "prompt": node("ToyPrompt", number=1),
        "empty": node("EmptyFlux2LatentImage", width=192, height=128, batch_size=1),
        "sample": node(
            "Flux2KitSampler", model=["model", 0], positive=["prompt", 0], latent=["empty", 0],
            steps=2, guidance=1.0, seed=7, denoise=1.0,
        ),
    }  # fmt: skip
    return graph.run(prompt, {"latent": ("sample", 0)}).kept["latent"]["samples"]


def test_windows_in_the_host_are_those_of_the_core(graph):
    """The same windows, positions and blend as flux2_core.windows.Windowed."""
    from flux2_pack.flux2_core import latents, schedule
    from flux2_pack.flux2_core.guidance import velocity
    from flux2_pack.flux2_core.sampling import denoise

    whole, parts = windowed(graph, 1024, 256), windowed(graph, 80, 32)
    assert not torch.allclose(whole, parts, atol=1e-3)
    model = Flux2Transformer(toy.KLEIN).eval()
    model.load_state_dict(toy.transformer(toy.KLEIN, 1))
    ((text, _),) = toy.conditioning(1, 21)
    text = torch.nn.functional.pad(text, (0, 0, 512 - text.shape[1], 0))
    x = latents.noise(7, width=192, height=128)
    sigmas = schedule.sigmas(2, width=192, height=128)
    with torch.inference_mode():
        for net, wanted in ((model, whole), (Windowed(model, 5, 2), parts)):
            ours = denoise(velocity(net, text), x, sigmas)
            assert toy.difference(ours, wanted) < 1e-4  # seen 1e-6


def test_windows_refuse_the_hosts_own_model(graph):
    theirs = graph.call("UNETLoader", unet_name="toy-dev.safetensors", weight_dtype="default")[0]
    with pytest.raises(Flux2Error, match="cannot look through windows"):
        graph.call("Flux2KitWindows", model=theirs)
