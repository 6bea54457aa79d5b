"""Train nano: the flow transformer and its text encoder, together.

    python tests/train_nano.py --pool FOLDER [--teacher FOLDER] [--minutes 60]

It resumes from the weights in flux2_core/nano with a fresh optimiser, and writes them back every
few minutes and at the end: run it again to train on. One process a core, gradients averaged.
The mix: one and two objects, sizes 64 to 256 (at least 15 % at 256 x 256), attributes left out in
10 %, empty prompts in 10 % (for true CFG), edits, mixes and picks with up to ten references, a
third of those in the KV form. Prompts that `scenes.held_back` names are never shown.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from nano_pool import (
    BACKGROUNDS,
    COLORS,
    JITTERS,
    PLACES,
    SHAPES,
    build,
    load,
    plan,
    scenes,
    single_index,
)

from flux2_pack.flux2_core.configs import NANO, NANO_TEXT
from flux2_pack.flux2_core.nano.vocabulary import tokenizer_json
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.tokenizer import nano_tokenizer
from flux2_pack.flux2_core.transformer import Controls, Flux2Transformer

HOME = Path(__file__).resolve().parents[1] / "flux2_core" / "nano"
KV = Controls(kv_references=True)
# task: share of steps. Batches have equal token counts, so 256 x 256 has fewer pictures a step.
TASKS = {
    "one": 0.20,
    "two": 0.09,
    "large": 0.32,
    "sizes": 0.04,
    "edit": 0.14,
    "mix": 0.11,
    "pick": 0.10,
}


class Data:
    """Batches of (latents, prompts, reference latents) from the pool."""

    def __init__(self, pool: Path, seed: int, tokens: int, tasks: dict[str, float]):
        self.random, self.tokens, self.tasks = random.Random(seed), tokens, tasks
        self.sets = {name: load(pool, name) for name in plan() if any(pool.glob(f"{name}.*.pt"))}
        self.sizes = [name for name in self.sets if name.startswith("any_") and name != "any_256"]

    def batch(self):
        task = self.random.choices(list(self.tasks), self.tasks.values())[0]
        if task in ("edit", "mix", "pick"):
            return self.referenced(task)
        name = {"one": "one_128", "two": "two_128", "large": "any_256"}.get(
            task
        ) or self.random.choice(self.sizes)
        data = self.sets[name]
        n = self.count(data["latents"][0, 0].numel())
        rows, prompts = [], []
        while len(rows) < n:
            row = self.random.randrange(len(data["labels"]))
            prompt = self.wording(data["labels"][row].tolist())
            if not scenes.held_back(prompt):
                rows.append(row)
                prompts.append(prompt)
        return data["latents"][rows], self.emptied(prompts), []

    def wording(self, label) -> str:
        """A prompt for a label row; in one of ten an attribute is left out."""
        s1, c1, p1, s2, c2, p2, background, _ = label
        things = [[SHAPES[s1], COLORS[c1], PLACES[p1]]]
        if s2 >= 0:
            things.append([SHAPES[s2], COLORS[c2], PLACES[p2]])
        background = BACKGROUNDS[background]
        if self.random.random() < 0.1:
            out = self.random.randrange(4)
            if out == 3:
                background = None
            else:
                self.random.choice(things)[out] = None
        self.random.shuffle(things)
        return scenes.describe(scenes.Scene(tuple(scenes.Thing(*t) for t in things), background))

    def emptied(self, prompts):
        return ["" if self.random.random() < 0.1 else prompt for prompt in prompts]

    def count(self, picture: int, references: int = 0) -> int:
        return max(4, self.tokens // (32 + picture + references))

    def referenced(self, task):
        r = self.random
        most = {"edit": 4, "mix": 6, "pick": 10}[task]
        least = {"edit": 1, "mix": 2, "pick": 3}[task]
        many = (
            r.choice([least, r.randint(least, most)]) if task != "pick" else r.randint(least, most)
        )
        sides = [128 if many <= 3 and r.random() < 0.35 else 64 for _ in range(many)]
        if task == "edit" and r.random() < 0.8:
            sides = [128] * many
        n = self.count(64, sum((side // 16) ** 2 for side in sides))
        samples = []
        while len(samples) < n:
            sample = getattr(self, task)(many)
            if not scenes.held_back(sample[1]):
                samples.append(sample)
        targets = torch.stack([target for target, _, _ in samples])
        references = []
        for i, side in enumerate(sides):
            latents = self.sets[f"one_{side}"]["latents"]
            references.append(latents[[refs[i] for _, _, refs in samples]])
        return targets, self.emptied([prompt for _, prompt, _ in samples]), references

    def any_reference(self, shape=None, color=None):
        r = self.random
        shape = r.randrange(len(SHAPES)) if shape is None else shape
        color = r.randrange(len(COLORS)) if color is None else color
        return (
            shape,
            color,
            r.randrange(len(PLACES)),
            r.randrange(len(BACKGROUNDS)),
            r.randrange(JITTERS),
        )

    def edit(self, many):
        """The picture as it was, with another colour or another background."""
        refs = [self.any_reference() for _ in range(many)]
        i = self.random.randrange(many)
        shape, color, place, background, j = refs[i]
        if self.random.random() < 0.5:
            color = self.random.randrange(len(COLORS))
            prompt = scenes.recolor_prompt(i + 1, COLORS[color])
        else:
            background = self.random.randrange(len(BACKGROUNDS))
            prompt = scenes.background_prompt(i + 1, BACKGROUNDS[background])
        target = self.sets["one_128"]["latents"][single_index(shape, color, place, background, j)]
        return target, prompt, [single_index(*ref) for ref in refs]

    def mix(self, many):
        refs = [self.any_reference() for _ in range(many)]
        i, j = self.random.sample(range(many), 2)
        place, background = (
            self.random.randrange(len(PLACES)),
            self.random.randrange(len(BACKGROUNDS)),
        )
        index = single_index(
            refs[i][0], refs[j][1], place, background, self.random.randrange(JITTERS)
        )
        prompt = scenes.mix_prompt(i + 1, j + 1, PLACES[place], BACKGROUNDS[background])
        return self.sets["one_128"]["latents"][index], prompt, [single_index(*ref) for ref in refs]

    def pick(self, many):
        """One or two of many references, each taken as it is, at a place."""
        refs = [self.any_reference() for _ in range(many)]
        i, k = self.random.sample(range(many), 2)
        if self.random.random() < 0.5:
            place, background = (
                self.random.randrange(len(PLACES)),
                self.random.randrange(len(BACKGROUNDS)),
            )
            index = single_index(
                refs[i][0], refs[i][1], place, background, self.random.randrange(JITTERS)
            )
            prompt = scenes.pick_prompt([(i + 1, PLACES[place])], BACKGROUNDS[background])
            return (
                self.sets["one_128"]["latents"][index],
                prompt,
                [single_index(*ref) for ref in refs],
            )
        pair = self.sets["two_128"]
        row = self.random.randrange(len(pair["labels"]))
        s1, c1, p1, s2, c2, p2, background, _ = pair["labels"][row].tolist()
        refs[i], refs[k] = self.any_reference(s1, c1), self.any_reference(s2, c2)
        picks = [(i + 1, PLACES[p1]), (k + 1, PLACES[p2])]
        self.random.shuffle(picks)
        prompt = scenes.pick_prompt(picks, BACKGROUNDS[background])
        return pair["latents"][row], prompt, [single_index(*ref) for ref in refs]


class Nano(torch.nn.Module):
    """Both networks, so that one state dict and one backward serve them."""

    def __init__(self):
        super().__init__()
        self.transformer, self.text = Flux2Transformer(NANO), TextEncoder(NANO_TEXT)
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

    def loss(self, latents, prompts, references, generator) -> torch.Tensor:
        """Mean square error of the velocity at a time drawn for each picture."""
        dtype = self.transformer.img_in.weight.dtype
        ids, mask = self.tokenize(prompts)
        context = self.text(ids, mask)
        x0, n = latents.float(), len(latents)
        tilt = 0.5 if x0[0, 0].numel() <= 100 else 1.0  # larger pictures need more noise
        t = torch.sigmoid(1.2 * torch.randn(n, generator=generator) + tilt)
        noise = torch.randn(x0.shape, generator=generator)
        at = t[:, None, None, None]
        # a little noise on references: at work they come from nano's own encoder, not the teacher's
        blur = 0.15 * torch.rand(1, generator=generator).item()
        references = [
            (r + blur * torch.randn(r.shape, generator=generator)).to(dtype) for r in references
        ]
        controls = KV if references and torch.rand(1, generator=generator).item() < 1 / 3 else None
        x = (at * noise + (1 - at) * x0).to(dtype)
        v = self.transformer(x, t, context, references=references, controls=controls)
        return (v.float() - (noise - x0)).square().mean()


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
        grads = torch.cat([p.grad.float().flatten() for p in self.work])
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
    from safetensors import safe_open

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
    tasks = {task: TASKS[task] for task in options.tasks.split(",")}
    data = Data(options.pool, seed + rank, options.tokens, tasks)
    generator = torch.Generator().manual_seed(seed + rank)
    begun, saved, step, average = time.time(), time.time(), 0, None
    while True:
        share = torch.tensor((time.time() - begun) / 60 / options.minutes)
        if ranks > 1:
            dist.broadcast(share, 0)
        share = share.item()
        if share >= 1:
            break
        scale = min(1.0, (step + 1) / 30) * min(1.0, max(0.03, (1 - share) / 0.6))
        total = 0.0
        for _ in range(options.micro):
            batch = data.batch()
            samples += len(batch[0]) * ranks
            loss = model.loss(*batch, generator) / options.micro
            loss.backward()
            total += loss.item()
        optimizer.step(scale)
        decay = min(options.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [m.data for m in optimizer.masters], 1 - decay)
        step += 1
        average = total if average is None else 0.98 * average + 0.02 * total
        if rank == 0 and (step % 50 == 0 or step == 5):
            minutes = (time.time() - begun) / 60
            print(
                f"{minutes:6.1f} min  step {step}  samples {samples}  loss {average:.4f}  rate {scale:.2f}",
                flush=True,
            )
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
    parser.add_argument("--tasks", default=",".join(TASKS), help="a part of the mix")
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
