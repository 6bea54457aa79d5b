"""What fp8 and our passes gain on this GPU, and whether they are right there: four minutes on an H200.

    python3 dev.py bench gpu [--json FILE] [--budget 540] [--only STAGE ...] [--small]
    python3 dev.py bench gpu --smoke        every stage at tiny size, on the CPU, in seconds
    python3 dev.py bench gpu --sanitize     races and stray accesses, by NVIDIA's compute-sanitizer

Stages in the order of what they are worth, each written as soon as it ends and left out where the
time that remains would not do: facts, ceilings, the same codes as on a CPU, passes beside a plain
copy, matrix products, attention, one block of each size in every form, a whole step, torch.compile.
Requirements hold for an H100. Times are medians by the card's own clock, on inputs that take turns,
with the cache flushed before each.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import report
from gpu_stages import blocks, ops, products
from gpu_stages.bench import Bench

BUDGET = 540.0  # seconds
TOOLS = {  # stray accesses of any kernel; races of our passes: it fails in Hopper's products
    "memcheck": ("correctness", "accuracy", "blocks"),
    "racecheck": ("correctness",),
}


class Stage(NamedTuple):
    run: Callable[[Bench], None]
    seconds: float  # not begun with less than this left


STAGES = {
    "device": Stage(ops.device, 0),
    "served": Stage(ops.served, 0),
    "ceilings": Stage(ops.ceilings, 15),
    "correctness": Stage(ops.correctness, 30),
    "accuracy": Stage(ops.accuracy, 10),
    "bandwidth": Stage(ops.bandwidth, 40),
    "blocks": Stage(blocks.blocks, 30),
    "step": Stage(blocks.step, 40),
    "gemm": Stage(products.gemm_stage, 10),
    "attention": Stage(products.attention_stage, 10),
    "compiled": Stage(blocks.compiled, 90),
}


def run(b: Bench, names: list[str]) -> None:
    """The stages, one after the other; one that fails is a requirement not met, and no reason to
    end."""
    for name in names:
        stage = STAGES[name]
        if b.left < stage.seconds and not b.small:
            b.out.add(f"stage {name}", "left out for lack of time", b.left, "s")
            continue
        begun = time.monotonic()
        try:
            with torch.inference_mode():
                stage.run(b)
        except Exception as error:
            what = f"failed: {type(error).__name__}: {error}"[:300]
            b.out.add(f"stage {name}", what, 0, "", at_least=1)
        if b.cuda:
            torch.cuda.empty_cache()
        b.out.add(f"stage {name}", "time", time.monotonic() - begun, "s")


def sanitize(out: report.Report) -> None:
    """Every operation and one block at small sizes under NVIDIA's checkers."""
    found = shutil.which("compute-sanitizer")
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    tool = found or (str(cuda) if cuda.exists() else None)
    if tool is None:
        print(
            "There is no compute-sanitizer here: it comes with the CUDA toolkit.", file=sys.stderr
        )
        sys.exit(2)
    exact = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
    }  # each tensor has bounds of its own
    for name, stages in TOOLS.items():
        command = [tool, f"--tool={name}", "--error-exitcode=9"]
        command += [sys.executable, __file__, "--small", "--force", "--only", *stages]
        code = subprocess.run(command, env=exact).returncode
        out.add(f"compute-sanitizer {name}", "clean", float(code != 9), "", at_least=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--sanitize", action="store_true", help="look for races instead")
    options = parser.parse_args()
    cuda = torch.cuda.is_available() and not options.smoke
    if not cuda and not options.smoke:
        sys.exit("PyTorch finds no GPU here. Try every stage on the CPU with --smoke.")
    out = report.Report("gpu", options, "cuda:0" if cuda else "cpu")
    if options.sanitize:
        sanitize(out)
    else:
        small, ends = options.small or options.smoke, time.monotonic() + options.budget
        b = Bench(out, torch.device("cuda", 0) if cuda else torch.device("cpu"), small, ends)
        run(b, options.only or list(STAGES))
    out.finish()


if __name__ == "__main__":
    main()
