"""fp8 anywhere: what it costs, how exact it is, and what a call costs before any work is done.

    python3 dev.py bench kernels [--json FILE] [--force] [--rounds 5] [--only PART ...]

forward   fp8 weights beside bf16, one pass at klein 4B's width (one double and two single blocks,
          512 x 512): on a CPU they are decoded at use, on a card they are multiplied as they are
accuracy  every format on four kinds of data, against float64
layers    each linear of nano's blocks in fp8, on what really comes in
passes    the passes in front of the products, beside a plain copy of as many bytes
calls     what it takes to find out who serves

On a CUDA card each is measured there; `python3 dev.py bench gpu` is the long form, `bench tune` tries
our own products.
"""

import argparse
import sys
import timeit
from functools import partial
from statistics import median

import torch

import report
import step
from gpu_stages import ops
from gpu_stages.bench import Bench, decibels

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.kernels import reference
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.quantised import BLOCK_LINEARS, quantize
from flux2_pack.flux2_core.transformer import Flux2Transformer

OVER_BF16 = 1.15  # fp8 weights over bf16, per forward on a CPU
COMPUTED, WEIGHTS = 28.3, 31.0  # dB of a linear on Gaussian data: both sides in fp8, weights alone
PROMPT = "a red circle left and a blue square right on tan background"


# ------------------------------------------------------------------------------------------ forward


def forward(b: Bench, rounds: int) -> None:
    weights = {k: v.to(b.device) for k, v in step.random_weights().items()}
    given = step.inputs(0, 32, 512)
    given = {k: v.to(b.device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    make = partial(Flux2Transformer, step.CONFIG)
    models = {"bf16": step.built(make, weights), "fp8 weights": step.built(make, weights)}
    quantize(models["fp8 weights"], "fp8")
    with torch.inference_mode():
        calls = {name: partial(model, **given) for name, model in models.items()}
        near = decibels(calls["fp8 weights"](), calls["bf16"]())
        times = b.out.interleaved(calls, rounds)
    over = report.ratio(times["fp8 weights"], times["bf16"])
    for name, taken in times.items():
        beside = {} if name == "bf16" else {"peer": "bf16", "ratio": over}
        b.out.add("forward", name, median(taken), "s", **beside)
    bound = OVER_BF16 if not b.cuda else 1.0
    b.out.add("forward", "fp8 weights over bf16", over, "x", peer="bf16", at_most=bound)
    b.out.add("forward", "fp8 weights beside bf16", near, "dB")


# ----------------------------------------------------------------------------------------- accuracy


def data(b: Bench, rows: int, depth: int) -> dict[str, torch.Tensor]:
    """Activations (rows, depth) of the kinds that quantising is hard on, and the plain one."""
    x = b.randn(rows, depth, dtype=torch.float32)
    channels, tokens = x.clone(), x.clone()
    channels[:, :: depth // 16] *= 30
    tokens[:: rows // 8] *= 50
    gated = torch.nn.functional.silu(x) * b.randn(rows, depth, dtype=torch.float32, seed=1)
    kinds = {"Gaussian": x, "16 channels x 30": channels, "8 tokens x 50": tokens, "gated": gated}
    return {name: kind.bfloat16() for name, kind in kinds.items()}


def products(x: torch.Tensor, w: torch.Tensor) -> dict:
    """Format -> the product of x and w' in it, by the operations where there are some."""
    weight, scale = kernels.quantize_rows(w)

    def simulated(form: str):
        """Both sides in a format, the sum exact."""
        return encode(x, form).decode().double() @ encode(w, form).decode().double().T

    return {
        "bf16": x @ w.T,
        "fp8 weights only": kernels.fp8_weight_linear(x, weight, scale),
        "fp8 computed": kernels.fp8_linear(*kernels.quantize_rows(x), weight, scale),
        "INT8": simulated("int8_tensorwise"),
        "MXFP8": simulated("mxfp8"),
        "NVFP4": simulated("nvfp4"),
    }


def accuracy(b: Bench) -> None:
    rows, depth, columns = (64, 256, 128) if b.small else (512, 3072, 1024)
    w = b.randn(columns, depth, scale=0.02, seed=2)
    least = {"fp8 computed": COMPUTED, "fp8 weights only": WEIGHTS}
    for kind, x in data(b, rows, depth).items():
        wanted = x.double() @ w.double().T
        for form, got in products(x, w).items():
            bound = least.get(form) if kind == "Gaussian" else None
            b.out.add(f"linear, {kind}", form, decibels(got, wanted), "dB", at_least=bound)


def layers(b: Bench) -> None:
    """nano draws a picture; each block linear's first inputs are multiplied again, in fp8."""
    pipe, seen = Pipeline.load("nano", device=b.device), {}

    def look(name):
        def hook(_, arguments):
            seen.setdefault(name, arguments[0].flatten(0, -2).clone())

        return hook

    linears = {n: m for n, m in pipe.model.named_modules() if BLOCK_LINEARS.fullmatch(n)}
    hooks = [m.register_forward_pre_hook(look(n)) for n, m in linears.items()]
    pipe.sample(PROMPT, seed=1, steps=1)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in linears.items():
        x, w = seen[name], layer.weight.detach()
        weight, scale = kernels.quantize_rows(w)
        codes = kernels.quantize_rows(x)
        got = kernels.fp8_linear(*codes, weight, scale, torch.float32)
        found[name] = decibels(got, x.double() @ w.double().T)
        b.out.add(f"nano, {name}", "fp8 computed", found[name], "dB")
    b.out.add(
        "nano, every layer", "fp8 computed, least", min(found.values()), "dB", at_least=COMPUTED
    )
    b.out.add("nano, every layer", "fp8 computed, median", median(found.values()), "dB")


# -------------------------------------------------------------------------------------------- costs


def passes(b: Bench) -> None:
    b.copy = ops.copied(b)
    if b.cuda:
        return ops.bandwidth(b)
    hidden, rows = (256, 40) if b.small else (3072, 1536)
    for job in ops.jobs(b, hidden, rows):
        run = partial(getattr(kernels, job.op), *job.arguments)
        taken = b.seconds([run], 7)
        case = f"{job.op}, {rows} x {hidden}"
        b.out.add(case, "time", taken * 1e3, "ms", peer="a copy", ratio=taken * b.copy / job.bytes)


def calls(b: Bench) -> None:
    """One tiny call through the operation beside the function that serves it, on the CPU."""
    x = torch.randn(1, 16, dtype=torch.bfloat16)
    with kernels.use("reference"):
        through = _micro(partial(kernels.quantize_rows, x))
    plain = _micro(partial(reference.quantize_rows, x))
    b.out.add(
        "a call", "through the operation", through, "us", peer="the function", ratio=through / plain
    )
    b.out.add("a call", "to find who serves", through - plain, "us")


def _micro(call) -> float:
    return min(timeit.repeat(call, number=2000, repeat=5)) / 2000 * 1e6


PARTS = {
    "forward": forward,
    "accuracy": accuracy,
    "layers": layers,
    "passes": passes,
    "calls": calls,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, and no forward")
    parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    out = report.Report("kernels", options, device)
    b = Bench(out, torch.device(device), options.small, sys.float_info.max)
    with torch.inference_mode():
        for name in options.only:
            if name == "forward":
                if not options.small:
                    forward(b, options.rounds)
            else:
                PARTS[name](b)
    out.finish()


if __name__ == "__main__":
    main()
