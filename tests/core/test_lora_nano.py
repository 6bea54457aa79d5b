"""A LoRA that PEFT trained on nano, in every dialect: the same latents, the same pictures on fp8."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flux2_pack.flux2_core import latents, lora, schedule
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.quantised import quantize
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.tests.core import test_lora

FILE = Path(__file__).resolve().parents[1] / "data" / "dark_lora.safetensors"
BROWN = (120, 70, 25)  # what tests/train_lora.py taught the word "dark"
RANK = 4
PROMPTS = [
    f"a dark {shape} {place} on {ground} background"
    for shape in ("circle", "square", "triangle", "cross", "ring")
    for place, ground in (("left", "white"), ("top", "tan"), ("right", "pink"), ("center", "gray"))
]


@pytest.fixture(scope="module")
def factors():
    """Layer -> A, B, from PEFT's own keys."""
    tensors, out = load_file(FILE), {}
    for key in tensors:
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if part == "A.weight":
            other = key.replace("lora_A", "lora_B")
            out[name] = tensors[key].float(), tensors[other].float()
    return out


@pytest.fixture
def dialects(factors, monkeypatch):
    """The file's factors in twelve dialects, by the writers of test_lora."""
    monkeypatch.setattr(test_lora, "FACTORS", factors)
    monkeypatch.setattr(test_lora, "ALPHA", float(RANK))
    bfl, diffusers = test_lora.bfl, test_lora.diffusers
    down, up = "lora_down.weight", "lora_up.weight"
    return {
        "ai-toolkit": bfl(prefix="diffusion_model."),
        "bare": bfl(),
        "PEFT": bfl(prefix="base_model.model."),
        "kohya": bfl(down, up, "lora_unet_", under=True),
        "diffusers": diffusers(),
        "DiffSynth": diffusers(""),
        "OneTrainer": diffusers("lora_transformer_", down, up, under=True),
    }


def drawn(pipe: Pipeline, steps: int = 8) -> torch.Tensor:
    with torch.inference_mode():
        field = velocity(pipe.model, pipe.text.encode(PROMPTS))
        x = latents.noise(0, width=128, height=128, batch=len(PROMPTS))
        return denoise(field, x, schedule.sigmas(steps, width=128, height=128))


def brown(pipe: Pipeline, x: torch.Tensor) -> list[bool]:
    """Whether each picture's object has the new colour."""
    with torch.inference_mode():
        pictures = (pipe.vae.decode(x).clamp(-1, 1).movedim(1, -1).numpy() + 1) * 127.5
    found = []
    for picture in pictures:
        ground = np.median(
            np.concatenate((picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3))), 0
        )
        object_ = picture[np.linalg.norm(picture - ground, axis=-1) > 50]
        color = np.median(object_, 0) if len(object_) > 160 else np.array([255, 0, 255])
        found.append(bool(np.linalg.norm(color - BROWN) < 60))
    return found


def test_seven_dialects_give_the_same_latents(dialects, factors, tmp_path):
    pipe = Pipeline.load("nano")
    for name, (a, b) in factors.items():
        weight = pipe.model.get_submodule(name).weight
        weight.data.copy_(weight.double() + b.double() @ a.double())
    wanted = drawn(pipe, 4)
    for dialect, tensors in dialects.items():
        pipe = Pipeline.load("nano")
        report = lora.apply(pipe.model, test_lora.save(tmp_path, tensors)).report
        assert report.used == len(tensors) and not report.skipped, dialect
        error = ((drawn(pipe, 4) - wanted).abs().max() / wanted.std()).item()
        assert error < 1e-4, dialect  # seen at most 9.1e-6


def test_what_it_was_trained_for(tmp_path):
    pipe = Pipeline.load("nano")
    before = sum(brown(pipe, drawn(pipe)))
    lora.apply(pipe.model, FILE)
    after = sum(brown(pipe, drawn(pipe)))
    assert before <= 4  # of 20
    assert after >= 16


def test_the_same_pictures_on_fp8(dialects, tmp_path):
    """Beside fp8 codes, which stay as they are."""
    plain = Pipeline.load("nano")
    lora.apply(plain.model, FILE)
    wanted, first = brown(plain, drawn(plain)), None
    for dialect in ("ai-toolkit", "kohya", "diffusers"):
        pipe = Pipeline.load("nano")
        quantize(pipe.model, "fp8")
        lora.apply(pipe.model, test_lora.save(tmp_path, dialects[dialect]))
        x = drawn(pipe)
        first = x if first is None else first
        assert (x - first).abs().max() < 1e-3, dialect
        assert abs(sum(brown(pipe, x)) - sum(wanted)) <= 1
