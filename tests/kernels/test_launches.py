"""What the compile gate compiles of our GEMM is what a launch of it would compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import cases, gate

pytestmark = pytest.mark.skipif(gate.unavailable() is not None, reason=gate.unavailable() or "")


@pytest.fixture(scope="module")
def differences():
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    script = Path(__file__).with_name("launches.py")
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert made.returncode == 0, made.stderr[-2000:]
    return json.loads(made.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [case.name for case in cases.gemms()])
def test_launch(name, differences):
    assert not differences[name], "\n".join(differences[name])
