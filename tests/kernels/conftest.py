"""Tests marked `interpreted` run in a child process, where Triton's interpreter is switched on and
repaired (shim.py): one child for each file, its outcome told here test by test."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = importlib.util.find_spec("triton") is None

if INSIDE:
    from flux2_pack.tests.kernels import shim

    shim.install()


@pytest.fixture
def fussy(monkeypatch):
    """fussy(op): whoever serves it fails, as some libraries do where a tensor is empty. References
    that are computed alone have no text beside them."""
    from flux2_pack.flux2_core.kernels import table

    def fail(*_):
        raise RuntimeError("the tensor is empty")

    def install(name: str) -> None:
        op = table.OPS[name]
        monkeypatch.setattr(op, "candidates", [table.Candidate("fussy", 99, lambda _: None, fail)])
        monkeypatch.setattr(op, "chosen", {})

    return install


outcomes: dict[Path, dict[str, str | None]] = {}


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter, in a child")


def pytest_collection_modifyitems(items):
    for item in items:
        if MISSING and item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason="needs Triton, which is made for Linux"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if INSIDE or not pyfuncitem.get_closest_marker("interpreted"):
        return None
    if pyfuncitem.path not in outcomes:
        outcomes[pyfuncitem.path] = run(pyfuncitem)
    why = outcomes[pyfuncitem.path].get(pyfuncitem.name, "the child did not run it")
    if why is not None:
        pytest.fail(why, pytrace=False)
    return True


def run(item) -> dict[str, str | None]:
    """Names of this file's chosen tests -> None, or what went wrong in the child."""
    chosen = [
        i.nodeid
        for i in item.session.items
        if i.path == item.path and i.get_closest_marker("interpreted")
    ]
    report = Path(tempfile.mkdtemp(prefix="interpreted")) / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    made = subprocess.run(
        [*command, f"--junitxml={report}", *chosen],
        cwd=item.config.rootpath,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if not report.exists():
        return dict.fromkeys((n.split("::", 1)[1] for n in chosen), made.stdout + made.stderr)
    cases = list(ElementTree.parse(report).iter("testcase"))
    shutil.rmtree(report.parent)
    found = {}
    for case in cases:
        failures = [f.text or f.get("message") for f in case if f.tag in ("failure", "error")]
        found[case.get("name")] = "\n".join(map(str, failures)) if failures else None
    return found
