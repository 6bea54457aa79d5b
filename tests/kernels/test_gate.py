"""Every kernel and shipped tile, compiled for the cards it is made for and judged by its machine
code; and the judge itself, seen to object."""

import importlib
import json
import pkgutil
from dataclasses import replace

import pytest

from . import cases, gate
from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.kernels import tiles
from flux2_pack.flux2_core.kernels.jit import Kernel

HERE = gate.unavailable()
needs_compiler = pytest.mark.skipif(HERE is not None, reason=HERE or "")
CASES = {case.name: case for case in cases.all_cases()}


@pytest.fixture(scope="module")
def compiled():
    return {case.name: seen for case, seen in gate.compile_all(CASES.values())}


@pytest.fixture(scope="module")
def baseline():
    from triton import __version__

    return json.loads(gate.baseline_file(__version__).read_text())


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_compiles_to_what_it_should(name, compiled, baseline):
    wrong = gate.problems(CASES[name], compiled[name], baseline, cases.LIMITS, cases.SPILLS)
    assert not wrong, "\n".join(wrong)


def test_no_kernel_is_left_out():
    """A kernel is what `@kernel` marks and no underscore hides."""
    made = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        found = importlib.import_module(f"{kernels.__name__}.{module.name}")
        for name, value in vars(found).items():
            mine = isinstance(value, Kernel) and value.function.__module__ == found.__name__
            if mine and not name.startswith("_"):
                made.add((module.name, name))
    assert made and made == {(case.module, case.kernel) for case in CASES.values()}


def test_baseline_has_every_case_and_no_other():
    for file in (gate.ROOT / "tests" / "kernels").glob("baseline-*.json"):
        assert set(json.loads(file.read_text())) == set(CASES), file.name


# ------------------------------------------------------------------------------ the judge objects


def broken(kernel: str, signature: dict[str, str], arch: int = 89, **more) -> gate.Case:
    constants = more.pop("constants", {"BLOCK": 1024})
    return gate.Case(
        kernel, "flux2_pack.tests.kernels.broken", kernel, arch, signature, constants, 4, 3, **more
    )


LINE = {"x_ptr": "*bf16", "out_ptr": "*fp32", "scale": "fp32"}
SQUARE = {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv", "out_ptr": "*fp32"}
LARGE = tiles.Tile(128, 256, 128, 4, 3)  # four warps cannot hold it
DEEP = tiles.Tile(128, 128, 128, 8, 6)
BAD = {
    "spills": cases.gemm("fp32", 89, LARGE, "plain"),
    "bytes of shared memory": cases.gemm("fp32", 89, DEEP, "plain"),
    "no tensor-core instruction": replace(
        cases.gemm("fp32", 89, tiles.Tile(64, 128, 64, 4, 3), "plain"),
        matrix=cases.MATRIX["fp16", 89],
    ),
    "tensor-core instruction ^HG?MMA": broken(
        "hopper_in_half_precision", SQUARE, 90, constants={"BLOCK": 128}, without=r"^HG?MMA"
    ),
    "div.full": broken("slow_division", LINE, without_ptx=("div.full",)),
    "no 128-bit loads": broken("narrow_loads", LINE),
    "ended with SIGABRT": broken("ends_the_compiler", LINE),
    "does not compile": cases.gemm("fp32", 80, tiles.Tile(64, 64, 64, 4, 3), "plain"),
}


@pytest.fixture(scope="module")
def bad():
    """One child for all: the one that ends the compiler must not take the others with it."""
    renamed = [replace(case, name=name) for name, case in BAD.items()]
    return {case.name: (case, seen) for case, seen in gate.compile_all(renamed, children=1)}


@needs_compiler
@pytest.mark.parametrize("sentence", BAD)
def test_broken_kernels_are_found(sentence, bad):
    case, seen = bad[sentence]
    wrong = gate.problems(case, seen, {sentence: 255}, cases.LIMITS)
    assert any(sentence in found for found in wrong), (wrong, seen)


def test_registers_are_held_to_the_baseline():
    case = CASES[next(iter(CASES))]
    instruction = {case.matrix.replace("\\", "").lstrip("^"): 1}
    seen = gate.Seen(registers=108, wide_loads=1, matrix=instruction)
    assert not gate.problems(case, seen, {case.name: 100}, cases.LIMITS)
    (wrong,) = gate.problems(case, seen, {case.name: 99}, cases.LIMITS)
    assert wrong == "108 registers, the baseline is 99"
    (wrong,) = gate.problems(case, seen, {}, cases.LIMITS)
    assert wrong.startswith("no baseline")
