"""A whole run with references: stock, cached and masked, beside diffusers' KV transformer.

    python3 dev.py bench references [--json FILE] [--force] [--references 0 1 4 10] [--rounds 3]
                                    [--model klein-9b] [--device cuda] [--threads N]

klein 4B's width, one double and two single blocks, bfloat16, a 512 x 512 picture, 512 text rows, 4
steps, references of 512 x 512; all share one set of random weights. First, in float32 on a small
picture, the exact cache must equal our own KV form without a cache and diffusers' KV transformer,
or nothing is timed. --model takes a released model's shapes, with all its blocks.

The first run of each is not timed: it counts memory, the bytes beyond weights and inputs that the
allocator has given out at once, and keeps the latent. All steps of a run without a cache cost the
same, so one is timed and counted four times. More than four references get one round. A bare cached step is its matrix products and
attentions alone. What drifts is the picture that each step expects in the end.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor

import report
import step

from flux2_pack.flux2_core import configs, schedule
from flux2_pack.flux2_core.guidance import Steer, Velocity, velocity
from flux2_pack.flux2_core.keymaps import TRANSFORMER, to_diffusers
from flux2_pack.flux2_core.kv_cache import ReferenceCache
from flux2_pack.flux2_core.latents import grid, tokens
from flux2_pack.flux2_core.positions import REFERENCE_T, picture_ids, text_ids
from flux2_pack.flux2_core.sampling import denoise
from flux2_pack.flux2_core.transformer import Controls, Flux2Transformer
from flux2_pack.flux2_core.visibility import ReferenceControl

STEPS, SIDE, GUIDANCE = 4, 32, 4.0  # SIDE in latent pixels
MANY = 4  # more references than this get one round
SIGMAS = schedule.sigmas(STEPS, width=16 * SIDE, height=16 * SIDE)
STOCK, EXACT, APPROXIMATE = "stock", "exact cache", "approximate cache"
HALF, SMALL, KV = "half of each masked out", "references that small", "KV form, no cache"
CACHED, BARE = "a cached step", "bare products and attention"
STEP_ROUNDS = 5
AT_MOST_ERROR = 1e-5
AT_LEAST_GAIN = 1.9  # stock over the exact cache, 4 references
AT_MOST_PEER = 1.05  # the exact cache over diffusers'
AT_MOST_BARE = 1.10  # a cached step over its bare work
AT_MOST_MASKED = 1.05  # masked references over references that small


@dataclass
class Run:
    """One way to draw. `begin` gives the velocity of a fresh run, with empty caches; the first call
    takes `first` steps, the others `timed`."""

    begin: Callable[[], Velocity]
    noise: Tensor
    timed: int = STEPS
    first: int = STEPS
    bytes: int = 0
    latent: Tensor | None = None
    expected: list[Tensor] = field(default_factory=list)  # of the first run, one a step
    steps: list[list[float]] = field(default_factory=list)  # seconds, one list a run

    def __call__(self) -> None:
        if self.latent is None:
            self.bytes, self.latent = counted(partial(self.draw, self.first, self.see), self.noise)
        else:
            self.draw(self.timed)

    def draw(self, steps: int, on_step=None) -> Tensor:
        stock, seconds = self.begin(), []

        def timed(x: Tensor, t: Tensor) -> Tensor:
            begun = now(x)
            v = stock(x, t)
            seconds.append(now(x) - begun)
            return v

        self.steps.append(seconds)
        return denoise(timed, self.noise, SIGMAS[: steps + 1], on_step=on_step)

    def see(self, _, __, expected: Tensor) -> None:
        self.expected.append(expected)


def now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def counted(call: Callable[[], Tensor], where: Tensor) -> tuple[int, Tensor]:
    """-> the most bytes that lived at once beyond those before the call, and what it returns."""
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
        torch.cuda.reset_peak_memory_stats(where.device)
        before = torch.cuda.memory_allocated(where.device)
        out = call()
        return torch.cuda.max_memory_allocated(where.device) - before, out
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        out = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most, out


# -------------------------------------------------------------------------------------- who draws


def ours(
    model: Flux2Transformer,
    i: dict,
    controls: Callable[[], Controls | Steer | None],
    references=None,
) -> Velocity:
    """Our velocity for inputs `i`; `controls` makes them afresh, with an empty cache."""
    field = velocity(
        model,
        i["context"],
        embedded=GUIDANCE if model.config.guidance_embed else None,
        references=i["references"] if references is None else references,
        controls=controls(),
    )
    return lambda x, t: field(x.to(i["x"].dtype), t)


def diffusers_model(weights: dict):
    """diffusers' transformer with the attention of its klein KV pipeline."""
    import diffusers
    from diffusers.models.transformers import transformer_flux2

    config = step.CONFIG
    make = partial(
        diffusers.Flux2Transformer2DModel,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_dim,
        guidance_embeds=config.guidance_embed,
    )
    model = step.built(make, to_diffusers(weights, TRANSFORMER))
    for block in model.transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    return model


