"""What the compile gate compiles: every kernel of the pack, each with every tile it ships."""

from collections.abc import Iterator

from .gate import Case
from flux2_pack.flux2_core.kernels import decode, producers, tiles

LIMITS = tiles.SHARED_MEMORY
SPILLS: dict[str, int] = {}  # cases that may spill, and how often

FP8, BF16, F32, INT = "*fp8e4nv", "*bf16", "*fp32", "i32"
# (accumulate, arch) -> the instruction that must be there
MATRIX = {
    ("fp16", 89): r"^QMMA\.16832\.F16\.E4M3",
    ("fp16", 120): r"^QMMA\.16832\.F16\.E4M3",
    ("block", 120): r"^QMMA\.SF",
    ("fp32", 89): r"^QMMA\.16832\.F32\.E4M3",
    ("fp32", 90): r"^QGMMA\.\w+\.F32\.E4M3",
    ("fp32", 100): r"^UTC\w*MMA",
    ("fp32", 120): r"^QMMA\.16832\.F32\.E4M3",
    ("weight", 80): r"^HMMA\.16816\.F32\.BF16",
    ("weight", 86): r"^HMMA\.16816\.F32\.BF16",
}


def all_cases() -> list[Case]:
    return [*gemms(), *elementwise()]


def elementwise() -> Iterator[Case]:
    """The kernels that quantise, norm and turn: exact divisions, loads of 128 bits."""
    for kernel, signature, constants, warps, stages, arches in (*producers.GATE, *decode.GATE):
        alone = kernel.__name__ == "decode_kernel"
        widths = " ".join(f"{k}={v}" for k, v in constants.items() if v is not None)
        for arch in arches:
            yield Case(
                name=f"sm_{arch} {kernel.__name__} {widths}",
                module="decode" if alone else "row_kernels",
                kernel=kernel.__name__,
                arch=arch,
                signature=signature,
                constants=constants,
                warps=warps,
                stages=stages,
                without_ptx=(".ftz",) if alone else ("div.full",),
            )


def gemms() -> Iterator[Case]:
    for (accumulate, arch), buckets in tiles.TILES.items():
        for tile in dict.fromkeys(t for bucket in buckets.values() for t in bucket):
            for form in ("plain", "fused"):
                yield gemm(accumulate, arch, tile, form)


def gemm(accumulate: str, arch: int, tile: tiles.Tile, form: str) -> Case:
    """A product alone, or with gate, residual and a LoRA of any rank."""
    weight, fused = accumulate == "weight", form == "fused"
    pointers = {
        "a_ptr": BF16 if weight else FP8,
        "b_ptr": "*u8" if weight else FP8,
        "out_ptr": BF16,
        "scale_a_ptr": F32,
        "scale_b_ptr": F32,
        **dict.fromkeys(("gate_ptr", "residual_ptr", "low_ptr", "up_ptr"), BF16),
    }
    sizes = ["M", "N", "K", "rank"]
    sizes += [f"stride_{of}" for of in ("a", "b", "out", "residual", "low", "up")]
    constants = {
        "stride_scale_b": 1,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP": 8,
        "EVEN_K": True,
        "GATED": fused,
        "RESIDUAL": fused,
        "RANK": 32 if fused else 0,
    }
    if weight:
        del pointers["scale_a_ptr"]
    else:
        constants["ACCUMULATE"] = accumulate
    return Case(
        name=f"sm_{arch} {accumulate} {tile} {form}",
        module="gemm",
        kernel="weight_gemm" if weight else "fp8_gemm",
        arch=arch,
        signature=pointers | dict.fromkeys(sizes, INT),
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        matrix=MATRIX.get((accumulate, arch)),
        without=None if fused or weight else r"^HG?MMA",
        without_ptx=(".ftz",) if weight else (),
    )
