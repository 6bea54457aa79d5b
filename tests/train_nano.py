"""Train nano: the flow transformer and its text encoder, together.

    python tests/train_nano.py --pool FOLDER [--teacher FOLDER] [--stage full] [--minutes 60]

It resumes from the weights in flux2_core/nano with a fresh optimiser, and writes them back every
few minutes and at the end: run it again to train on. One process a core, gradients averaged.
The mixes of the stages are in nano_batches.py.

Which reference a number means is hard to find out from pictures alone: two hours did not do it.
Linear probes, thrown away afterwards, ask the text rows at the word that names a reference what that
reference shows; with them it takes two minutes, and the pictures follow. In the same way probes ask
the picture's tokens which letter they show.
"""

import argparse
import json
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from nano_batches import STAGES, Batch, Data
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nano_pool import BACKGROUNDS, COLORS, PLACES, SHAPES, build

from flux2_pack.flux2_core.configs import NANO, NANO_TEXT
from flux2_pack.flux2_core.nano.vocabulary import NUMBERS, WORDS, tokenizer_json
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.tokenizer import nano_tokenizer
from flux2_pack.flux2_core.transformer import Controls, Flux2Transformer

HOME = Path(__file__).resolve().parents[1] / "flux2_core" / "nano"
KV = Controls(kv_references=True)
PROBES = 3  # after the double blocks and after the first two single blocks
PROBE_WEIGHT = 0.1
LETTERS = 26
NUMBER_IDS = torch.tensor([WORDS.index(number) for number in NUMBERS])
ATTRIBUTES = (len(SHAPES), len(COLORS), len(PLACES), len(BACKGROUNDS))


class Observed(Flux2Transformer):
    """The transformer, keeping the text rows between blocks, with references at any numbers."""

    def forward(self, *args, numbers=(), **kw):
        self.numbers, self.text_rows, self.picture_rows = numbers, [], []
        return super().forward(*args, **kw)

    def positions(self, text, size, shapes, controls, device):
        at = dict(zip(self.numbers, shapes, strict=True))
        shapes = tuple(at.get(n, (0, 0)) for n in range(1, max(at, default=0) + 1))
        return super().positions(text, size, shapes, controls, device)

    def double(self, i, s):
        img, txt = super().double(i, s)
        if i == len(self.double_blocks) - 1:
            self.text_rows.append(txt)
            self.picture_rows.append(img[:, : s.picture])
        return img, txt

    def single(self, i, s):
        x = super().single(i, s)
        if i < PROBES - 1:
            self.text_rows.append(x[:, : s.text])
            self.picture_rows.append(x[:, s.text : s.text + s.picture])
        return x


