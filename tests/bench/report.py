"""What every benchmark shares: JSON lines, requirements, fair timing.

A line holds {name, case, metric, value, unit, peer, ratio, device, torch, commit}; a figure that
must keep a bound also carries `required` and `met`, and the command exits 1 if one is not met.
Importing this file makes the pack importable as `flux2_pack`, without running its __init__.
"""

import json
import platform
import subprocess
import sys
import time
import types
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
pack = types.ModuleType("flux2_pack")
pack.__path__ = [str(ROOT)]
sys.modules.setdefault("flux2_pack", pack)

QUIET = 0.12  # share of all cores that other programs may use while we measure


def options(parser: ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the lines to FILE")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine as well")


class Report:
    """Collects figures; `finish` ends the program with what became of the requirements."""

    def __init__(self, name: str, options: Namespace, device: str = "cpu"):
        self.name, self.force, self.device = name, options.force, device
        self.unmet: list[str] = []
        self.others: list[float] = []  # cores that other programs used, one a timed span
        self.about = {"device": device_name(device), "torch": torch.__version__, "commit": commit()}
        self.file = options.json.open("w") if options.json else None

    def add(
        self,
        case: str,
        metric: str,
        value: float,
        unit: str,
        *,
        peer: str | None = None,
        ratio: float | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """One figure. `ratio` is ours over the peer's; a bound is on `value`."""
        line = {"name": self.name, "case": case, "metric": metric, "value": rounded(value)}
        line |= {"unit": unit, "peer": peer, "ratio": rounded(ratio), **self.about}
        if at_most is not None:
            self.require(line, f"<= {at_most:g}", value <= at_most)
        if at_least is not None:
            self.require(line, f">= {at_least:g}", value >= at_least)
        self.write(line)

    def require(self, line: dict, bound: str, met: bool) -> None:
        line |= {"required": bound, "met": bool(met)}
        if not met:
            seen = "{case}: {metric} is {value} {unit}".format_map(line)
            self.unmet.append(f"{seen}, required {bound}")

    def write(self, line: dict) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if self.file:
            print(text, file=self.file, flush=True)

    def interleaved(self, calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
        """Seconds of each call in each round, all calls once a round, every second round backwards.

        Each runs once before, unmeasured. Ends the program where others keep the machine busy.
        """
        self.quiet()
        for call in calls.values():
            call()
        times = {name: [] for name in calls}

        def measure():
            for i in range(rounds):
                for name in list(calls)[:: -1 if i % 2 else 1]:
                    times[name].append(self.seconds(calls[name]))

        self.others.append(others_over(measure))
        self.judge(self.others[-1])
        return times

    def seconds(self, call: Callable) -> float:
        self.wait()
        begun = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def quiet(self) -> None:
        """Ends the program now if the machine is busy already."""
        self.judge(others_over(lambda: time.sleep(1)))

    def judge(self, others: float) -> None:
        cores = psutil.cpu_count()
        if others > QUIET * cores and not self.force:
            print(
                f"This machine is busy: other programs use {others:.1f} of its {cores} cores, so "
                "timings would say little. Close them, or add --force to measure all the same.",
                file=sys.stderr,
            )
            sys.exit(2)

    def finish(self) -> None:
        """Ends the program: 0, or 1 where a requirement is not met, each named."""
        if self.others:
            self.add("machine", "used by other programs, at most", max(self.others), "cores")
        for sentence in self.unmet:
            print("NOT MET " + sentence, file=sys.stderr)
        sys.exit(1 if self.unmet else 0)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of ours / theirs, round by round: what slows a whole round cancels out."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def others_over(call: Callable) -> float:
    """Cores that other programs (and the hypervisor) used while `call` ran, on average."""

    def busy():
        times = psutil.cpu_times()
        return sum(times) - times.idle - getattr(times, "iowait", 0)

    begun, all_, own = time.perf_counter(), busy(), time.process_time()
    call()
    wall = time.perf_counter() - begun
    return max(0.0, (busy() - all_) - (time.process_time() - own)) / wall


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Short hash of the checkout, with + where files differ from it; empty outside git."""
    try:
        run = ["git", "-C", str(ROOT), "describe", "--always", "--exclude", "*", "--dirty=+"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
