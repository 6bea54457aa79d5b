"""Matrix products at true shapes, the library's beside ours; attention by everybody who is here."""

from functools import partial

import torch
import torch.nn.functional as F

from gpu_stages.bench import Bench
from gpu_stages.ops import HEAD, accumulating

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.kernels import attention, gemm, tiles
from flux2_pack.flux2_core.kernels.attention import Case

LINEAR1 = 1100.0  # TFLOP/s that dev's first linear should reach on an H100: told, not required


def shapes(b: Bench) -> dict[str, tuple[int, int, int]]:
    """name -> rows, columns, depth."""
    if b.small:
        return {"tiny": (48, 64, 128)}
    rows, picture, text = 4608, 4096, 512
    return {
        "dev linear1": (rows, 55296, 6144),
        "dev linear2": (rows, 6144, 24576),
        "dev qkv": (picture, 18432, 6144),
        "dev qkv of the text": (text, 18432, 6144),
        "klein 9B linear1": (rows, 36864, 4096),
        "klein 4B linear1": (rows, 27648, 3072),
        "klein 4B linear2": (rows, 3072, 12288),
    }


def gemm_stage(b: Bench) -> None:
    for name, (rows, columns, depth) in shapes(b).items():
        if b.left < 10 and not b.small:
            return
        xs = [b.randn(rows, depth, seed=i) for i in range(3)]
        w = b.randn(columns, depth, scale=0.02, seed=9)
        codes, (weight, scale) = [kernels.quantize_rows(x) for x in xs], kernels.quantize_rows(w)
        calls = {
            "bf16": [partial(F.linear, x, w) for x in xs],
            "library": [accumulating(True, *c, weight, scale) for c in codes],
            "library, precise": [accumulating(False, *c, weight, scale) for c in codes],
            "weights alone": [partial(kernels.fp8_weight_linear, x, weight, scale) for x in xs],
        }
        for tile in _tiles(b, rows):
            run = partial(_ours, tile)
            if _runs(b, f"{name}, ours {tile}", partial(run, *codes[0], weight, scale)):
                calls[f"ours {tile}"] = [partial(run, *c, weight, scale) for c in codes]
        taken = b.each(calls, 10)
        library = taken["library"]
        for who, seconds in taken.items():
            speed, beside = 2 * rows * columns * depth / seconds / 1e12, {}
            if who != "library":
                beside = {"peer": "library", "ratio": seconds / library}
            b.out.add(f"product, {name}", who, speed, "TFLOP/s", **beside)


def _tiles(b: Bench, rows: int) -> tuple:
    if not b.cuda or torch.version.hip:
        return ()
    major, minor = torch.cuda.get_device_capability(b.device)
    return tiles.tiles("fp32", 10 * major + minor, rows)


def _ours(tile, codes, scale, weight, weight_scale):
    return gemm.fp8(codes, scale, weight, weight_scale, tile, "fp32")


def _runs(b: Bench, case: str, call) -> bool:
    """Whether a kernel of ours runs at all; if not, that is a line of the report."""
    try:
        call()
    except Exception as problem:
        b.out.add(case, f"failed: {type(problem).__name__}: {problem}"[:200], 0, "")
        return False
    return True


def attention_stage(b: Bench) -> None:
    """Everybody who is right, beside PyTorch's own choice, for dev's 48 heads."""
    heads = 2 if b.small else 48
    for references in (0, 1) if b.small else (0, 1, 4, 10):
        if b.left < 10 and not b.small:
            return
        rows = b.rows(references)
        q, k, v = (b.randn(1, heads, rows, HEAD, seed=i) for i in range(3))
        case = f"attention, {references} references"
        kind = Case(b.device, q.dtype, HEAD, rows, rows)
        able, refused = attention.attention.able(kind)
        for name, why in refused:
            b.out.add(case, f"{name} is not used: {why}"[:200], 0, "")
        calls = {"sdpa": [partial(attention.sdpa, q, k, v)]}
        for name, run in able.items():
            if _runs(b, case, partial(run, q, k, v)):
                calls[name] = [partial(run, q, k, v)]
        taken = b.each(calls, 8 if references < 4 else 4, 1)
        for name, seconds in taken.items():
            speed = 4 * rows * rows * heads * HEAD / seconds / 1e12
            beside = {} if name == "sdpa" else {"peer": "sdpa", "ratio": seconds / taken["sdpa"]}
            b.out.add(case, name, speed, "TFLOP/s", **beside)
