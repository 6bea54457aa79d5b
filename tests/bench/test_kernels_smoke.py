"""The benchmark of kernels, its quick parts, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="bounds of a GPU need a quiet one")
def test_accuracy_and_calls_are_told(tmp_path):
    file = tmp_path / "lines.jsonl"
    command = [sys.executable, str(HERE / "kernels.py"), "--force", "--json", str(file)]
    made = subprocess.run([*command, "--only", "accuracy", "calls"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    lines = {(d["case"], d["metric"]): d for d in map(json.loads, file.read_text().splitlines())}
    assert lines["linear, Gaussian", "fp8 computed"]["met"]  # 28.3 dB
    assert lines["linear, Gaussian", "fp8 weights only"]["met"]  # 31 dB
    assert ("a call", "to find who serves") in lines
