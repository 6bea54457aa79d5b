"""Ceilings of this card, whether its codes are the CPU's, and how near the passes in front of the
products come to a plain copy."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gpu_stages.bench import Bench, decibels, differing, error, numbers

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.kernels import gemm, reference, scaled
from flux2_pack.flux2_core.kernels.reference import E4M3
from flux2_pack.flux2_core.kernels.tiles import Tile
from flux2_pack.flux2_core.positions import rope_table

HEAD = 128
COPIED = {"K1": 0.80, "K1 gated": 0.80, "K2": 0.80, "K3": 0.75}  # shares of a copy's bandwidth
CODES_DIFFER, DECIBELS, BF16_DECIBELS = 0.005, 31.3, 55.0
OWN, SLICED, ALONE = Tile(128, 128, 128, 8, 3), Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3)
NUMBERS = ("modulate", "gated_modulate", "gated_add", "swiglu")  # the passes without codes
IN_A_ROW = 12  # calls of a pass that share a time
PRECISE, FAST = 2.0e-3, 4.0e-3  # errors of the scaled product, bfloat16's rounding included


def device(b: Bench) -> None:
    if not b.cuda:
        return b.out.add("device", "GPU", 0, "none")
    about = torch.cuda.get_device_properties(b.device)
    b.out.add("device", "memory", about.total_memory / 2**30, "GiB")
    b.out.add("device", "multiprocessors", about.multi_processor_count, "")
    b.out.add("device", "second-level cache", getattr(about, "L2_cache_size", 0) / 2**20, "MiB")
    b.out.add("device", "capability", about.major + about.minor / 10, "")
    b.out.add("device", "CUDA of PyTorch", float(torch.version.cuda or 0), "")
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    b.out.add("device", "driver's CUDA", version / 1000, "")


def served(b: Bench) -> None:
    """What serves each operation here, as a line of its own: 1 where it is more than PyTorch."""
    for row in kernels.status(b.device):
        more = row.chosen not in ("eager", "reference")
        b.out.add(f"served, {row.op}", f"by {row.chosen}", float(more), "")


def ceilings(b: Bench) -> None:
    b.copy = copied(b)
    b.out.add("ceilings", "copy", b.copy / 1e12, "TB/s")
    n = 256 if b.small else 8192
    floats = [b.randn(n, n, seed=i) for i in range(4)]
    codes = [kernels.quantize_rows(x) for x in floats]
    calls = {"bf16": [partial(F.linear, x, floats[3]) for x in floats[:3]]}
    for name, fast in (("fp8", False), ("fp8, fast accumulation", True)):
        calls[name] = [accumulating(fast, *c, *codes[3]) for c in codes[:3]]
    for name, taken in b.each(calls).items():
        b.out.add("ceilings", f"{n} x {n} x {n}, {name}", 2 * n**3 / taken / 1e12, "TFLOP/s")


def copied(b: Bench) -> float:
    """Bytes a second that a copy of 2 GiB (64 MiB on a CPU) reads and writes."""
    size = 1 << (20 if b.small else 31 if b.cuda else 26)
    x, y = (torch.empty(size, dtype=torch.uint8, device=b.device) for _ in range(2))
    return 2 * size / b.seconds([partial(y.copy_, x)], 10)


def accumulating(fast: bool, *args) -> Callable:
    """fp8_linear, by the library where there is one, with or without fast accumulation at any depth."""

    def run():
        before = scaled.fast_accumulate, scaled.FAST_DEPTH
        scaled.fast_accumulate, scaled.FAST_DEPTH = fast, 1 << 30
        try:
            return (scaled.scaled_mm if args[0].is_cuda else kernels.fp8_linear)(*args)
        finally:
            scaled.fast_accumulate, scaled.FAST_DEPTH = before

    return run


# ---------------------------------------------------------------------------------------- operations


class Job(NamedTuple):
    """One call of an operation, and the least bytes that it must read and write."""

    name: str
    op: str
    arguments: tuple
    bytes: int


def jobs(b: Bench, hidden: int, rows: int, seed: int = 0) -> Iterator[Job]:
    """The passes of one single block, and of the residual stream, for `rows` rows."""
    h, n = hidden, 3 * hidden
    text = min(b.text, rows - 1)
    wide = b.randn(rows, 3 * h + 2 * n, seed=seed)  # as linear1 gives it: parts are views
    x, y = b.randn(1, rows, h, seed=seed + 1), b.randn(1, rows, h, seed=seed + 2)
    shift, scale, gate = (b.randn(1, 1, h, scale=0.3, seed=seed + i) for i in (3, 4, 5))
    codes = rows * (h + 4)
    yield Job("rows", "quantize_rows", (x[0],), 2 * rows * h + codes)
    yield Job("K1", "modulate_quantize", (x, shift, scale), 2 * rows * h + codes)
    gated = (x, y, gate, shift, scale)
    yield Job("K1 gated", "gated_modulate_quantize", gated, 6 * rows * h + codes)
    read = 2 * rows * (2 * n + h)
    yield Job("K2", "swiglu_quantize", (wide[:, 3 * h :], y[0]), read + rows * (h + n + 4))
    weights = [1 + b.randn(HEAD, scale=0.1, seed=seed + i) for i in (6, 7)]
    rope = _rope(b, text, rows)
    packed = wide[None, :, : 3 * h]
    table = 2 * 4 * rows * HEAD // 2
    yield Job("K3", "qk_norm_rope", (packed, *weights, *rope), 12 * rows * h + table)
    yield Job("norm", "modulate", (x, shift, scale), 4 * rows * h)
    yield Job("gate, norm", "gated_modulate", gated, 8 * rows * h)
    yield Job("gate", "gated_add", gated[:3], 6 * rows * h)
    yield Job("SwiGLU", "swiglu", (wide[:, 3 * h :], y[0]), read + 2 * rows * (h + n))


def _rope(b: Bench, text: int, rows: int):
    """cos, sin of `rows` rows: text, and a picture one row high."""
    return rope_table(text, (1, rows - text), (), (32, 32, 32, 32), 2000, b.device)


def correctness(b: Bench) -> None:
    widths = (256,) if b.small else (3072, 6144)
    for h in widths:
        for rows in (37,) if b.small else (520, 4609):
            for job in jobs(b, h, rows):
                _compare(b, job, f"{job.op}, {rows} x {h}")
    weight, scale = b.randn(widths[0], widths[0]), torch.tensor(0.01, device=b.device)
    got, wanted = (
        kernels.requantize(weight.to(d), scale.to(d), 7) for d in (b.device, torch.device("cpu"))
    )
    b.out.add("requantize", "codes unlike the CPU's", differing(got, wanted), "", at_most=0.0)


def accuracy(b: Bench) -> None:
    """Products of codes beside float64, the library's and ours."""
    for depth in (512,) if b.small else (6144, 18432, 24576):
        _products(b, depth)


