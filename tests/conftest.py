"""Tests reach both halves of the pack through one alias, `flux2_pack`, without running the root
__init__ and without the root on sys.path: ComfyUI's own `nodes` module must stay importable."""

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


def pytest_collection_modifyitems(items):
    reasons = {"gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU"}
    for item in items:
        for marker, reason in reasons.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
