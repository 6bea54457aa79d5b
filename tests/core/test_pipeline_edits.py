"""Pipeline: a picture to change, how much of it and where, on random networks of every guidance kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_pack.flux2_core import configs, schedule
from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import Course
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.references import Region
from flux2_pack.flux2_core.solvers import SOLVERS
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.tokenizer import nano_tokenizer
from flux2_pack.flux2_core.transformer import Flux2Transformer

V = configs.VARIANTS
SMALL = replace(configs.NANO, hidden_size=128, double_blocks=1, single_blocks=1)


def pipeline(kind: str) -> Pipeline:
    """`kind` of guidance: none, cfg, embedded."""
    torch.manual_seed(0)
    text = TextEncoder(configs.NANO_TEXT)
    text.tokenizer = nano_tokenizer()
    model = Flux2Transformer(replace(SMALL, guidance_embed=kind == "embedded"))
    nets = model, AutoEncoder(configs.AutoEncoderConfig(16, 16)), text
    for net in nets:
        net.eval().requires_grad_(False)
    return Pipeline(*nets, replace(V["nano"], guidance_kind=kind, guidance=3.0))


@pytest.fixture(scope="module")
def pipe():
    return pipeline("none")


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(box=(30, 20, 60, 50)) -> torch.Tensor:
    out = torch.zeros(75, 100)
    left, top, right, bottom = box
    out[top:bottom, left:right] = 1
    return out


def array(picture) -> np.ndarray:
    return np.asarray(picture)


@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_on_every_solver(pipe, photo, solver):
    """The result has the picture's own size; strength 1 forgets the picture, less keeps more of it."""
    start = pipe._latent(torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1)))
    how = {"solver": solver, "steps": 3, "seed": 5}
    anew = pipe.sample("a red circle", width=96, height=64, **how)
    assert torch.equal(pipe.sample("a red circle", start=start, **how), anew)
    apart = [
        float((pipe.sample("a red circle", start=start, strength=s, **how) - start).square().mean())
        for s in (0.05, 0.4, 1.0)
    ]
    assert apart[0] < apart[1] < apart[2]
    assert pipe("a red circle", image=photo, strength=0.4, **how).size == photo.size


def test_as_many_steps_are_run_at_any_strength(pipe, photo):
    seen = []
    pipe("a", image=photo, strength=0.3, steps=4, on_step=lambda i, n, x0: seen.append(n))
    assert seen == [4] * 4
    how = {"width": 112, "height": 80}
    assert torch.equal(schedule.partial(4, 0.3, **how), schedule.sigmas(13, **how)[-5:])
    assert torch.equal(schedule.partial(4, 1.0, **how), schedule.sigmas(4, **how))


@pytest.mark.parametrize("kind", ["none", "cfg", "embedded"])
@pytest.mark.parametrize("context", [None, 0.2])
def test_masked_edits_keep_every_other_byte(photo, kind, context):
    """With a reference, a region and each kind of guidance."""
    pipe = pipeline(kind)
    half = torch.zeros(10, 10)
    half[:, :5] = 1
    how = {
        "references": [torch.rand(64, 64, 3)],
        "regions": [Region("a blue square", half)],
        "negative": "a green ring" if kind == "cfg" else None,
        "steps": 2,
    }
    how |= {"image": photo, "mask": mask(), "context": context}
    still = mask().numpy() == 0
    for strength in (1.0, 0.5):
        out = array(pipe("image 1", strength=strength, **how))
        assert (out[still] == array(photo)[still]).all()
        assert (out[~still] != array(photo)[~still]).any()
    guided = array(pipe("image 1", strength=0.5, guidance=1.5, **how))
    assert (guided == out).all() == (kind == "none")


def test_five_edits_in_a_row_lose_nothing(pipe, photo):
    now, touched = photo, torch.zeros(75, 100)
    for i in range(5):
        where = mask((10 + 15 * i, 10, 22 + 15 * i, 30))
        touched = torch.maximum(touched, where)
        now = pipe("a red circle", image=now, mask=where, steps=1, seed=i)
    still = touched.numpy() == 0
    assert (array(now)[still] == array(photo)[still]).all()


def test_a_mask_may_be_a_gray_picture_of_another_size(pipe, photo):
    gray = Image.fromarray((mask() * 255).byte().numpy()).resize((200, 150), Image.Resampling.BOX)
    out = pipe("a", image=photo, mask=gray, steps=1)
    still = mask((29, 19, 61, 51)).numpy() == 0  # stretching makes an edge one pixel soft
    assert (array(out)[still] == array(photo)[still]).all()


def test_refusals(pipe, photo):
    with pytest.raises(Flux2Error, match="keeps its size"):
        pipe("a", image=photo, width=128)
    with pytest.raises(Flux2Error, match="needs the picture it belongs to"):
        pipe("a", mask=mask())
    with pytest.raises(Flux2Error, match="strength or a mask needs a picture"):
        pipe("a", strength=0.5)
    with pytest.raises(Flux2Error, match="above 0 and at most 1"):
        pipe("a", image=photo, strength=0.0)
    with pytest.raises(Flux2Error, match="mask is empty"):
        pipe("a", image=photo, mask=mask() * 0)


@pytest.mark.parametrize("kind", ["none", "cfg", "embedded"])
def test_guidance_over_the_run(kind):
    """A flat course is the value itself, bit for bit; one that ends early is another picture."""
    pipe, how = pipeline(kind), {"steps": 4, "seed": 2}
    stock = pipe.sample("a red circle", guidance=3.0, **how)
    assert torch.equal(pipe.sample("a red circle", guidance=Course(3.0), **how), stock)
    flat = Course(3.0, "interval", low=1.0, start=0.0, end=1.0)
    assert torch.equal(pipe.sample("a red circle", guidance=flat, **how), stock)
    early = Course(3.0, "interval", low=1.0, start=0.0, end=0.5)
    assert torch.equal(pipe.sample("a red circle", guidance=early, **how), stock) == (
        kind == "none"
    )