def _compare(b: Bench, job: Job, case: str) -> None:
    """An operation here beside its definition on the CPU."""
    got = getattr(kernels, job.op)(*job.arguments)
    arguments = [a.cpu() for a in job.arguments]
    if job.op in NUMBERS:
        made = got if isinstance(got, tuple) else (got,)
        near = decibels(made[-1].cpu(), _plain(job.op, arguments).view(made[-1].shape))
        return b.out.add(case, "beside float64", near, "dB", at_least=BF16_DECIBELS)
    wanted = getattr(reference, job.op)(*arguments)
    if job.op == "qk_norm_rope":
        exact = getattr(reference, job.op)(*(a.double() for a in arguments))
        for name, a, w in zip("qkv", got, exact, strict=True):
            if name != "v":  # copied, not computed
                near = decibels(a.cpu(), w)
                b.out.add(case, f"{name} beside float64", near, "dB", at_least=BF16_DECIBELS)
        same = float(torch.equal(got[2].cpu(), wanted[2]))
        return b.out.add(case, "v as it was", same, "", at_least=1)
    (codes, scale), (w_codes, w_scale) = got[-2:], wanted[-2:]
    exact = job.op == "quantize_rows"
    share = differing(codes, w_codes)
    b.out.add(case, "codes unlike the CPU's", share, "", at_most=0 if exact else CODES_DIFFER)
    off = ((scale.cpu() - w_scale).abs() / w_scale).max().item()
    b.out.add(case, "scales unlike the CPU's", off, "", at_most=0 if exact else 1e-5)
    if not exact:
        near = decibels(numbers(codes.cpu(), scale.cpu()), _plain(job.op, arguments))
        b.out.add(case, "beside float64", near, "dB", at_least=b.bound(DECIBELS))


def _plain(op: str, arguments: list) -> torch.Tensor:
    """What the codes stand for, in float64."""
    a = [x.double() for x in arguments]
    if op.startswith("swiglu"):
        return reference.activated(*a)
    if op == "gated_add":
        return reference.gated(*a)
    if op.startswith("gated_modulate"):
        x = reference.gated(*arguments[:3]).double()  # the norm is of the rounded stream
        a = [x, *a[3:]]
    return reference.modulated(*a).flatten(0, 1)


