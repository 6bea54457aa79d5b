"""Shipped tiles: which block sizes, warps and stages a kernel may run with on which card.

Every line here passes the compile gate (tests/kernels/gate.py): right tensor-core instruction, no
spills, shared memory within the card's limit. The first tile of a bucket is where tuning starts;
which one runs on a card is what `tune` found there.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows, columns and depth of a program's block; warps; stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}"


# Rows of a GEMM up to which the tiles for few rows serve: 512 text tokens, padded.
FEW_ROWS = 1024

# Bytes of shared memory that one block may ask for. The compiler does not check it.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

# How our GEMM accumulates:
#   fp32   in float32, as torch's scaled matmul does (half rate on GeForce)
#   fp16   in float16 within one slice of K as deep as the tile, float32 across slices (full rate)
#   block  block-scaled instruction with all scales 1, float32 (full rate on sm_120)
#   weight weights alone are fp8; activations and products in bfloat16
TILES: dict[tuple[str, int], dict[str, tuple[Tile, ...]]] = {
    ("fp16", 89): {
        "few": (Tile(64, 128, 64, 4, 4),),
        "many": (Tile(128, 128, 64, 4, 3), Tile(128, 128, 128, 8, 3), Tile(128, 256, 64, 8, 3)),
    },
    ("fp16", 120): {
        "few": (Tile(64, 128, 64, 4, 4),),
        "many": (Tile(128, 128, 64, 4, 3), Tile(128, 128, 128, 8, 3), Tile(128, 256, 64, 8, 3)),
    },
    ("block", 120): {
        "few": (Tile(64, 128, 128, 4, 3),),
        "many": (Tile(128, 128, 128, 8, 2),),
    },
    ("fp32", 89): {
        "few": (Tile(64, 128, 128, 4, 4),),
        "many": (Tile(128, 128, 128, 8, 3),),
    },
    ("fp32", 90): {
        "few": (Tile(64, 128, 128, 4, 4),),
        "many": (Tile(128, 128, 128, 8, 4),),
    },
    ("fp32", 100): {
        "few": (Tile(128, 128, 128, 8, 4),),
        "many": (Tile(128, 256, 128, 8, 3),),
    },
    ("fp32", 120): {
        "few": (Tile(64, 128, 128, 4, 3),),
        "many": (Tile(128, 128, 128, 8, 3),),
    },
    ("weight", 80): {
        "few": (Tile(64, 128, 64, 4, 3),),
        "many": (Tile(128, 128, 64, 8, 3),),
    },
    ("weight", 86): {
        "few": (Tile(128, 64, 64, 4, 3),),
        "many": (Tile(128, 128, 64, 8, 3),),
    },
}


def bucket(rows: int) -> str:
    return "few" if rows <= FEW_ROWS else "many"


def known(arch: int) -> int:
    """The architecture whose tiles a card uses: its own, else the newest older one of its kind
    (sm_103 uses those of sm_100, sm_121 those of sm_120, sm_87 those of sm_86)."""
    same = [sm for sm in SHARED_MEMORY if sm <= arch and sm // 10 == arch // 10]
    return max(same, default=0)


def tiles(accumulate: str, arch: int, rows: int) -> tuple[Tile, ...]:
    """The tiles to choose from, the first one first; none where the kernel is not made for it."""
    return TILES.get((accumulate, known(arch)), {}).get(bucket(rows), ())
