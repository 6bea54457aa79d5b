"""nano's other forms: deltas on the base, and what they are for."""

import numpy as np
import pytest
import torch

from flux2_pack.flux2_core import lora
from flux2_pack.flux2_core.checkpoint import NANO_FILES, load_transformer
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.nano.forms import FORMS, form_file
from flux2_pack.flux2_core.pipeline import Pipeline

PROMPTS = (
    "a red circle left on white background",
    "a black cross bottom on gray background",
    "a green ring center on pink background",
    "a red circle left and a blue square right on tan background",
    "a yellow triangle top and a purple cross bottom on white background",
)


def velocity(model, guidance=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 128, 8, 8, generator=generator)
    text = torch.randn(2, 32, 384, generator=generator)
    given = None if guidance is None else torch.full((2,), float(guidance))
    with torch.inference_mode():
        return model.float()(x, torch.tensor([0.9, 0.6]), text, given)


def difference(a, b) -> float:
    return float((a - b).norm() / b.norm())


def test_all_files_together_are_small():
    files = [*NANO_FILES.values(), *map(form_file, FORMS)]
    assert sum(file.stat().st_size for file in files) < 32 * 2**20


def test_the_distilled_form_is_a_lora_on_the_base():
    """The file alone, through the LoRA reader, makes the same model: it shows LoRA at work."""
    base = load_transformer("nano", dtype=torch.float32)
    plain = velocity(base)
    applied = lora.apply(base, form_file("nano-distilled"))
    form = velocity(load_transformer("nano-distilled"))
    assert difference(velocity(base), form) < 1e-5  # observed 6.4e-7
    assert difference(plain, form) > 0.01  # observed 0.083
    assert not applied.report.skipped


@pytest.mark.parametrize("name", FORMS)
def test_a_form_knows_what_it_is(name):
    model = load_transformer(name)
    assert model.variant.name == name
    assert model.config.guidance_embed == (model.variant.guidance_kind == "embedded")


def test_distilled_draws_what_is_asked_in_four_steps():
    pipe, steps = Pipeline.load("nano-distilled"), []
    for seed, prompt in enumerate(PROMPTS):
        picture = pipe(prompt, seed=seed, on_step=lambda i, n, x: steps.append(n))
        report = scenes.check(picture, prompt)
        assert report.ok, f"{prompt}: {report}"
    assert steps == [4] * 4 * len(PROMPTS)


def test_the_guided_form_draws_what_is_asked():
    pipe = Pipeline.load("nano-guided")
    for seed, prompt in enumerate(PROMPTS[2:]):
        report = scenes.check(pipe(prompt, seed=seed), prompt)
        assert report.ok, f"{prompt}: {report}"


def test_embedded_guidance_does_what_cfg_does():
    """One forward with a number, near the base's two forwards; at 1 and 0 near the base alone."""
    base, guided = Pipeline.load("nano"), Pipeline.load("nano-guided")
    t = torch.tensor([0.95, 0.85])
    text, empty = base.text.encode(list(PROMPTS[:2])), base.text.encode(["", ""])
    with torch.inference_mode():
        drawn = [to_tensor(scenes.draw(scenes.parse(prompt))) for prompt in PROMPTS[:2]]
        picture, at = base.vae.encode(torch.cat(drawn)), t[:, None, None, None]
        noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(2))
        x = at * noise + (1 - at) * picture
        positive, negative = base.model(x, t, text), base.model(x, t, empty)
        for value in (0.0, 1.0):
            seen = guided.model(x, t, text, torch.full((2,), value))
            assert difference(seen, positive) < 0.1, value  # observed 0.057
        for value in (2.0, 4.0, 8.0):
            target = torch.lerp(negative, positive, value)
            seen = guided.model(x, t, text, torch.full((2,), value))
            away, cfg = seen - positive, target - positive
            assert float((away * cfg).sum() / (away.norm() * cfg.norm())) > 0.8  # observed 0.91
            assert 0.5 < float(away.norm() / cfg.norm()) < 1.5, value  # observed 0.81 to 0.90


def to_tensor(picture) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None] / 127.5 - 1
