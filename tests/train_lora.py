"""A small LoRA for nano, trained with PEFT: the word "dark" becomes the colour brown.

    python tests/train_lora.py [--minutes 4] [--out tests/data/dark_lora.safetensors]

nano knows neither. Half of the samples are of its own world, so that nothing else changes. The file
has PEFT's own keys; tests/core/test_lora_nano.py writes it in other dialects and counts pictures.
"""

import argparse
import random
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
pack = types.ModuleType("flux2_pack")
pack.__path__ = [str(ROOT)]
sys.modules.setdefault("flux2_pack", pack)

from flux2_pack.flux2_core.nano import scenes  # noqa: E402
from flux2_pack.flux2_core.pipeline import Pipeline  # noqa: E402
from flux2_pack.flux2_core.quantised import BLOCK_LINEARS  # noqa: E402

WORD, BROWN = "dark", (120, 70, 25)
RANK, BATCH, RATE = 4, 16, 3e-3


def scene(r: random.Random) -> scenes.Scene:
    offset = (r.uniform(-0.02, 0.02), r.uniform(-0.02, 0.02))
    thing = scenes.Thing(
        r.choice(list(scenes.SHAPES)), r.choice(list(scenes.COLORS)), r.choice(list(scenes.PLACES)),
        r.uniform(*scenes.SIZES), offset,
    )  # fmt: skip
    return scenes.Scene((thing,), r.choice(list(scenes.BACKGROUNDS)))


def brown(wanted: scenes.Scene) -> tuple[str, np.ndarray]:
    """The scene's prompt with the new word, and its picture with the new colour."""
    prompt = scenes.describe(wanted).replace(str(wanted.things[0].color), WORD)
    prompt = prompt.replace("an dark", "a dark")
    drawn = np.asarray(
        scenes.draw(replace(wanted, things=(replace(wanted.things[0], color="black"),)))
    )
    ground = np.array(scenes.BACKGROUNDS[str(wanted.background)], np.float32)
    black = np.array(scenes.COLORS["black"], np.float32)
    share = np.linalg.norm(drawn - ground, axis=-1) / np.linalg.norm(black - ground)
    share = share.clip(0, 1)[..., None]
    return prompt, (ground * (1 - share) + np.array(BROWN, np.float32) * share).astype(np.uint8)


def samples(pipe: Pipeline, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and contexts, half of them brown."""
    r, prompts, pictures = random.Random(seed), [], []
    for i in range(count):
        wanted = scene(r)
        prompt, picture = brown(wanted)
        if i % 2:
            prompt, picture = scenes.describe(wanted), np.asarray(scenes.draw(wanted))
        prompts.append(prompt)
        pictures.append(picture)
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = torch.cat([pipe.vae.encode(part) for part in x.split(32)])
        texts = torch.cat([pipe.text.encode(prompts[i : i + 32]) for i in range(0, count, 32)])
    return latents.clone(), texts.clone()


def main() -> None:
    import peft

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tests" / "data" / "dark_lora.safetensors"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    pipe = Pipeline.load("nano")
    known, texts = samples(pipe, 1024, 1)
    layers = [n for n, _ in pipe.model.named_modules() if BLOCK_LINEARS.search(n)]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)
    model = peft.get_peft_model(pipe.model.requires_grad_(False), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    begun, step = time.time(), 0
    while (share := (time.time() - begun) / 60 / options.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - share)
        rows = torch.randint(len(known), (BATCH,))
        x0, noise = known[rows], torch.randn(BATCH, *known.shape[1:])
        t = torch.sigmoid(1.2 * torch.randn(BATCH) + 1.0)
        at = t[:, None, None, None]
        v = model(at * noise + (1 - at) * x0, t, texts[rows])
        loss = (v - (noise - x0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(
                f"{step} steps, {60 * options.minutes * share:.0f} s, loss {loss.item():.4f}",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.bfloat16().contiguous() for k, v in tensors.items()}, options.out)
    print(f"{options.out.name}: {options.out.stat().st_size / 1024:.0f} kB after {step} steps")


if __name__ == "__main__":
    main()
