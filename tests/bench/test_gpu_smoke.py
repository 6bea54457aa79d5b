"""The benchmark for a GPU, whole, at tiny size on the CPU; and what it does with time and failure."""

import importlib
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KEYS = {"name", "case", "metric", "value", "unit", "peer", "ratio", "device", "torch", "commit"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpu") / "lines.jsonl"
    command = [sys.executable, str(HERE / "gpu.py"), "--smoke", "--force", "--json", str(file)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    before = set(sys.modules)
    yield importlib.import_module("gpu")
    for name in set(sys.modules) - before:
        if name == "report" or name.startswith("gpu"):
            del sys.modules[name]


@pytest.mark.slow
def test_every_stage_runs(lines, gpu):
    assert all(line.keys() >= KEYS for line in lines)
    ran = [line["case"] for line in lines if line["metric"] == "time" and line["unit"] == "s"]
    assert [c.removeprefix("stage ") for c in ran if c.startswith("stage ")] == list(gpu.STAGES)
    assert not [line for line in lines if "failed" in line["metric"]]


@pytest.mark.slow
def test_every_form_of_a_block_is_timed_and_right(lines):
    forms = ("bf16", "fp8, not fused", "fp8, fused")
    for kind in ("single", "double"):
        case = f"tiny, {kind}, 1 references"
        found = {line["metric"]: line["value"] for line in lines if line["case"] == case}
        assert all(found[form] > 0 for form in forms)
        assert min(found[f"beside bf16, {form}"] for form in forms[1:]) > 25
    steps = {line["metric"] for line in lines if line["case"].startswith("step, tiny")}
    assert {f"derived, {form}" for form in forms} <= steps
    assert {"measured, bf16", "measured, fp8, fused"} <= steps


@pytest.mark.slow
def test_codes_are_compared(lines):
    share = {
        line["case"].split(",")[0]: line for line in lines if "unlike" in line["metric"]
    }  # the last one of each
    assert share["requantize"]["required"] == "<= 0" and share["requantize"]["met"]
    assert {"quantize_rows", "modulate_quantize", "swiglu_quantize"} <= share.keys()


def make(gpu, tmp_path, seconds, **stages):
    options = Namespace(json=tmp_path / "lines.jsonl", force=True)
    out = sys.modules["report"].Report("gpu", options)
    gpu.STAGES.clear()
    gpu.STAGES.update(stages)
    b = gpu.Bench(out, torch.device("cpu"), False, time.monotonic() + seconds)
    gpu.run(b, list(stages))
    return out, [json.loads(line) for line in options.json.read_text().splitlines()]


def test_a_stage_without_time_is_left_out(gpu, tmp_path):
    ran = []
    stages = {
        "short": gpu.Stage(lambda b: ran.append("short"), 1),
        "long": gpu.Stage(lambda b: ran.append("long"), 100),
        "last": gpu.Stage(lambda b: ran.append("last"), 2),
    }
    out, found = make(gpu, tmp_path, 50, **stages)
    assert ran == ["short", "last"] and not out.unmet
    assert [line["metric"] for line in found if line["case"] == "stage long"] == [
        "left out for lack of time"
    ]


def test_a_stage_that_fails_is_told_and_the_rest_still_runs(gpu, tmp_path):
    def fails(b):
        b.out.add("half", "a figure", 1.0, "s")
        raise RuntimeError("an illegal memory access was encountered")

    ran = []
    stages = {"bad": gpu.Stage(fails, 0), "good": gpu.Stage(lambda b: ran.append(1), 0)}
    out, found = make(gpu, tmp_path, 50, **stages)
    assert ran and found[0]["case"] == "half"
    assert len(out.unmet) == 1 and "illegal memory access" in out.unmet[0]


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, str(HERE / "gpu.py")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 1 and "--smoke" in made.stderr
