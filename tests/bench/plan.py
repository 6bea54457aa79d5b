"""The plan beside the truth: predicted memory and time of a forward, and what it really took.

    python3 dev.py bench plan [--json FILE] [--force] [--rounds 3]

Memory: bytes of live tensors counted operation by operation, over 0 to 10 references, two sizes,
two widths, batch 1 and 2. Time: after calibration in this process, over references of 128 to
512 pixels a side.
"""

import argparse
import importlib.util
from functools import partial
from pathlib import Path
from statistics import median

import torch

import report

from flux2_pack.flux2_core import positions
from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.estimate import activation_bytes, calibrate, flops
from flux2_pack.flux2_core.transformer import Flux2Transformer

MEMORY, TIME = 0.10, 0.20  # required: the largest error in memory, the median one in time
WIDTHS, TEXT = (256, 512), 64


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


def seconds(out: report.Report, rounds: int) -> None:
    for width, dtype in ((256, torch.float32), (1024, torch.bfloat16)):
        model = built(width, dtype, (2, 4))
        clock, errors = calibrate(model), []
        for name, rate in (("products", clock.product), ("attention", clock.attention)):
            out.add(f"width {width}", f"{name}, calibrated", 1e-9 / rate if rate else 0, "GFLOP/s")
        cases = {
            f"{n} references of {16 * s}": [s] * n for n in (0, 1, 2, 4, 10) for s in (8, 16, 32)
        }
        largest = 60e9 / max(1, flops(model.config, text=TEXT, picture=256).products)
        cases = {k: v for k, v in cases.items() if sum(s * s for s in v) <= 320 * largest}
        calls = {k: partial(model, **inputs(1, 16, v, dtype)) for k, v in cases.items()}
        times = out.interleaved(calls, rounds)
        for name, sides in cases.items():
            sizes = {"text": TEXT, "picture": 256, "references": [s**2 for s in sides]}
            planned, took = clock.seconds(model.config, **sizes), median(times[name])
            errors.append(abs(planned / took - 1))
            case = f"width {width}, {name}"
            out.add(case, "planned", planned, "s", peer="measured", ratio=planned / took)
        out.add(f"width {width}", "median error of the time", median(errors), "", at_most=TIME)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    out = report.Report("plan", options)
    memory(out)
    seconds(out, options.rounds)
    out.finish()


if __name__ == "__main__":
    main()
