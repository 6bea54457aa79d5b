"""Train nano's forms on the frozen base: low-rank changes of its layers.

    python tests/train_nano_forms.py distilled --pool FOLDER [--minutes 30]
    python tests/train_nano_forms.py guided --pool FOLDER [--minutes 30]

distilled: four steps instead of many. From the student's own state at each of its four times the
base walks to the next one in small steps; the student learns to get there in one.
guided: one forward with the guidance as an input instead of two. At a random time the student learns
the base's CFG velocity for a guidance of 1 to 8; 0 means 1.
References and the KV form are learnt as the base learns them. Each resumes from its own file.
"""

import argparse
import json
import random
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from nano_batches import STAGES, Batch, Data
from safetensors.torch import load_file
from torch import Tensor, nn
from train_nano import HOME, KV, Nano, resume, save_atomic, seen_before

from flux2_pack.flux2_core.configs import NANO_GUIDED
from flux2_pack.flux2_core.guidance import cfg
from flux2_pack.flux2_core.layers import MLPEmbedder
from flux2_pack.flux2_core.nano.forms import FORMS, PREFIX
from flux2_pack.flux2_core.schedule import mu, shift

RANK = 32
STEPS = 4
SMALL_STEPS = (2, 2, 3, 4)  # of the base within each of the student's
GUIDANCE = (1.0, 8.0)


class Adapter(nn.Module):
    """B A beside a linear layer; nothing at first."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.on = True
        self.A = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, RANK))
        layer.register_forward_hook(self.add)

    def add(self, layer, args, out):
        if not self.on:
            return None
        x = args[0]
        return out + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class Embedder(MLPEmbedder):
    """Of the guidance: float32 weights among bf16 ones."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Form(nn.Module):
    """The base and what a form adds to it; `student` switches between the two."""

    def __init__(self, kind: str, base: Path):
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.model = kind, Nano()
        resume(self.model, base)
        self.model = self.model.bfloat16().requires_grad_(False).eval()
        transformer = self.model.transformer
        layers = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        self.names = list(layers)
        self.adapters = nn.ModuleList(Adapter(layer) for layer in layers.values())
        if kind == "guided":
            transformer.config = NANO_GUIDED
            transformer.guidance_in = Embedder(NANO_GUIDED.hidden_size, nn)
            nn.init.zeros_(transformer.guidance_in.out_layer.weight)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the form's file holds, under its names."""
        found = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            found[f"{PREFIX}{name}.lora_A.weight"] = adapter.A
            found[f"{PREFIX}{name}.lora_B.weight"] = adapter.B
        if self.kind == "guided":
            extra = self.model.transformer.guidance_in.named_parameters()
            found |= {f"guidance_in.{name}": p for name, p in extra}
        return found

    def student(self, on: bool) -> None:
        for adapter in self.adapters:
            adapter.on = on

    def forward(self, batch: Batch, x: Tensor, t: Tensor, context, references, controls, g=None):
        return self.model.transformer(
            x.bfloat16(),
            t,
            context,
            g,
            references=references,
            controls=controls,
            numbers=batch.numbers,
        ).float()

    @torch.no_grad()
    def base(self, *args) -> Tensor:
        self.student(False)
        v = self(*args)
        self.student(True)
        return v

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        return self.model.text(*self.model.tokenize(prompts))


class Case:
    """A batch, ready for both networks."""

    def __init__(self, form: Form, batch: Batch, generator):
        self.form, self.batch = form, batch
        blur = 0.15 * torch.rand(1, generator=generator).item()
        self.references = [
            (r + blur * torch.randn(r.shape, generator=generator)).bfloat16()
            for r in batch.references
        ]
        kv = batch.references and torch.rand(1, generator=generator).item() < 1 / 3
        self.controls = KV if kv else None
        self.context = form.text(batch.prompts)
        self.noise = torch.randn(batch.latents.shape, generator=generator)

    def velocity(self, run, x: Tensor, t: Tensor, context=None, g=None) -> Tensor:
        context = self.context if context is None else context
        return run(self.batch, x, t, context, self.references, self.controls, g)


