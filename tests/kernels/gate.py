"""The compile gate: kernels compiled ahead of time, read and judged, on a machine without a GPU.

    .venv/bin/python tests/kernels/gate.py [--write] [PART OF A NAME ...]

prints what each case compiles to, and with --write makes the registers of today the baseline.
Compiling happens in child processes that live on from case to case: the compiler can abort rather
than raise, and then only its child ends.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = "flux2_pack"
SLACK = 8  # registers above the baseline
SECONDS = 90  # for one compile; the largest takes 3 here

# Counted in the machine code. A spill is a load from or a store to local memory.
SASS = {
    "spills": r"\b(?:LDL|STL)\b",
    "wide loads": r"\b(?:LDG|LDGSTS)\.[\w.]*128|\bUTMALDG",
}
MATRIX = r"\b(?:[A-Z]+MMA)[\w.]*"  # every tensor-core instruction, with its suffixes
PTX = ("div.full", ".ftz", "max.NaN")


@dataclass(frozen=True)
class Case:
    """One kernel for one architecture, and what its machine code must look like."""

    name: str
    module: str  # under flux2_core.kernels
    kernel: str
    arch: int
    signature: dict[str, str]  # argument -> Triton's type: "*bf16", "*fp8e4nv", "i32", ...
    constants: dict[str, object]
    warps: int
    stages: int
    matrix: str | None = None  # expression for the tensor-core instruction that must be there
    without: str | None = None  # and for the one that must not
    wide_loads: bool = True
    without_ptx: tuple[str, ...] = ()


@dataclass
class Seen:
    """What a case compiled to; `error` where it did not."""

    registers: int = 0
    shared: int = 0
    spills: int = 0
    wide_loads: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    ptx: dict[str, int] = field(default_factory=dict)
    error: str = ""


def unavailable() -> str | None:
    """Why the gate cannot run here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the compile gate needs Linux on x86-64: Triton brings its compiler for that alone"
    try:
        from triton import __version__
    except ImportError:
        return "Triton is not installed"
    if not baseline_file(__version__).exists():
        return f"no baseline for Triton {__version__}: gate.py --write makes one"
    return None


def baseline_file(version: str) -> Path:
    return Path(__file__).with_name(f"baseline-{version}.json")


# ----------------------------------------------------------------------------------------- judging


def problems(
    case: Case,
    seen: Seen,
    baseline: dict[str, int],
    limits: dict[int, int],
    spills: dict[str, int] | None = None,
) -> list[str]:
    """Sentences about what is wrong with a compiled case. `limits`: bytes of shared memory of each
    architecture; `spills`: cases that may spill, and how often."""
    if seen.error:
        return [f"does not compile: {seen.error}"]
    found = []
    instructions = ", ".join(seen.matrix) or "none"
    if case.matrix and not any(re.search(case.matrix, i) for i in seen.matrix):
        found.append(f"no tensor-core instruction {case.matrix}, but {instructions}")
    if case.without and any(re.search(case.without, i) for i in seen.matrix):
        found.append(f"tensor-core instruction {case.without} among {instructions}")
    if seen.spills > (allowed := (spills or {}).get(case.name, 0)):
        found.append(f"{seen.spills} spills, {allowed} allowed")
    if seen.shared > limits[case.arch]:
        found.append(f"{seen.shared} bytes of shared memory, the card has {limits[case.arch]}")
    if case.wide_loads and not seen.wide_loads:
        found.append("no 128-bit loads")
    found += [f"{n} x {word} in PTX" for word, n in seen.ptx.items() if word in case.without_ptx]
    if case.name not in baseline:
        found.append("no baseline: run gate.py --write and look at what changes")
    elif seen.registers > baseline[case.name] + SLACK:
        found.append(f"{seen.registers} registers, the baseline is {baseline[case.name]}")
    return found


# --------------------------------------------------------------------------------------- compiling


