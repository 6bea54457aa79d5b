"""Tests reach both halves of the pack through one alias, `flux2_pack`, without running the root
__init__ and without the root on sys.path: ComfyUI's own `nodes` module must stay importable.

Tests marked `host` use the ComfyUI that COMFYUI_PATH names, and are skipped without it. Fixtures:
`host` is that ComfyUI inside this process (hosting/inprocess.py).
"""

import os
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
pack = types.ModuleType("flux2_pack")
pack.__path__ = [str(ROOT)]
sys.modules["flux2_pack"] = pack

from flux2_pack.tests.hosting import inprocess  # noqa: E402 (the alias comes first)

COMFYUI = os.environ.get("COMFYUI_PATH")
BASE = (
    inprocess.prepare(Path(COMFYUI).resolve(), not torch.cuda.is_available()) if COMFYUI else None
)


def pytest_report_header():
    return f"ComfyUI: {COMFYUI or 'none (COMFYUI_PATH is not set), host tests are skipped'}"


def pytest_collection_modifyitems(items):
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "host": None if COMFYUI else "needs a ComfyUI: set COMFYUI_PATH, or run dev.py test",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure():
    if BASE:
        inprocess.remove(BASE)


@pytest.fixture(scope="session")
def host():
    """The ComfyUI that COMFYUI_PATH names, in this process, with this pack loaded."""
    if not BASE:
        pytest.skip("needs a ComfyUI: set COMFYUI_PATH, or run dev.py test")
    return inprocess.Host(BASE, ROOT, "flux2_pack")