class Nano(torch.nn.Module):
    """Both networks, so that one state dict and one backward serve them."""

    def __init__(self):
        super().__init__()
        self.transformer, self.text = Observed(NANO), TextEncoder(NANO_TEXT)
        self.probes = torch.nn.ModuleList(
            torch.nn.Linear(NANO.hidden_size, sum(ATTRIBUTES)) for _ in range(PROBES)
        )
        self.letters = torch.nn.ModuleList(
            torch.nn.Linear(NANO.hidden_size, LETTERS + 1) for _ in range(PROBES)
        )
        self.tokenize = nano_tokenizer().encode

    def start(self):
        """Fresh weights: modulation and the output start at zero."""
        t = self.transformer
        for layer in (
            t.double_stream_modulation_img,
            t.double_stream_modulation_txt,
            t.single_stream_modulation,
        ):
            torch.nn.init.zeros_(layer.lin.weight)
        torch.nn.init.zeros_(t.final_layer.linear.weight)
        torch.nn.init.zeros_(t.final_layer.adaLN_modulation["1"].weight)

    def loss(
        self, batch: Batch, generator, tilt: float
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Mean square error of the velocity at a time drawn for each picture; the probes' cross
        entropy (at the word that names a reference the text rows should know what it shows, and the
        picture's tokens their letter); and how often the last probe knows shape and color, or the
        letter."""
        dtype = self.transformer.img_in.weight.dtype
        ids, mask = self.tokenize(batch.prompts)
        context = self.text(ids, mask)
        x0, n = batch.latents.float(), len(batch.latents)
        if not batch.references:
            small = x0[0, 0].numel() <= 100 and batch.letters is None
            tilt = 0.5 if small else 1.0  # larger pictures need more noise
        t = torch.sigmoid(1.2 * torch.randn(n, generator=generator) + tilt)
        noise = torch.randn(x0.shape, generator=generator)
        at = t[:, None, None, None]
        # a little noise on references: at work they come from nano's own encoder, not the teacher's
        blur = 0.15 * torch.rand(1, generator=generator).item()
        references = [
            (r + blur * torch.randn(r.shape, generator=generator)).to(dtype)
            for r in batch.references
        ]
        controls = KV if references and torch.rand(1, generator=generator).item() < 1 / 3 else None
        x = (at * noise + (1 - at) * x0).to(dtype)
        v = self.transformer(
            x, t, context, references=references, controls=controls, numbers=batch.numbers
        )
        error = (v.float() - (noise - x0)).square().mean()
        if batch.letters is not None:
            return error, *self.read_letters(batch.letters.flatten())
        if not batch.named:
            return error, torch.zeros(()), 0.0
        wanted = torch.tensor(batch.named)
        where = torch.isin(ids, NUMBER_IDS)
        entropy, known = 0.0, 0.0
        for probe, rows in zip(self.probes, self.transformer.text_rows, strict=True):
            guesses = probe(F.layer_norm(rows[where], rows.shape[-1:])).float().split(ATTRIBUTES, 1)
            for guess, truth in zip(guesses, wanted.T, strict=True):
                entropy = entropy + F.cross_entropy(guess, truth) / PROBES
            right = [g.argmax(1) == w for g, w in zip(guesses, wanted.T, strict=True)]
            known = (right[0] & right[1]).float().mean().item()
        return error, entropy, known

    def read_letters(self, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
        weight = torch.full((LETTERS + 1,), 1.0)
        weight[0] = 0.1  # most tokens show none
        entropy, known = torch.zeros(()), 0.0
        for probe, rows in zip(self.letters, self.transformer.picture_rows, strict=True):
            guess = probe(F.layer_norm(rows, rows.shape[-1:])).float().flatten(0, 1)
            entropy = entropy + F.cross_entropy(guess, wanted, weight) / PROBES
            shown = wanted > 0
            known = (guess[shown].argmax(1) == wanted[shown]).float().mean().item()
        return entropy, known


class Optimizer:
    """Muon for the blocks' matrices, each rank its share, AdamW for the rest; bf16 weights at work,
    float32 masters behind them."""

    def __init__(self, model: Nano, rank: int, ranks: int, rate: float):
        self.work = list(model.parameters())
        self.masters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.work]
        names = [name for name, _ in model.named_parameters()]
        inner = [
            ("blocks." in n or "text.model.layers" in n) and p.ndim == 2
            for n, p in zip(names, self.work, strict=True)
        ]
        self.matrices = [m for m, i in zip(self.masters, inner, strict=True) if i]
        self.owner = [i % ranks for i in range(len(self.matrices))]
        mine = [m for m, o in zip(self.matrices, self.owner, strict=True) if o == rank]
        rest = [m for m, i in zip(self.masters, inner, strict=True) if not i]
        self.muon = torch.optim.Muon(
            mine, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(
            rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.rate, self.rank, self.ranks = rate, rank, ranks

    def step(self, scale: float) -> float:
        grads = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).float().flatten()
                for p in self.work
            ]
        )
        for p in self.work:
            p.grad = None
        if self.ranks > 1:
            dist.all_reduce(grads)
            grads /= self.ranks
        norm = grads.norm().item()
        grads *= min(1.0, 1.0 / (norm + 1e-6))
        for master, part in zip(
            self.masters, grads.split([p.numel() for p in self.work]), strict=True
        ):
            master.grad = part.view_as(master)
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * scale
            optimizer.step()
        if self.ranks > 1:
            self.exchange()
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.work], [m.data for m in self.masters])
        return norm

    def exchange(self) -> None:
        """Every rank gets the matrices that the others updated."""
        for owner in range(self.ranks):
            theirs = [m for m, o in zip(self.matrices, self.owner, strict=True) if o == owner]
            flat = torch.cat([m.data.flatten() for m in theirs])
            dist.broadcast(flat, owner)
            if owner != self.rank:
                for m, part in zip(theirs, flat.split([m.numel() for m in theirs]), strict=True):
                    m.data.copy_(part.view_as(m))


def save(model: Nano, ema: list[torch.Tensor], record: dict, folder: Path) -> None:
    """The averaged weights, bf16, under the checkpoint's names."""
    clone = Nano().bfloat16()
    with torch.no_grad():
        for p, e in zip(clone.parameters(), ema, strict=True):
            p.copy_(e)
    folder.mkdir(parents=True, exist_ok=True)
    kit = {"variant": "nano", **record}
    save_atomic(
        clone.transformer.state_dict(),
        folder / "nano_transformer.safetensors",
        {"flux2_kit": json.dumps(kit)},
    )
    text = {"flux2_kit": json.dumps({"variant": "nano"}), "tokenizer_json": tokenizer_json()}
    save_atomic(clone.text.state_dict(), folder / "nano_text.safetensors", text)


def save_atomic(state, path: Path, metadata: dict[str, str]) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, path.with_suffix(".tmp"), metadata)
    path.with_suffix(".tmp").replace(path)


def resume(model: Nano, folder: Path) -> bool:
    if not (folder / "nano_transformer.safetensors").exists():
        model.start()
        return False
    model.transformer.load_state_dict(load_file(folder / "nano_transformer.safetensors"))
    model.text.load_state_dict(load_file(folder / "nano_text.safetensors"))
    return True


def seen_before(folder: Path) -> int:
    path = folder / "nano_transformer.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["flux2_kit"]).get("samples", 0)


def train(rank: int, options) -> None:
    ranks = options.ranks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.port))
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    model = Nano()
    resume(model, options.out)
    samples = seen_before(options.out)
    model = model.bfloat16()
    optimizer = Optimizer(model, rank, ranks, options.rate)
    ema = [m.detach().clone() for m in optimizer.masters]
    seed = random.SystemRandom().randrange(2**31)
    stage = STAGES[options.stage]
    data = Data(options.pool, seed + rank, stage, options.tokens)
    generator = torch.Generator().manual_seed(seed + rank)
    begun, saved, step, seen = time.time(), time.time(), 0, defaultdict(list)
    while True:
        share = torch.tensor((time.time() - begun) / 60 / options.minutes)
        if ranks > 1:
            dist.broadcast(share, 0)
        share = share.item()
        if share >= 1:
            break
        scale = min(1.0, (step + 1) / 30) * min(1.0, max(0.03, (1 - share) / 0.6))
        for _ in range(options.micro):
            batch = data.batch()
            samples += len(batch.latents) * ranks
            error, entropy, known = model.loss(batch, generator, stage.tilt)
            ((error + PROBE_WEIGHT * entropy) / options.micro).backward()
            seen[batch.task].append((error.item(), entropy.item(), known))
        optimizer.step(scale)
        decay = min(options.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [m.data for m in optimizer.masters], 1 - decay)
        step += 1
        if rank == 0 and (step % 50 == 0 or step == 5):
            minutes = (time.time() - begun) / 60
            print(f"{minutes:6.1f} min  step {step}  samples {samples}  rate {scale:.2f}")
            for task, values in sorted(seen.items()):
                error, entropy, known = (sum(v) / len(v) for v in zip(*values, strict=True))
                print(
                    f"    {task:10} loss {error:.4f}  probe {entropy:.3f}  known {known:.3f}",
                    flush=True,
                )
            seen.clear()
        if rank == 0 and time.time() - saved > 60 * options.save_every:
            save(model, ema, {"samples": samples}, options.out)
            saved = time.time()
    if rank == 0:
        save(model, ema, {"samples": samples}, options.out)
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, required=True, help="folder of encoded pictures")
    parser.add_argument(
        "--teacher", type=Path, help="folder of TAEF2's weights, to make a missing pool"
    )
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--stage", default="full", choices=STAGES)
    parser.add_argument("--tokens", type=int, default=5000, help="tokens a batch and process")
    parser.add_argument("--micro", type=int, default=1, help="batches a step and process")
    parser.add_argument("--ranks", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--port", type=int, default=29517)
    options = parser.parse_args()
    if options.teacher:
        build(options.teacher, options.pool)
    if options.ranks > 1:
        mp.spawn(train, (options,), options.ranks)
    else:
        train(0, options)


if __name__ == "__main__":
    main()