class Compiler:
    """A child process that compiles case after case, made anew when it has ended."""

    def __init__(self, cache: str):
        self.cache, self.process = cache, None

    def __call__(self, case: Case) -> Seen:
        process = self.process = self.process or self.start()
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(asdict(case)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return Seen(**json.loads(line))
        self.process = None
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Seen(error=f"the compiler ended with {how}")

    def start(self) -> subprocess.Popen:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        env |= {"TRITON_CACHE_DIR": self.cache, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, __file__, "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


def compile_all(cases: Iterable[Case], children: int = 2) -> Iterator[tuple[Case, Seen]]:
    """Each case with what it compiled to, as they come."""
    waiting, done = queue.SimpleQueue(), queue.SimpleQueue()
    cases = list(cases)
    for case in cases:
        waiting.put(case)

    def work(compiler: Compiler) -> None:
        with contextlib.closing(compiler):
            while True:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                done.put((case, compiler(case)))

    with tempfile.TemporaryDirectory(prefix="flux2-gate-") as cache:
        threads = [threading.Thread(target=work, args=(Compiler(cache),)) for _ in range(children)]
        for thread in threads:
            thread.start()
        for _ in cases:
            yield done.get()
        for thread in threads:
            thread.join()


def child() -> None:
    """Reads cases, a line each, and writes what they compile to. Nothing else may write there."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pack_alias()
    for line in sys.stdin:
        try:
            seen = read(Case(**json.loads(line)))
        except Exception as error:
            told = [s for s in str(error).splitlines() if s.strip()] or [""]
            seen = Seen(error=f"{type(error).__name__}: {told[-1].strip()[:200]}")
        out.write(json.dumps(asdict(seen)) + "\n")
        out.flush()


def read(case: Case) -> Seen:
    """Compile a case, and count what matters in its code."""
    compiled = compile_case(case)
    sass, resources = disassembled(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    matrix: dict[str, int] = {}
    for name in re.findall(MATRIX, sass):
        matrix[name] = matrix.get(name, 0) + 1
    return Seen(
        registers=int(re.search(r"REG:(\d+)", resources)[1]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(SASS["spills"], sass)),
        wide_loads=len(re.findall(SASS["wide loads"], sass)),
        matrix=matrix,
        ptx={word: ptx.count(word) for word in PTX if word in ptx},
    )


def compile_case(case: Case):
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": case.warps, "num_stages": case.stages}
    target = GPUTarget("cuda", case.arch, 32)
    return triton.compile(ASTSource(*source(case)), target=target, options=options)


def source(case: Case) -> tuple:
    """-> Triton's function, its signature, constants and attributes. Pointers and sizes count as
    multiples of 16, as they are at run time (test_launches), except where the kernel asks not to
    be specialised."""
    jit = importlib.import_module(f"{PACK}.flux2_core.kernels.jit")
    module = importlib.import_module(
        case.module if "." in case.module else f"{PACK}.flux2_core.kernels.{case.module}"
    )
    function = jit.jitted(getattr(module, case.kernel))
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        if parameter.name in case.constants:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = case.constants[parameter.name]
            continue
        kind = signature[parameter.name] = case.signature[parameter.name]
        if kind.startswith("*") or (kind[0] == "i" and not parameter.do_not_specialize):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return function, signature, constants, attributes


def disassembled(cubin: bytes) -> tuple[str, str]:
    """-> machine code, and the lines that say what it uses."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-sass", "-res-usage")
        )


def pack_alias() -> None:
    """The pack as tests know it, of the core no more than is asked for: children start sooner."""
    for name, folder in ((PACK, ROOT), (f"{PACK}.flux2_core", ROOT / "flux2_core")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(name, package)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make this the baseline")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.child:
        return child()
    pack_alias()
    import triton

    cases = importlib.import_module(f"{PACK}.tests.kernels.cases")
    file = baseline_file(triton.__version__)
    baseline = json.loads(file.read_text()) if file.exists() else {}
    chosen = [c for c in cases.all_cases() if all(part in c.name for part in options.names)]
    for case, seen in compile_all(chosen):
        if options.write and not seen.error:
            baseline[case.name] = seen.registers
        wrong = problems(case, seen, baseline, cases.LIMITS, cases.SPILLS)
        lines = [f"{case.name}: {seen}", *(f"    WRONG {sentence}" for sentence in wrong)]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    if options.write:
        known = {case.name for case in cases.all_cases()}
        kept = {name: regs for name, regs in sorted(baseline.items()) if name in known}
        file.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
