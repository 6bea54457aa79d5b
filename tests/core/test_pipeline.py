"""Guidance, the denoise loop and the Pipeline, on random toy networks."""

import pytest
import torch
from PIL import Image

from flux2_pack.flux2_core import configs, latents, schedule
from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import advice, cfg, check_negative, split, velocity
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.tokenizer import nano_tokenizer
from flux2_pack.flux2_core.transformer import Flux2Transformer

V = configs.VARIANTS


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    text = TextEncoder(configs.NANO_TEXT)
    text.tokenizer = nano_tokenizer()
    nets = Flux2Transformer(configs.NANO), AutoEncoder(configs.AutoEncoderConfig(16, 16)), text
    for net in nets:
        net.eval().requires_grad_(False)
    return Pipeline(*nets, V["nano"])


@pytest.mark.parametrize(
    ("name", "asked", "got"),
    [
        ("dev", None, (4.0, 1.0)),
        ("dev", 2.5, (2.5, 1.0)),
        ("klein-4b", None, (None, 1.0)),
        ("klein-4b", 5.0, (None, 1.0)),
        ("klein-base-9b", 0, (None, 4.0)),
        ("klein-base-9b", 2.0, (None, 2.0)),
        ("nano", None, (None, 1.0)),
    ],
)
def test_what_guidance_means(name, asked, got):
    assert split(V[name], asked) == got


def test_cfg():
    positive, negative = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(cfg(positive, negative, 1.0), positive)
    torch.testing.assert_close(cfg(positive, negative, 3.0), negative + 3 * (positive - negative))


def test_a_negative_is_asked_for():
    check_negative(V["klein-base-4b"], 4.0, True)
    check_negative(V["klein-4b"], 1.0, False)
    with pytest.raises(Flux2Error, match=r"klein base 4B needs a negative prompt at guidance 4"):
        check_negative(V["klein-base-4b"], 4.0, False)


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "words"),
    [
        ("klein-4b", 50, None, ["distilled for 4 steps: 50"]),
        ("klein-4b", 4, 5.0, ["the value 5 does nothing"]),
        ("klein-9b-kv", 30, 3.5, ["distilled for 4 steps", "does nothing"]),
        ("klein-4b", 8, 1.0, []),
        ("klein-base-4b", 4, 4.0, ["is not distilled: with 4 steps"]),
        ("dev", 8, None, ["is not distilled: with 8 steps"]),
        ("dev", 28, 2.5, []),
        ("nano", 4, 3.0, []),
        ("klein-4b", 0, 0.0, []),
    ],
)
def test_advice_about_steps_and_guidance(name, steps, guidance, words):
    said = advice(V[name], steps, guidance)
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))


def test_euler_is_exact_on_a_straight_path():
    """v = noise - picture everywhere: any number of steps lands on the picture."""
    picture, noise = torch.randn(2, 128, 4, 4), torch.randn(2, 128, 4, 4)
    seen = []
    out = denoise(
        lambda x, t: noise - picture,
        noise,
        schedule.sigmas(5, width=64, height=64),
        on_step=lambda i, n, x0: seen.append((i, n, (x0 - picture).abs().max())),
    )
    torch.testing.assert_close(out, picture, atol=1e-5, rtol=0)  # observed 7e-7
    assert [step[:2] for step in seen] == [(i, 5) for i in range(5)]
    assert max(step[2] for step in seen) < 1e-5  # observed 1e-6


def test_euler_converges_in_first_order():
    """dx/ds = x from s = 1 to 0 is x / e: twice the steps, half the error."""
    x = torch.ones(1, 128, 1, 1, dtype=torch.float64)

    def error(n):
        out = denoise(lambda x, t: x, x, torch.linspace(1, 0, n + 1, dtype=torch.float64))
        return float((out - torch.exp(torch.tensor(-1.0))).abs().max())

    assert 1.9 < error(20) / error(40) < 2.1  # observed 2.03


def test_a_run_can_be_stopped():
    def stop(i, n, x0):
        if i == 1:
            raise KeyboardInterrupt

    calls = []
    with pytest.raises(KeyboardInterrupt):
        denoise(
            lambda x, t: calls.append(t) or x, torch.ones(1), torch.linspace(1, 0, 6), on_step=stop
        )
    assert len(calls) == 2


def test_velocity_with_and_without_cfg():
    calls = []

    def model(x, t, context, guidance, references, controls):
        calls.append((context.shape, guidance, references))
        return x * context.mean()

    x, t = torch.ones(3, 128, 2, 2), torch.ones(3)
    one, zero = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
    assert torch.equal(
        velocity(model, one, negative=zero, scale=3.0, references=("r",))(x, t), 3 * x
    )
    assert [c[2] for c in calls] == [("r",), ("r",)] and calls[0][0] == (3, 5, 8)
    assert torch.equal(velocity(model, one, embedded=2.5)(x, t), x)
    assert torch.equal(calls[-1][1], torch.full((3,), 2.5)) and len(calls) == 3


def test_a_picture(pipe):
    options = {
        "seed": 3,
        "steps": 2,
        "references": [torch.rand(70, 90, 3), Image.new("RGB", (64, 64))],
    }
    image = pipe("a red circle", **options)
    assert isinstance(image, Image.Image) and image.size == (128, 128)
    x = pipe.sample("a red circle", **options)
    assert torch.equal(x, pipe.sample("a red circle", **options))
    for change in ({"seed": 4}, {"references": []}, {"guidance": 3.0}, {"steps": 3}):
        assert not torch.equal(x, pipe.sample("a red circle", **options | change)), change
    assert not torch.equal(x, pipe.sample("a blue circle", **options))


def test_auto_is_the_variants(pipe):
    seen = []
    pipe.sample("a", on_step=lambda i, n, x0: seen.append((n, x0.shape)))
    assert seen == [(V["nano"].steps, (1, 128, 8, 8))] * V["nano"].steps


def test_size(pipe):
    assert pipe("a", width=96, height=160, steps=1).size == (96, 160)
    with pytest.raises(Flux2Error, match=r"multiples of 16. Seen: 100 x 128"):
        pipe("a", width=100, steps=1)


def test_names_of_references(pipe):
    """@hero is image 1 for the model."""
    from flux2_pack.flux2_core.references import Reference

    picture = torch.rand(64, 64, 3)
    options = {"references": [Reference(picture, "hero")], "steps": 1}
    a, b = (pipe.sample(f"{word} on pink background", **options) for word in ("@hero", "image 1"))
    assert torch.equal(a, b)


def test_noise_is_the_seeds(pipe):
    """The first estimate comes from the noise of `latents.noise`, whoever else draws numbers."""
    seen = []
    torch.randn(7)
    pipe.sample("a", seed=9, steps=1, on_step=lambda i, n, x0: seen.append(x0))
    x = latents.noise(9, width=128, height=128)
    v = pipe.model(x, torch.ones(1), pipe.encode_text("a"))
    assert torch.equal(seen[0], x - v)


def test_wrong_text_encoder(pipe):
    wide = Flux2Transformer(configs.TransformerConfig(128, 7680, 1, 1, guidance_embed=False))
    with pytest.raises(Flux2Error, match=r"reads 7680. Load Qwen3 4B"):
        Pipeline(wide, pipe.vae, pipe.text, V["klein-4b"])


def test_a_run_that_overflows_is_a_sentence():
    x, sigmas = torch.zeros(1, 128, 4, 4), torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(Flux2Error, match="the picture would be black"):
        denoise(lambda x, t: torch.full_like(x, float("nan")), x, sigmas)