def diffusers_kv(model, i: dict) -> Velocity:
    """The first step reads the references and keeps their keys and values, as the pipeline does."""
    x, references, text = i["x"], i["references"], i["context"]
    places = [
        picture_ids(*r.shape[2:], REFERENCE_T * (n + 1)).to(x.device)
        for n, r in enumerate(references)
    ]
    own, cache = picture_ids(*x.shape[2:]).to(x.device), None

    def field(x: Tensor, t: Tensor) -> Tensor:
        nonlocal cache
        h, w = x.shape[2:]
        rows, ids, mode = tokens(x.to(text.dtype)), own, {}
        if references and cache is None:
            rows = torch.cat([*map(tokens, references), rows], 1)
            ids = torch.cat([*places, own])
            mode = {"kv_cache_mode": "extract", "num_ref_tokens": rows.shape[1] - h * w}
        elif references:
            mode = {"kv_cache_mode": "cached", "kv_cache": cache}
        out, *made = model(
            rows,
            encoder_hidden_states=text,
            timestep=t,
            guidance=torch.full_like(t, GUIDANCE) if step.CONFIG.guidance_embed else None,
            img_ids=ids,
            txt_ids=text_ids(text.shape[1]).to(x.device),
            return_dict=False,
            **mode,
        )
        cache = made[0] if made else cache
        return grid(out, h, w)

    return field


