"""Loading a file of klein 4B's size: time, memory, and a forward whose blocks are streamed.

    python3 dev.py bench load [--json FILE] [--blocks N] [--folder DIR]

Writes a random klein-4B-shaped file (bf16, 7.75 GB; fp8 beside it) into a folder that is removed
again. Memory is what no file backs: pages of the mapped file do not count. --blocks 2 is a small
model, to try the command.
"""

import argparse
import json
import struct
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import report

from flux2_pack.flux2_core.checkpoint import load_transformer
from flux2_pack.flux2_core.configs import KLEIN_4B
from flux2_pack.flux2_core.files import read_header
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.quantised import BLOCK_LINEARS
from flux2_pack.flux2_core.streaming import stream
from flux2_pack.flux2_core.transformer import Flux2Transformer

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
MOST_FULL, MOST_STREAMED = 1.1, 2.5  # times the weights; GB


def shapes(config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in Flux2Transformer(config).state_dict().items()}


def tensors(config, form: str | None):
    """Random weights one by one, so that the whole is never in memory."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes(config).items():
        scale, mean = (shape[1] ** -0.5, 0) if len(shape) > 1 else (0.1, 1)
        weight = torch.empty(shape, dtype=torch.bfloat16).normal_(mean, scale, generator=generator)
        if form and BLOCK_LINEARS.fullmatch(name.removesuffix(".weight")):
            layer = name.removesuffix("weight")
            yield from ((layer + k, v) for k, v in encode(weight, form).parts.items())
        else:
            yield name, weight


def write(path: Path, config, form: str | None = None) -> None:
    """A safetensors file, tensor after tensor: the data first, then the header before it."""
    table, at, data = {}, 0, path.with_suffix(".data")
    with data.open("wb") as out:
        for name, tensor in tensors(config, form):
            raw = tensor.contiguous().view(torch.uint8).numpy()
            out.write(raw.data)
            span = [at, at + raw.size]
            table[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": span,
            }
            at += raw.size
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as out, data.open("rb") as body:
        out.write(struct.pack("<Q", len(head)) + head)
        while piece := body.read(2**26):
            out.write(piece)
    data.unlink()


def anonymous() -> int:
    """Bytes of this process that no file backs (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell")


def inputs(config):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 128, 8, 8, generator=generator).bfloat16()
    context = torch.randn(1, 64, config.context_dim, generator=generator).bfloat16()
    return {"x": x, "timestep": torch.tensor([0.5]), "context": context}


def ready(path: Path, case: str, out: report.Report):
    """The model, with time and memory until it can be called."""
    weights, before, begun = path.stat().st_size, anonymous(), time.perf_counter()
    model = load_transformer(path)
    out.add(case, "time to ready", time.perf_counter() - begun, "s")
    growth = anonymous() - before
    bound = MOST_FULL * weights / 1e9
    out.add(case, "anonymous memory, loaded", growth / 1e9, "GB", at_most=bound)
    return model


@torch.inference_mode()
def measure(path: Path, form: str, config, out: report.Report) -> None:
    begun = time.perf_counter()
    read_header(path)
    out.add(form, "header", 1000 * (time.perf_counter() - begun), "ms", at_most=100)
    out.add(form, "file", path.stat().st_size / 1e9, "GB")
    whole = ready(path, form, out)(**inputs(config))
    before = anonymous()
    model = stream(ready(path, f"{form}, streamed", out), "cpu")
    begun = time.perf_counter()
    streamed = model(**inputs(config))
    out.add(f"{form}, streamed", "forward of 64 + 64 tokens", time.perf_counter() - begun, "s")
    growth = (anonymous() - before) / 1e9
    out.add(f"{form}, streamed", "anonymous memory", growth, "GB", at_most=MOST_STREAMED)
    same = float(torch.equal(whole, streamed))
    out.add(f"{form}, streamed", "equals the whole, bit for bit", same, "", at_least=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--blocks", type=int, help="single blocks, 20 in klein 4B")
    parser.add_argument("--folder", type=Path, help="where the files are written")
    options = parser.parse_args()
    config = KLEIN_4B
    if options.blocks:
        config = replace(config, double_blocks=1, single_blocks=options.blocks)
    out = report.Report("load", options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for form, code in (("bf16", None), ("fp8", "float8_e4m3fn")):
            path = Path(folder) / f"flux-2-klein-4b-{form}.safetensors"
            write(path, config, code)
            measure(path, form, config, out)
            path.unlink()
    out.finish()


if __name__ == "__main__":
    main()
