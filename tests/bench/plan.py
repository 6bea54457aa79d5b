"""The plan beside the truth: predicted memory and time of a forward, and what it really took.

    python3 dev.py bench plan [--json FILE] [--force] [--rounds 3] [--device cuda]

Memory: bytes of live tensors counted operation by operation, over 0 to 10 references, two sizes,
two widths, batch 1 and 2. Time: after calibration in this process, over 0 to 10 references of 128,
256 and 512 pixels a side, and cached ones. On a GPU the widths are larger.
"""

import argparse
import importlib.util
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

import report

from flux2_pack.flux2_core import positions
from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.estimate import activation_bytes, calibrate
from flux2_pack.flux2_core.kv_cache import ReferenceCache
from flux2_pack.flux2_core.transformer import Controls, Flux2Transformer

MEMORY, TIME = 0.10, 0.20  # required: the largest error in memory, the median one in time
WIDTHS, TEXT, SIDE = (256, 512), 64, 16


def live_bytes():
    """tests/core/live_bytes.py, which is no package."""
    path = Path(__file__).parents[1] / "core" / "live_bytes.py"
    spec = importlib.util.spec_from_file_location("live_bytes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(width: int, dtype, blocks=(1, 2)) -> Flux2Transformer:
    config = TransformerConfig(width, 384, *blocks, guidance_embed=False, text_length=TEXT)
    return Flux2Transformer(config, dtype=dtype).eval().requires_grad_(False)


def inputs(batch: int, side: int, references: list[int], dtype) -> dict:
    """Sides in latent positions."""
    x, *refs = (
        torch.randn(n, 128, s, s).to(dtype)
        for n, s in ((batch, side), *((1, s) for s in references))
    )
    context = torch.randn(batch, TEXT, 384).to(dtype)
    return {"x": x, "timestep": torch.full((batch,), 0.5), "context": context, "references": refs}


def memory(out: report.Report) -> None:
    count = live_bytes().peak_bytes
    for width in WIDTHS:
        model, errors = built(width, torch.bfloat16), []
        for batch, side, references in (
            (b, s, r) for b in (1, 2) for s in (8, 16) for r in range(11)
        ):
            positions.rope_table.cache_clear()
            sides = [6 + i % 3 for i in range(references)]
            counted = count(partial(model, **inputs(batch, side, sides, torch.bfloat16)))
            sizes = {"text": TEXT, "picture": side**2, "references": [s**2 for s in sides]}
            planned = activation_bytes(model.config, batch=batch, **sizes)
            errors.append(abs(planned / counted - 1))
        case = f"width {width}, {len(errors)} forwards"
        out.add(case, "largest error of the memory", max(errors), "", at_most=MEMORY)


def grid(most: int) -> dict[str, tuple[list[int], bool]]:
    """Case -> sides of the references in latent positions, and whether they are cached. `most`
    tokens of references in all."""
    cases = {"no reference": ([], False)}
    for count in (1, 2, 4, 10):
        for side in (s for s in (8, 16, 32) if count * s * s <= most):
            cases[f"{count} of {16 * side}"] = [side] * count, False
    return cases | {"1 of 256, cached": ([16], True), "4 of 256, cached": ([16] * 4, True)}


def call(model, sides: list[int], cached: bool, dtype):
    """The forward as a call without arguments. A cache is filled by the first one."""
    cache = ReferenceCache("approximate", interval=2, guard=0) if cached else None
    return partial(model, **inputs(1, SIDE, sides, dtype), controls=Controls(cache=cache))


def seconds(out: report.Report, rounds: int) -> None:
    cpu = ((256, torch.float32, 4096), (1024, torch.bfloat16, 2560))
    gpu = ((1024, torch.bfloat16, 20_000), (3072, torch.bfloat16, 20_000))
    for width, dtype, most in cpu if out.device == "cpu" else gpu:
        model = built(width, dtype, (2, 4))
        begun = time.perf_counter()
        clock, errors = calibrate(model), []
        out.add(f"width {width}", "calibration", time.perf_counter() - begun, "s")
        for name, rate in (("products", clock.product), ("attention", clock.attention)):
            out.add(f"width {width}", f"{name}, calibrated", 1e-9 / rate if rate else 0, "GFLOP/s")
        cases = grid(most)
        calls = {name: call(model, *case, dtype) for name, case in cases.items()}
        times = out.interleaved(calls, rounds)
        for name, (sides, cached) in cases.items():
            sizes = {"text": TEXT, "picture": SIDE**2, "references": [s**2 for s in sides]}
            planned = clock.seconds(model.config, **sizes, cached=cached)
            took = median(times[name])
            errors.append(abs(planned / took - 1))
            case = f"width {width}, {name}"
            out.add(case, "planned", planned, "s", peer="measured", ratio=planned / took)
        case = f"width {width}, {len(cases)} forwards"
        out.add(case, "median error of the time", median(errors), "", at_most=TIME)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    out = report.Report("plan", options, options.device)
    memory(out)
    seconds(out, options.rounds)
    out.finish()


if __name__ == "__main__":
    main()