def _products(b: Bench, depth: int) -> None:
    """fp8 products beside float64, with and without Hopper's fast accumulation; weights alone."""
    rows, columns = (48, 64) if b.small else (520, 6144)
    x, w = b.randn(rows, depth), b.randn(columns, depth, scale=0.02, seed=1)
    codes, scale = kernels.quantize_rows(x)
    weight, w_scale = kernels.quantize_rows(w)
    wanted = numbers(codes, scale).double() @ numbers(weight, w_scale).double().T
    limits = (("precise", False, PRECISE), ("fast accumulation", True, FAST))
    for name, fast, limit in limits:
        got = accumulating(fast, codes, scale, weight, w_scale)()
        far = error(got, wanted)
        limit = (
            limit if depth <= scaled.FAST_DEPTH or not fast else None
        )  # told, and not used there
        # by way of bfloat16, as on a CPU, it is rounded twice
        b.out.add(
            f"fp8 product, K {depth}", f"error, {name}", far, "", at_most=limit and b.bound(limit)
        )
    got = kernels.fp8_weight_linear(x, weight, w_scale)
    far = error(got, x.double() @ numbers(weight, w_scale).double().T)
    b.out.add(f"weights alone fp8, K {depth}", "error", far, "", at_most=b.bound(FAST))
    plain = x.double() @ w.double().T
    near = decibels(accumulating(True, codes, scale, weight, w_scale)(), plain)
    b.out.add(f"fp8 product, K {depth}", "beside bf16 weights", near, "dB", at_least=28.3)
    assert codes.dtype == E4M3
    if b.cuda and not torch.version.hip:
        _own_products(b, x, (codes, scale), (weight, w_scale))


def _own_products(b: Bench, x, left: tuple, right: tuple) -> None:
    """Our own products as they run on this card, whether or not it is one they are meant for: plain,
    with everything in the epilogue, in float16 slices, and of fp8 weights alone."""
    (codes, scale), (weight, w_scale) = left, right
    (rows, depth), columns = codes.shape, weight.shape[0]
    residual, gate = b.randn(rows, columns, seed=2), b.randn(columns, seed=3)
    low, up = b.randn(rows, 24, seed=4), b.randn(columns, 24, scale=0.1, seed=5)
    plain = numbers(codes, scale).double() @ numbers(weight, w_scale).double().T
    whole = residual.double() + gate.double() * (plain + low.double() @ up.double().T)
    parts = gemm.Epilogue(residual, gate, low, up)
    base, narrow = weight.clone(), kernels.quantize_rows(x, gemm.ACTIVATION_MAX[SLICED.k])
    gemm.rebase(base)
    w_based = w_scale * gemm.REBASE
    sliced = numbers(*narrow).double() @ numbers(base, w_based).double().T
    alone = x.double() @ numbers(weight, w_scale).double().T
    calls = {
        "plain": (partial(gemm.fp8, codes, scale, weight, w_scale, OWN, "fp32"), plain),
        "with gate, residual and LoRA": (
            partial(gemm.fp8, codes, scale, weight, w_scale, OWN, "fp32", epilogue=parts),
            whole,
        ),
        "in float16 slices": (partial(gemm.fp8, *narrow, base, w_based, SLICED, "fp16"), sliced),
        "of fp8 weights alone": (partial(gemm.weight_only, x, weight, w_scale, ALONE), alone),
    }
    for name, (call, wanted) in calls.items():
        far = error(call(), wanted)
        limit = FAST if name == "in float16 slices" else PRECISE
        b.out.add(f"our product, K {depth}", f"error, {name}", far, "", at_most=limit)


def bandwidth(b: Bench) -> None:
    """Each pass beside the rate of a plain copy, and beside its eager definition. Calls follow each
    other, as in a model; a set of inputs comes back when the others have emptied the cache of it."""
    rows = 40 if b.small else 4608
    for name, model in b.models.items():
        sets = [list(jobs(b, model.hidden, rows, seed=10 * i)) for i in range(1 if b.small else 4)]
        for some in zip(*sets, strict=True):
            job = some[0]
            run = getattr(kernels, job.op)
            taken = b.seconds([partial(run, *s.arguments) for s in some], row=IN_A_ROW)
            share = job.bytes / taken / b.copy if b.copy else 0.0
            case = f"{job.name}, {job.op}, {name}"
            bound = b.bound(COPIED[job.name]) if job.name in COPIED else None
            b.out.add(case, "of a copy's bandwidth", share, "", at_least=bound)
            with kernels.use("reference"):
                plain = b.seconds([partial(run, *s.arguments) for s in some], 5)
            b.out.add(case, "time", taken, "s", peer="its definition", ratio=taken / plain)
