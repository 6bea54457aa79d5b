"""What quantised weights do to nano's pictures: right answers per format, same seeds for all.

    python3 dev.py bench quantised [--json FILE] [--formats fp8,int8,...] [--cases 200]

Five sets of tests/bench/nano.py, each format beside bf16 weights. Block linears are quantised, as
files have them; all else stays bf16, and the mathematics is float32's for every format alike. A
format ending in "-computed" quantises activations too, by the operations' definitions: what cards
that multiply codes with codes draw.
"""

import argparse

import torch

import report
from nano import batches, cases, draw

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.quantised import QuantLinear, quantize

SETS = ("one", "two", "edit", "mix", "pick")
FORMATS = ("fp8", "int8", "nvfp4", "mxfp8", "fp8-computed", "nvfp4-computed", "mxfp8-computed")
POOLED = {
    "fp8": 1.0,
    "fp8-computed": 1.0,
    "int8": 1.0,
    "nvfp4": 5.0,
}  # the most points that all sets together may lose
EACH = {"fp8": 3.0, "int8": 3.0}  # and each alone


def right(pipe: Pipeline, kind: str, count: int) -> int:
    """Of `count` held-back cases of a set, those drawn right."""
    found = 0
    for start, batch in batches(cases(kind, count), 8 if kind == "pick" else 25):
        drawn = draw(pipe, batch, start)
        found += sum(scenes.check(p, c.wanted).ok for p, c in zip(drawn, batch, strict=True))
    return found


def held(model: torch.nn.Module) -> int:
    """Bytes of the weights as they are stored; plain ones as bf16, which files have."""
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return sum(m.packed.bytes for m in packed) + sum(2 * p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--cases", type=int, default=200)
    options = parser.parse_args()
    out = report.Report("quantised", options)
    stock: dict[str, int] = {}
    for form in ("bf16", *options.formats.split(",")):
        pipe = Pipeline.load("nano")
        weights, _, computed = form.partition("-")
        if form != "bf16":
            quantize(pipe.model, weights)
        with kernels.use("reference" if computed else "auto"):
            scores = {kind: right(pipe, kind, options.cases) for kind in SETS}
        stock = stock or scores
        out.add(form, "weights", held(pipe.model) / 2**20, "MiB")
        for kind, score in scores.items():
            lost = 100 * (stock[kind] - score) / options.cases
            out.add(f"{form}, {kind}", "right", 100 * score / options.cases, "%")
            out.add(f"{form}, {kind}", "lost to bf16", lost, "points", at_most=EACH.get(form))
        total = len(SETS) * options.cases
        out.add(f"{form}, all sets", "right", 100 * sum(scores.values()) / total, "%")
        lost = 100 * (sum(stock.values()) - sum(scores.values())) / total
        out.add(f"{form}, all sets", "lost to bf16", lost, "points", at_most=POOLED.get(form))
    out.finish()


if __name__ == "__main__":
    main()