def distilled(case: Case, generator):
    """Losses of one walk of the student, from noise to picture."""
    height, width = case.noise.shape[2:]
    u = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    bend = mu(height * width, STEPS)
    x, n = case.noise, len(case.noise)
    for i, parts in enumerate(SMALL_STEPS):
        times = shift(torch.linspace(u[i], u[i + 1], parts + 1, dtype=torch.float64), bend)
        times, goal = times.float(), x
        for now, after in pairwise(times):
            goal = goal + (after - now) * case.velocity(case.form.base, goal, now.expand(n))
        v = case.velocity(case.form, x, times[0].expand(n))
        span = times[-1] - times[0]
        yield (v - (goal - x) / span).square().mean()
        x = (x + span * v).detach()


def guided(case: Case, generator):
    """One loss, against CFG of the base."""
    x0, n = case.batch.latents.float(), len(case.noise)
    t = torch.sigmoid(1.2 * torch.randn(n, generator=generator) + 0.9)
    at = t[:, None, None, None]
    x = at * case.noise + (1 - at) * x0
    g = torch.empty(n).uniform_(*GUIDANCE, generator=generator)
    stock = torch.rand(n, generator=generator) < 0.12
    g[stock] = torch.randint(0, 2, (n,), generator=generator)[stock].float()
    empty = case.form.text([""] * n)
    positive = case.velocity(case.form.base, x, t)
    negative = case.velocity(case.form.base, x, t, empty)
    wanted = cfg(positive, negative, g.clamp(min=1.0)[:, None, None, None])
    error = (case.velocity(case.form, x, t, g=g) - wanted).square().mean((1, 2, 3))
    yield (error / (1 + 0.1 * (g.clamp(min=1) - 1).square())).mean()


LOSSES = {"distilled": distilled, "guided": guided}


def train(options) -> None:
    torch.set_num_threads(options.threads)
    form = Form(options.form, options.base)
    file = options.out / FORMS[f"nano-{options.form}"]
    params, samples = form.trained(), 0
    if file.exists() and not options.fresh:
        for name, tensor in load_file(file).items():
            params[name].data.copy_(tensor)
    ema = {name: p.detach().clone() for name, p in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=options.rate, weight_decay=0.0)
    seed = random.SystemRandom().randrange(2**31)
    data = Data(options.pool, seed, STAGES[options.stage], options.tokens)
    generator = torch.Generator().manual_seed(seed)
    begun, saved, step, seen = time.time(), time.time(), 0, []
    while (share := (time.time() - begun) / 60 / options.minutes) < 1:
        scale = min(1.0, (step + 1) / 20) * min(1.0, max(0.02, (1 - share) / 0.6))
        batch = data.batch()
        samples += len(batch.latents)
        for loss in LOSSES[options.form](Case(form, batch, generator), generator):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = options.rate * scale
            optimizer.step()
            step += 1
            seen.append(loss.item())
            decay = min(0.99, (step + 1) / (step + 10))
            for name, p in params.items():
                ema[name].lerp_(p.detach(), 1 - decay)
        if len(seen) >= 100:
            minutes = (time.time() - begun) / 60
            mean = sum(seen) / len(seen)
            print(
                f"{minutes:6.1f} min  step {step}  samples {samples}  loss {mean:.4f}", flush=True
            )
            seen.clear()
        if time.time() - saved > 60 * options.save_every:
            save(ema, options, samples, file)
            saved = time.time()
    save(ema, options, samples, file)


def save(ema: dict[str, Tensor], options, samples: int, file: Path) -> None:
    about = {"variant": f"nano-{options.form}", "base": seen_before(options.base)}
    about |= {"samples": samples}
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.bfloat16() for name, tensor in ema.items()}
    save_atomic(state, file, {"flux2_kit": json.dumps(about)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("form", choices=LOSSES)
    parser.add_argument("--pool", type=Path, required=True, help="folder of encoded pictures")
    parser.add_argument("--base", type=Path, default=HOME, help="folder of the base's weights")
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--fresh", action="store_true", help="start anew")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--stage", default="wider", choices=STAGES)
    parser.add_argument("--tokens", type=int, default=2500, help="tokens a batch")
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