def half(references: Sequence[Tensor]) -> list[Tensor]:
    """Which patches of each stay: a random half, (h, w) bool."""
    generator = torch.Generator().manual_seed(2)
    keep = []
    for r in references:
        order = torch.randperm(r[0, 0].numel(), generator=generator)
        keep.append((order < len(order) // 2).view(r.shape[2:]))
    return keep


def everyone(model: Flux2Transformer, peer, i: dict, noise: Tensor) -> dict[str, Run]:
    """name -> Run, all with the same weights and noise."""
    run = partial(Run, noise=noise)
    out = {STOCK: run(partial(ours, model, i, lambda: None), timed=1)}
    out[EXACT] = run(partial(ours, model, i, partial(cached, "exact")))
    if i["references"]:
        out[APPROXIMATE] = run(partial(ours, model, i, partial(cached, "approximate")))
        keep = tuple(ReferenceControl(keep=k) for k in half(i["references"]))
        masked = partial(ours, model, i, lambda: Controls(references=keep))
        small = [r[..., : r.shape[3] // 2] for r in i["references"]]
        out[HALF] = run(masked, timed=1, first=1)
        out[SMALL] = run(partial(ours, model, i, lambda: None, small), timed=1, first=1)
    out[diffusers_name()] = run(partial(diffusers_kv, peer, i))
    return out


def cached(mode: str, sigmas: Tensor = SIGMAS, **how) -> Steer:
    """The controls of a run that keeps its references' keys and values, from an empty cache on."""
    cache = ReferenceCache(mode, **how)
    cache.begin(object())
    controls = Controls(kv_references=mode == "exact" or None, cache=cache)

    def at(sigma: float) -> Controls:
        cache.step = round(schedule.share(sigmas, sigma) * (len(sigmas) - 1))
        return controls

    return at


def diffusers_name() -> str:
    import diffusers

    return f"diffusers {diffusers.__version__}, KV cache"


# ------------------------------------------------------------------------------------ what is seen


def compare(weights: dict, device: str, out: report.Report) -> None:
    """In float32, on a small picture with references of two sizes: ends the program if they differ."""
    weights = {k: v.float() for k, v in weights.items()}
    model = step.built(partial(Flux2Transformer, step.CONFIG), weights)
    i = on(device, step.inputs(2, 6, 20, torch.float32))
    i["references"][1] = i["references"][1][..., :4]
    draw = partial(denoise, x=i["x"], sigmas=SIGMAS)
    wanted = draw(ours(model, i, lambda: Controls(kv_references=True)))
    others = {
        EXACT: draw(ours(model, i, partial(cached, "exact"))),
        diffusers_name(): draw(diffusers_kv(diffusers_model(weights), i)),
    }
    for name, latent in others.items():
        error = ((latent - wanted).abs().max() / wanted.std()).item()
        metric = "largest error / std after 4 steps"
        out.add(f"float32, {KV}", metric, error, "", peer=name, at_most=AT_MOST_ERROR)
    if out.unmet:
        out.finish()


def cached_step(model: Flux2Transformer, i: dict) -> dict[str, Callable]:
    """A cached step, and its linear layers and attentions alone."""
    arguments = i | {"controls": cached("exact")(0.5)}
    if model.config.guidance_embed:
        arguments["guidance"] = torch.full_like(i["timestep"], GUIDANCE)
    model(**arguments)  # fills the cache
    return {CACHED: partial(model, **arguments), BARE: step.bare(model, arguments)}


def judge(case: str, runs: dict[str, Run], times: dict[str, list[float]], out: report.Report):
    theirs = diffusers_name()
    for name, run in runs.items():
        times[name] = [t * STEPS / run.timed for t in times[name]]
    pairs = {n: (EXACT, theirs) if n == theirs else (n, STOCK) for n in runs}
    for name, pair in pairs.items():
        out.add(case, f"{STEPS} steps, {name}", median(times[name]), "s", **beside(*pair, times))
    bytes_ = {name: [run.bytes] for name, run in runs.items()}
    for name, pair in pairs.items():
        size = runs[name].bytes / 1e9
        out.add(case, f"peak memory, {name}", size, "GB", **beside(*pair, bytes_))
    if BARE in times:
        judge_references(case, runs, times, out)


def beside(name: str, peer: str, values: dict[str, list]) -> dict:
    """What a figure says of its peer: nothing where it is its own."""
    return {} if name == peer else {"peer": peer, "ratio": report.ratio(values[name], values[peer])}


def judge_references(case: str, runs, times, out: report.Report) -> None:
    theirs, four = diffusers_name(), case.startswith("4 ")
    gain = report.ratio(times[STOCK], times[EXACT])
    out.add(case, f"{STOCK} over {EXACT}", gain, "x", at_least=AT_LEAST_GAIN if four else None)
    over = beside(EXACT, theirs, times)
    out.add(case, f"{EXACT} over diffusers'", over["ratio"], "x", **over, at_most=AT_MOST_PEER)

    step_ = [mean(run[1:]) for run in runs[theirs].steps[-len(times[theirs]) :]]
    out.add(case, f"a cached step, {theirs}", median(step_), "s")
    out.add(case, f"a cached step, {EXACT}", median(times[CACHED]), "s")
    out.add(case, f"a cached step, {BARE}", median(times[BARE]), "s")
    over = report.ratio(times[CACHED], times[BARE])
    out.add(case, "a cached step over its bare work", over, "x", at_most=AT_MOST_BARE)

    over = report.ratio(times[HALF], times[SMALL])
    out.add(case, f"{HALF} over {SMALL}", over, "x", at_most=AT_MOST_MASKED)

    stock, near = runs[STOCK], runs[APPROXIMATE]
    error = relative(near.latent, stock.latent)
    out.add(case, f"error of the latent, {APPROXIMATE}", error, "", peer=STOCK)
    out.add(case, f"error of the latent, {APPROXIMATE}", -20 * math.log10(error), "dB", peer=STOCK)
    for n, pair in enumerate(zip(near.expected, stock.expected, strict=True), 1):
        out.add(case, f"drift at step {n}, {APPROXIMATE}", relative(*pair), "", peer=STOCK)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def on(device: str, arguments: dict) -> dict:
    """Tensors, and lists of them, on that device."""

    def move(v):
        return v.to(device) if isinstance(v, Tensor) else [r.to(device) for r in v]

    return {k: move(v) for k, v in arguments.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--references", nargs="*", type=int, default=[0, 1, 4, 10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=sorted(configs.VARIANTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = report.Report("references", options, options.device)
    out.quiet()

    released = configs.VARIANTS[options.model].transformer if options.model else step.CONFIG
    step.CONFIG = replace(released, double_blocks=1, single_blocks=2)
    compare(on(options.device, step.random_weights()), options.device, out)
    step.CONFIG = released
    weights = on(options.device, step.random_weights())
    model = step.built(partial(Flux2Transformer, step.CONFIG), weights)
    peer = diffusers_model(weights)
    for count in options.references:
        i = on(options.device, step.inputs(count, SIDE, step.CONFIG.text_length))
        runs = everyone(model, peer, i, noise=i["x"].float())
        calls: dict[str, Callable] = dict(runs)
        rounds = options.rounds if count <= MANY else 1
        times = out.interleaved(calls, rounds)
        if count:  # a step is short: rounds of their own, so that one slow moment decides nothing
            times |= out.interleaved(cached_step(model, i), STEP_ROUNDS)
        judge(f"{count} references", runs, times, out)
    out.finish()


if __name__ == "__main__":
    main()
