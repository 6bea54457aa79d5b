"""The layers of the pack, kept by tests: the core knows no host, the root imports nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [*(ROOT / "flux2_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "folder_paths", "latent_preview", "nodes")
OPTIONAL = ("tokenizers", "transformers", "diffusers", "triton", "gguf", "comfy_kitchen")
MAX_LINES = 400

IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.path.insert(0, {str(ROOT)!r})
before = set(sys.modules)
import flux2_core
for module in pkgutil.walk_packages(flux2_core.__path__, "flux2_core."):
    importlib.import_module(module.name)
print(*sorted(set(sys.modules) - before))
"""


def imported_by(code: str) -> set[str]:
    made = subprocess.run(
        [sys.executable, "-P", "-c", code]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return {name.split(".")[0] for name in made.stdout.split()}


def test_core_imports_no_host_and_nothing_optional():
    seen = imported_by(IMPORT_ALL)
    assert "flux2_core" in seen and "torch" in seen
    assert not seen & {*HOST_MODULES, *OPTIONAL}


def test_root_imports_nothing():
    """pytest and the host both run it, the first one without a host."""
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize(
    ("file", "code", "refused"),
    [
        ("flux2_core/x.py", "import comfy.utils", True),
        ("flux2_core/x.py", "from folder_paths import models_dir", True),
        ("flux2_core/x.py", "from comfy_api.latest import io", True),
        ("flux2_core/x.py", "import nodes", True),
        ("nodes/x.py", "import comfy.utils", True),
        ("nodes/x.py", "from flux2_core import latents", True),
        ("nodes/x.py", "from ..flux2_core import latents", False),
        ("nodes/host.py", "import comfy.utils", False),
    ],
)
def test_linter_keeps_the_layers(file, code, refused):
    pytest.importorskip("ruff", reason="needs ruff")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "TID251",
        "--stdin-filename",
        file,
    ]
    made = subprocess.run([*command, "-"], cwd=ROOT, input=code, capture_output=True, text=True)
    assert ("TID251" in made.stdout) == refused, made.stdout + made.stderr


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_shipped_code_is_a_good_guest(file):
    """Relative imports within the pack, no sys.path, no logging set-up, files that can be read."""
    text = file.read_text("utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if a.name.startswith("flux2_")]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("sys", "path"), ("logging", "basicConfig")}
    assert len(text.splitlines()) <= MAX_LINES
