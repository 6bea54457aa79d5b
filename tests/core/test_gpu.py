"""The library on an NVIDIA GPU beside the same on the CPU: every control, every cache, fp8 by the
kernels that serve there, nano's pictures, the autoencoder in strips.

Each runs on the CPU too, against itself, so that the tests hold where no GPU is.
"""

import pytest
import torch

from flux2_pack.flux2_core import kernels, vae_stream
from flux2_pack.flux2_core.kernels import table
from flux2_pack.flux2_core.kv_cache import ReferenceCache
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.quantised import quantize
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.vae_memory import Streaming
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt
from flux2_pack.tests.core.toys import DEV, KLEIN, SIZES, decibels, error, inputs, toy

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LEFT = torch.zeros(5, 7)
LEFT[:, :3] = 1
SOFT = torch.linspace(0, 1, 7).expand(5, 7)
PROMPT = "a red circle left and a blue square right on tan background"
anywhere = pytest.mark.parametrize("place", PLACES)


def there(given, place):
    """Tensors of what a forward takes, on a device."""
    if isinstance(given, torch.Tensor):
        return given.to(place)
    if isinstance(given, dict):
        return {name: there(value, place) for name, value in given.items()}
    return [there(value, place) for value in given] if isinstance(given, list) else given


def controls(kind: str, place: str) -> Controls | None:
    keep = torch.zeros(SIZES[1], dtype=torch.bool)
    keep[:2] = True
    context = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(5))
    return {
        "stock": None,
        "strength": Controls(references=(ReferenceControl(0.4), ReferenceControl(2.5))),
        "mask": Controls(references=(ReferenceControl(), ReferenceControl(keep=keep.to(place)))),
        "region": Controls(references=(ReferenceControl(region=SOFT.to(place)),)),
        "region prompt, isolated": Controls(
            regions=(RegionPrompt(context.to(place), LEFT.to(place)),), isolate=True
        ),
        "references alone": Controls(kv_references=True),
    }[kind]


KINDS = ("stock", "strength", "mask", "region", "region prompt, isolated", "references alone")


@anywhere
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [KLEIN, DEV], ids=["klein", "dev"])
def test_controls_mean_the_same(place, kind, config):
    model = toy(config)
    given = inputs(3, batch=2, guidance=4.0 if config is DEV else None)
    wanted = model(**given, controls=controls(kind, "cpu"))
    made = model.to(place)(**there(given, place), controls=controls(kind, place))
    assert error(made.cpu(), wanted) < 1e-4  # observed 0 (the CPU against itself)


@anywhere
@pytest.mark.parametrize("kind", KINDS)
def test_controls_in_bf16(place, kind):
    """Flash attention and its log-sum-exp, on a GPU."""
    model, given = toy(KLEIN), inputs(3, batch=2)
    wanted = model(**given, controls=controls(kind, "cpu"))
    model, given = model.to(place, torch.bfloat16), bf16(there(given, place))
    made = model(**given, controls=controls(kind, place))
    assert decibels(made.cpu(), wanted) > 40  # observed 42.8 at least on the CPU


def bf16(given):
    """Numbers of the picture and the prompt; times and guidance stay exact."""
    narrow = {"x": given["x"].bfloat16(), "context": given["context"].bfloat16()}
    return given | narrow | {"references": [r.bfloat16() for r in given["references"]]}


@anywhere
@pytest.mark.parametrize("keep", ["device", "host"])
def test_an_exact_cache_changes_nothing(place, keep):
    model, given = toy(KLEIN).to(place), there(inputs(3, batch=2), place)
    cached = Controls(kv_references=True, cache=ReferenceCache("exact", place=keep))
    wanted = model(**given, controls=Controls(kv_references=True))
    first, second = model(**given, controls=cached), model(**given, controls=cached)
    assert error(first, wanted) < 1e-5 and error(second, wanted) < 1e-5  # observed 7e-7


@anywhere
def test_fp8_layers_mean_what_their_definitions_mean(place):
    model, given = quantize(toy(KLEIN).bfloat16(), "fp8"), bf16(inputs(2, batch=2))
    with kernels.use("reference"):
        wanted = model(**given)
    model.to(place)
    if place == "cuda":
        made = model(**there(given, place))
        serving = {row.op: row.chosen for row in table.status("cuda") if "up to" in row.case}
        assert serving["modulate_quantize"] == serving["swiglu_quantize"] == "triton"
        assert serving["qk_norm_rope"] == "triton" and serving["fp8_linear"] == "torch"
    else:
        with kernels.use("eager"):
            made = model(**given)
    assert decibels(made.cpu(), wanted) > 33  # observed 37.2 on the CPU


@anywhere
@pytest.mark.slow
@pytest.mark.parametrize("form", ["float32", "fp8"])
def test_nano_draws_what_is_asked(place, form):
    pipe = Pipeline.load("nano", device=place)
    if form == "fp8":
        quantize(pipe.model.bfloat16(), "fp8")
    picture = pipe(PROMPT, seed=3)
    assert scenes.check(picture, PROMPT).ok
    again = pipe("the circle of image 1 is green", references=[picture], seed=4)
    assert again.size == picture.size


@anywhere
@pytest.mark.parametrize("how", [Streaming(), Streaming(lean=True, host=True, rows=5)], ids=str)
def test_the_autoencoder_in_strips(place, how, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # 10 bits, and other kernels for strips
    vae = Pipeline.load("nano").vae.to(place)
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)).to(place) * 2 - 1
    latents = vae.encode(pixels)
    far = (vae_stream.encode(vae, pixels, how) - latents).abs().max() / latents.std()
    assert far < 1e-4  # observed 3e-6
    drawn = vae.decode(latents)
    far = (vae_stream.decode(vae, latents, how) - drawn).abs().max() / drawn.std()
    assert far < 1e-4  # observed 4e-6
