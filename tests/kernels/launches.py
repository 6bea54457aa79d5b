"""A child of test_launches: calls what launches our GEMM, at one of FLUX.2's sizes, with a made-up
card in Triton's place for drivers, and compares what Triton would compile for it with what the
compile gate compiles. Prints a line of JSON: case -> what differs.
"""

import json
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))
import gate

gate.pack_alias()
from flux2_pack.flux2_core.kernels import gemm  # noqa: E402 (the alias comes first)
from flux2_pack.flux2_core.kernels.tiles import Tile  # noqa: E402
from flux2_pack.tests.kernels import cases  # noqa: E402

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
ROWS = 520
KINDS = ("types", "constants", "attributes", "options")


class Card:
    """What a launch asks a driver for."""

    arch = 0

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def zeros(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.float32).to(dtype)


def product(case) -> None:
    """A linear of klein 4B, alone or with all that its epilogue adds."""
    columns, depth = 3072, 9216
    tile = Tile(*(case.constants[name] for name in ("BM", "BN", "BK")), case.warps, case.stages)
    parts = gemm.NONE
    if case.constants["GATED"]:
        low, up = zeros(ROWS, 32), zeros(columns, 32)
        parts = gemm.Epilogue(zeros(ROWS, columns), zeros(columns), low, up)
    weight = zeros(columns, depth, dtype=E4M3), torch.ones(columns, 1)
    if case.kernel == "weight_gemm":
        gemm.weight_only(zeros(ROWS, depth), *weight, tile, parts)
    else:
        form = case.constants["ACCUMULATE"]
        codes = zeros(ROWS, depth, dtype=E4M3)
        gemm.fp8(codes, torch.ones(ROWS, 1), *weight, tile, form, BF16, parts)


def differences(case) -> list[str]:
    launched = []

    def note(self, key, signature, device, constants, options, attributes, warmup):
        launched.append((self.__name__, signature, constants, attributes, options))

    JITFunction._do_compile = note
    Card.arch = case.arch
    product(case)
    function, *wanted = gate.source(case)
    seen = [parts for name, *parts in launched if name == function.__name__]
    if not seen:
        return [f"{function.__name__} is not launched"]
    *parts, options = seen[0]
    wanted.append({"num_warps": case.warps, "num_stages": case.stages})
    parts.append({name: getattr(options, name) for name in wanted[-1]})
    found = []
    for what, mine, theirs in zip(KINDS, wanted, parts, strict=True):
        mine, theirs = plain(function, mine), plain(function, theirs)
        found += [
            f"{what}, {name}: {mine.get(name)}, launched {theirs.get(name)}"
            for name in sorted(set(mine) | set(theirs))
            if mine.get(name) != theirs.get(name)
        ]
    return found


def plain(function, table: dict) -> dict[str, str]:
    """By the arguments' names, which Triton gives as names or as places."""
    names = [p.name for p in function.params]
    return {k if isinstance(k, str) else names[k[0]]: str(v) for k, v in table.items() if v != []}


if __name__ == "__main__":
    driver.set_active(Card())
    print(json.dumps({case.name: differences(case) for case in cases.gemms()}))  # noqa: T201
