"""Distil nano's autoencoder from TAEF2, so that its latents are FLUX.2's.

    python tests/train_autoencoder.py --teacher FOLDER --pool FOLDER [--minutes 30]

The encoder learns TAEF2's latents, the decoder to draw the picture from the teacher's latents and
from the student's own. Resumes from flux2_core/nano/nano_vae.safetensors with a fresh optimiser.
`--evaluate` prints the figures and trains nothing.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from nano_pool import build, plan, scene, scenes, some, taef2

from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.configs import AutoEncoderConfig

HOME = Path(__file__).resolve().parents[1] / "flux2_core" / "nano" / "nano_vae.safetensors"
CONFIG = AutoEncoderConfig(encoder_channels=16, decoder_channels=16)


def fresh() -> AutoEncoder:
    """Its statistics are the identity: TAEF2's latents are normalised already."""
    vae = AutoEncoder(CONFIG)
    vae.bn.running_var.fill_(1 - vae.bn.eps)
    return vae


def other_picture(r: random.Random, side: int) -> Image.Image:
    """Not of nano's world: a gradient with boxes, spots, lines and letters on it."""
    corners = np.array([[[r.randrange(256) for _ in range(3)] for _ in range(2)] for _ in range(2)])
    image = Image.fromarray(corners.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(r.randrange(6)):
        x, y, w, h = (r.randrange(side) for _ in range(4))
        color = tuple(r.randrange(256) for _ in range(3))
        kind = r.choice(("box", "spot", "line", "letter"))
        if kind == "box":
            pen.rectangle((x, y, x + w // 2, y + h // 2), color)
        elif kind == "spot":
            pen.ellipse((x, y, x + w // 2, y + h // 2), color)
        elif kind == "line":
            pen.line((x, y, w, h), color, r.randint(1, 6))
        else:
            pen.text((x, y), r.choice("ABCDEFGHKMRSTX"), color, font_size=r.randint(12, side // 2))
    return image


def tensor(pictures) -> torch.Tensor:
    return (
        torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5
        - 1
    )


class Data:
    """(pixels in [-1, 1], teacher latents) of one size."""

    def __init__(self, pool: Path, teacher, seed: int):
        self.random = random.Random(seed)
        self.sets = {64: self.read(pool, ["one_64"]), 128: self.read(pool, ["one_128", "two_128"])}
        pictures = tensor([other_picture(self.random, 64) for _ in range(1200)])
        with torch.inference_mode():
            latents = [
                taef2.encode(teacher, part).clone() for part in pictures.bfloat16().split(64)
            ]
        self.others = (((pictures + 1) * 127.5).round().byte(), torch.cat(latents))

    def read(self, pool: Path, names) -> tuple[torch.Tensor, torch.Tensor]:
        files = [
            torch.load(p, mmap=True) for name in names for p in sorted(pool.glob(f"{name}.*.pt"))
        ]
        return torch.cat([f["pixels"] for f in files]), torch.cat([f["latents"] for f in files])

    def batch(self, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`pictures` of 64 pixels, or a fourth as many of 128."""
        draw = self.random.random()
        side = 64 if draw < 0.65 else 128
        pixels, latents = self.others if draw < 0.2 else self.sets[side]
        count = pictures if side == 64 else pictures // 4
        rows = [self.random.randrange(len(pixels)) for _ in range(count)]
        return pixels[rows] / 127.5 - 1, latents[rows].float()


def loss(vae: AutoEncoder, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    own = vae.encode(pixels)
    source = latents if torch.rand(()) < 0.5 else own.float()
    drawn = vae.decode(source.to(pixels)).float()
    picture = F.mse_loss(drawn, pixels) + 0.1 * F.l1_loss(drawn, pixels)
    return F.mse_loss(own.float(), latents) + 4 * picture


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))).mean())


@torch.inference_mode()
def evaluate(vae: AutoEncoder, teacher: Path, count: int = 64) -> dict[str, float]:
    """Mean PSNR in dB on fresh scenes of 128 pixels, and TAEF2's own for comparison."""
    r = random.Random(12345)
    made = [scene(row) for row in some(count, 0.3, 12345)]
    x = tensor([scenes.draw(s) for s in made])
    encoder, decoder = taef2.encoder(), taef2.decoder()
    encoder.load_state_dict(load_file(teacher / "taef2_encoder.safetensors"))
    decoder.load_state_dict(load_file(teacher / "taef2_decoder.safetensors"))
    z = vae.encode(x)
    theirs = taef2.encode(encoder, x)
    strange = tensor([other_picture(r, 64) for _ in range(count // 2)])
    return {
        "PSNR": psnr(x, vae.decode(z).clamp(-1, 1)),
        "PSNR TAEF2 decodes ours": psnr(x, taef2.decode(decoder, z)),
        "PSNR TAEF2": psnr(x, taef2.decode(decoder, theirs)),
        "PSNR we decode TAEF2's": psnr(x, vae.decode(theirs).clamp(-1, 1)),
        "PSNR other pictures": psnr(strange, vae.decode(vae.encode(strange)).clamp(-1, 1)),
        "latent error": float((z - theirs).norm() / theirs.norm()),
    }


def save(vae: AutoEncoder, path: Path) -> None:
    """bf16 under BFL names; the statistics stay float32, which is what they are read as."""
    state = {
        k: v.contiguous() if k.startswith("bn.") else v.bfloat16().contiguous()
        for k, v in vae.state_dict().items()
    }
    kit = json.dumps(
        {"variant": "nano", "kind": "vae", "teacher": "TAEF2 (madebyollin/taesd, MIT)"}
    )
    save_file(state, path.with_suffix(".tmp"), {"flux2_kit": kit})
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="folder of TAEF2's weights")
    parser.add_argument("--pool", type=Path, help="folder of encoded pictures")
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--batch", type=int, default=8, help="pictures of 64 pixels a step")
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    vae = fresh()
    if options.out.exists():
        vae.load_state_dict(
            {
                k: v.float() if v.is_floating_point() else v
                for k, v in load_file(options.out).items()
            }
        )
    if not options.evaluate:
        train(vae, options)
    for name, value in evaluate(vae.eval(), options.teacher).items():
        print(f"{name}: {value:.3f}")


class Optimizers:
    """Muon for the convolutions, each seen as the matrix (outputs, inputs x 9), AdamW for the rest."""

    def __init__(self, vae: AutoEncoder, rate: float):
        inner = [p for p in vae.parameters() if p.ndim == 4 and min(p.shape[:2]) >= 16]
        self.convolutions = inner
        self.matrices = [
            torch.nn.Parameter(p.detach().reshape(p.shape[0], -1).clone()) for p in inner
        ]
        rest = [p for p in vae.parameters() if all(p is not q for q in inner)]
        self.muon = torch.optim.Muon(
            self.matrices, lr=rate, weight_decay=0.001, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.001, fused=True)

    def step(self, rate: float) -> None:
        for matrix, p in zip(self.matrices, self.convolutions, strict=True):
            matrix.grad, p.grad = p.grad.reshape(matrix.shape), None
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.adam.zero_grad()
        with torch.no_grad():
            for matrix, p in zip(self.matrices, self.convolutions, strict=True):
                p.copy_(matrix.reshape(p.shape))


def train(vae: AutoEncoder, options) -> None:
    if not all(any(options.pool.glob(f"{name}.*.pt")) for name in plan()):
        build(options.teacher, options.pool)
    teacher = taef2.encoder()
    teacher.load_state_dict(load_file(options.teacher / "taef2_encoder.safetensors"))
    data = Data(options.pool, teacher.bfloat16(), random.SystemRandom().randrange(2**31))
    vae.train().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=False
    )
    optimizers = Optimizers(vae, options.rate)
    begun, saved, step, mean = time.time(), time.time(), 0, None
    while (share := (time.time() - begun) / 60 / options.minutes) < 1:
        rate = (
            options.rate
            * min(1.0, (step + 1) / 50)
            * max(0.02, 0.5 + 0.5 * math.cos(math.pi * share))
        )
        pixels, latents = data.batch(options.batch)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(vae, pixels.contiguous(memory_format=torch.channels_last), latents)
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(rate)
        average.update_parameters(vae)
        step += 1
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        if step % 50 == 0:
            print(
                f"{(time.time() - begun) / 60:5.1f} min  step {step}  loss {mean:.4f}", flush=True
            )
        if time.time() - saved > 240:
            save(average.module, options.out)
            print(evaluate(average.module, options.teacher, 8), flush=True)
            saved = time.time()
    vae.load_state_dict(average.module.state_dict())
    save(vae, options.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
