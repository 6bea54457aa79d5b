"""The commands' own parts: the workflow converter, the choice of a host, sentences for mistakes."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_pack.tests.hosting.graph import to_prompt

ROOT = Path(__file__).resolve().parents[1]
SEED = ["INT", {"default": 0, "control_after_generate": True}]
KNOWN = {
    "Source": {
        "display_name": "Source",
        "input": {"required": {"seed": SEED, "size": ["INT", {}]}},
    },
    "Middle": {"display_name": "Middle", "input": {"required": {"image": ["IMAGE", {}]}}},
    "Sink": {
        "display_name": "Sink",
        "input": {"required": {"image": ["IMAGE", {}], "mode": [["a", "b"], {}]}},
    },
    "Load": {
        "display_name": "Load",
        "input": {
            "required": {"image": [["x.png"], {"image_upload": True}]},
            "optional": {"note": ["STRING", {}]},
        },
    },
}


@pytest.fixture
def dev(monkeypatch):
    """The script as a module; the path that it sets for itself is taken back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("flux2_pack.dev")


def node(id, kind, values=(), inputs=(), outputs=(), **more):
    slots = [{"name": name, "type": type, "link": link} for name, type, link in inputs]
    made = [{"name": type, "type": type} for type in outputs]
    return {
        "id": id,
        "type": kind,
        "widgets_values": list(values),
        "inputs": slots,
        "outputs": made,
        **more,
    }


def chain(middle, **more):
    """Source -> middle -> Sink."""
    nodes = [
        node(1, "Source", [7, "randomize", 64], outputs=["IMAGE"]),
        node(2, middle, inputs=[("image", "IMAGE", 1)], outputs=["IMAGE"], **more),
        node(3, "Sink", ["b"], [("image", "IMAGE", 2)]),
        node(4, "MarkdownNote", ["words"]),
    ]
    return {"nodes": nodes, "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]]}


def test_widgets_and_links():
    prompt = to_prompt(chain("Middle"), KNOWN)
    assert sorted(prompt) == ["1", "2", "3"]
    assert prompt["1"]["inputs"] == {"seed": 7, "size": 64}  # "randomize" is no input
    assert prompt["3"]["inputs"] == {"mode": "b", "image": ["2", 0]}
    assert prompt["3"]["_meta"] == {"title": "Sink"}


@pytest.mark.parametrize(
    ("middle", "more", "image"),
    [
        ("Middle", {"mode": 4}, ["1", 0]),  # bypassed: passed on
        ("Middle", {"mode": 2}, None),  # muted: nothing comes
        ("Reroute", {}, ["1", 0]),
        ("PrimitiveNode", {}, "value"),
    ],
)
def test_nodes_that_do_not_run(middle, more, image):
    workflow = chain(middle, **more)
    workflow["nodes"][1]["widgets_values"] = ["value"]
    prompt = to_prompt(workflow, KNOWN)
    assert sorted(prompt) == ["1", "3"]
    assert prompt["3"]["inputs"].get("image") == image


def test_upload_buttons_count_as_widgets():
    workflow = {"nodes": [node(1, "Load", ["x.png", "image", "words"])], "links": []}
    assert to_prompt(workflow, KNOWN)["1"]["inputs"] == {"image": "x.png", "note": "words"}


def test_what_the_host_does_not_know_is_named():
    with pytest.raises(ValueError, match="no 'Nobody'"):
        to_prompt(chain("Nobody"), KNOWN)
    workflow = {"nodes": [node(1, "Source", [7, "fixed", 64, "extra"])], "links": []}
    with pytest.raises(ValueError, match="no widgets for \\['extra'\\]"):
        to_prompt(workflow, KNOWN)


def test_a_host_of_the_users_own_runs_with_its_own_python(dev, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(SystemExit, match=r"no main\.py"):
        dev.host_folder(str(tmp_path))
    (tmp_path / "main.py").touch()
    python = dev.venv_python(tmp_path / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert dev.host_folder(str(tmp_path)) == tmp_path
    assert dev.host_python(tmp_path) == python
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert dev.host_python(tmp_path) == Path(sys.executable)


def test_an_environment_is_made_once(dev, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(dev, "VENV", tmp_path)
    monkeypatch.setattr(dev, "run", lambda command: ran.append(command))
    monkeypatch.setattr(dev, "let_torchvision_import", lambda: ran.append("fix"))
    monkeypatch.setattr(dev, "install_triton", lambda: None)
    dev.environment("host", "test")
    assert len(ran) == 3 and "torch==2.13.0" in ran[1] and "pytest==9.2.0" in ran[1]
    dev.environment("host", "test")
    assert len(ran) == 3
    monkeypatch.setitem(dev.PINS, "test", "pytest==0")
    dev.environment("host", "test")
    assert len(ran) == 4 and "pytest==0" in ran[3] and "torch==2.13.0" not in ran[3]


@pytest.mark.parametrize(
    ("place", "there", "asked"),
    [
        (("linux", "x86_64"), False, 1),
        (("linux", "x86_64"), True, 0),
        (("win32", "AMD64"), False, 0),
    ],
)
def test_triton_is_installed_where_it_runs_and_is_missing(
    dev, tmp_path, monkeypatch, place, there, asked
):
    ran = []
    monkeypatch.setattr(dev, "VENV", tmp_path)
    monkeypatch.setattr(dev, "pip", lambda *command: ran.append(command))
    monkeypatch.setattr(dev.sys, "platform", place[0])
    monkeypatch.setattr(dev.platform, "machine", lambda: place[1])
    if there:
        (tmp_path / "lib" / "python3.11" / "site-packages" / "triton").mkdir(parents=True)
    dev.install_triton()
    assert len(ran) == asked
    assert all(dev.TRITON in command for command in ran)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "no_such_thing"], "There is no benchmark 'no_such_thing'. There are:"),
        (["demo", "--colour"], "unknown: --colour"),
        (["host", "--comfyui", "no/such/folder"], "There is no main.py in"),
    ],
)
def test_mistakes_are_named(arguments, words):
    command = [sys.executable, str(ROOT / "dev.py"), *arguments]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert made.returncode and words in made.stderr and "Traceback" not in made.stderr
