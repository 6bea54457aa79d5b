"""What a user of ComfyUI Manager gets: the packed archive, and that it works where it lands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_pack.tests.hosting.graph import to_prompt
from flux2_pack.tests.hosting.pack import install, pack, packed_files
from flux2_pack.tests.hosting.server import PROJECT, Server

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 40e6  # bytes, packed
SHIPPED = {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
FOLDERS = {"flux2_core", "nodes", "workflows"}

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout"
)


def project(key: str) -> str:
    """A string value of pyproject.toml (Python 3.10 has no TOML reader)."""
    return re.search(rf'^{key} = "([^"]*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[1]


def test_folder_is_the_normalised_project_name():
    """A name with a hyphen can never be imported, so it hides no module of anybody."""
    assert re.sub(r"[-_.]+", "-", project("name")).lower() == PROJECT
    assert not PROJECT.isidentifier()


def test_version_is_one_the_registry_takes():
    assert re.fullmatch(r"\d+\.\d+\.\d+", project("version"))
    assert f"## [{project('version')}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_nothing_to_install():
    """The host has all that the pack needs; torch in a list is how packs break installations."""
    assert re.search(r"^dependencies = \[\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert not [n for n in packed_files(ROOT) if Path(n).name in ("requirements.txt", "install.py")]


def test_holds_what_users_need_and_nothing_else():
    files = packed_files(ROOT)
    top = {name for name in files if "/" not in name}
    folders = {name.split("/")[0] for name in files if "/" in name}
    assert top == SHIPPED and folders - {"locales"} == FOLDERS
    assert not [name for name in files if re.search(r"(^|/)(test_|tests/|bench/)", name)]
    assert any(re.fullmatch(r"flux2_core/nano/.*\.safetensors", name) for name in files)
    workflows = [name for name in files if re.fullmatch(r"workflows/[^/]+\.json", name)]
    assert len(workflows) >= 4
    assert {f"{name[:-5]}.jpg" for name in workflows} <= set(files)


def test_every_node_has_its_help_page_in_the_archive():
    ids = re.compile(r'node_id="(\w+)"')
    named = {i for file in (ROOT / "nodes").glob("*.py") for i in ids.findall(file.read_text())}
    pages = {f"nodes/web/docs/{name}.md" for name in named}
    assert len(named) >= 13 and pages <= set(packed_files(ROOT))


def test_is_small(tmp_path):
    size = pack(ROOT, tmp_path / "node.zip").stat().st_size
    assert 0 < size < LIMIT, f"{size / 1e6:.1f} MB"


@pytest.mark.host
def test_the_host_reads_our_project_file(host):
    from comfy_config import config_parser

    read = config_parser.extract_node_configuration(str(ROOT))
    assert (read.project.name, read.tool_comfy.publisher_id) == (PROJECT, "flux2-kit")
    assert read.tool_comfy.display_name == "FLUX.2 Kit"
    assert read.project.supported_comfyui_version == ">=0.3.75"
    assert "OS Independent" in read.project.supported_os
    assert not read.tool_comfy.web  # served under another name than the help pages: WEB_DIRECTORY


@pytest.mark.host
@pytest.mark.slow
def test_runs_where_the_manager_puts_it(tmp_path):
    """Packed, unpacked into an empty host, the default workflow run on nano, the picture judged."""
    folder = install(pack(ROOT, tmp_path / "node.zip"), tmp_path / "base" / "custom_nodes")
    workflow = json.loads((folder / "workflows" / "text_to_image.json").read_text("utf-8"))
    with Server(os.environ["COMFYUI_PATH"], tmp_path / "base", sys.executable) as server:
        prompt = to_prompt(workflow, server.get("/object_info"))
        (picture,) = server.saved(server.run(prompt, workflow))
    judge = [sys.executable, ROOT / "tests" / "hosting" / "verdict.py", picture]
    wanted = json.dumps(workflow["extra"]["flux2_kit"])
    answer = subprocess.run([*judge, wanted], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
