"""One real server for the workflow tests; in-process ones use the fixture `host`."""

import os
import sys
from pathlib import Path

import pytest

from flux2_pack.tests.hosting.server import Server
from flux2_pack.tests.hosting.service import Service

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        pytest.skip("needs a ComfyUI: set COMFYUI_PATH, or run dev.py test")
    base = tmp_path_factory.mktemp("server")
    with (
        Service(sys.executable, base) as hosted,
        Server(comfyui, base, sys.executable, ROOT, env=hosted.environment) as running,
    ):
        yield running
