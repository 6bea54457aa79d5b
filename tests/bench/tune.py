"""What our own matrix product gains on this card, measured and remembered:

    python3 dev.py bench tune [--variant dev klein-9b klein-4b] [--json FILE]

It runs with the Python of your ComfyUI (--comfyui DIR, COMFYUI_PYTHON): what is found holds for that
PyTorch and Triton. The card should be otherwise idle.
"""

import sys
from argparse import ArgumentParser

import report

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kernels import table, tune

HIDDEN = {"dev": 6144, "klein-9b": 4096, "klein-4b": 3072}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    report.options(parser)
    options = parser.parse_args()
    try:
        device = tune.the_card()
    except Flux2Error as error:
        sys.exit(str(error))
    from flux2_pack.flux2_core.kernels.measure import Bench

    out = report.Report("tune", options, str(device))
    base: dict[tuple, float] = {}

    def told(line: tune.Line) -> None:
        case = f"{line.op} {line.shape.rows} x {line.shape.columns} x {line.shape.depth}"
        if line.seconds is None:
            print(f"{case} {line.accumulate} {line.tile}: {line.error}", file=sys.stderr)
            return
        if not line.accumulate:
            base[line.op, line.shape] = line.seconds
        ratio = line.seconds / base[line.op, line.shape]
        form = line.accumulate if line.tile is None else f"{line.accumulate} {line.tile}"
        name = form or "next best"
        out.add(case, name, line.seconds * 1e6, "us", peer="next best", ratio=ratio)

    arch = int(table.architecture(device).removeprefix("sm_"))
    wanted = [shape for name in options.variant for shape in tune.shapes(HIDDEN[name])]
    found = tune.tune(arch, wanted, Bench(device), told)
    where = tune.remember(tune.card(device), found)
    worth = [f for f in found.values() if f.speedup >= tune.WORTH]
    print(f"{len(worth)} of {len(found)} kinds of product use our kernel from now on ({where})")
    out.finish()


if __name__ == "__main__":
    main()
