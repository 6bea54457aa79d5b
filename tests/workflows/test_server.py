"""The shipped workflows on a real server: listed, known node by node, and drawn right."""

import io

import pytest
from PIL import Image

from flux2_pack.flux2_core.nano import scenes
from flux2_pack.tests.hosting import graph
from flux2_pack.tests.hosting.server import PROJECT
from flux2_pack.tests.workflows.shipped import FOLDER, NAMES, load, wanted

pytestmark = [pytest.mark.host, pytest.mark.slow]
HIDDEN = {"prompt", "extra_pnginfo"}  # what a node is told without a slot
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def known(server):
    return server.get("/object_info")


def test_the_template_browser_lists_them(server):
    """As the front end asks for them: names, files and thumbnails."""
    assert sorted(server.get("/workflow_templates")[PROJECT]) == list(NAMES)
    for name in NAMES:
        at = f"/api/workflow_templates/{PROJECT}/{name}"
        assert server.get(f"{at}.json") == load(name)
        assert server.raw(f"{at}.jpg") == (FOLDER / f"{name}.jpg").read_bytes()


@every
def test_nodes_and_widgets(known, name):
    """Slots, widgets, their order and number are those of this host's nodes."""
    for node in load(name)["nodes"]:
        if node["type"] in graph.SILENT:
            continue
        info = known[node["type"]]
        widgets = graph.widgets(info)
        slots = {slot["name"] for slot in node["inputs"]}
        assert slots == {name for group in info["input_order"].values() for name in group} - HIDDEN
        assert [s["name"] for s in node["inputs"] if "widget" in s] == [w[0] for w in widgets]
        outputs = list(zip(info["output_name"], info["output"], strict=True))
        if not node["type"].startswith("Flux2Kit"):  # newer hosts append outputs to their nodes
            outputs = outputs[: len(node["outputs"])]
        assert [(s["name"], s["type"]) for s in node["outputs"]] == outputs
        extra = sum(bool(options.get("control_after_generate")) for _, _, options in widgets)
        assert len(node["widgets_values"]) == len(widgets) + extra, node["type"]


def test_every_node_of_ours_is_used(known):
    used = {node["type"] for name in NAMES for node in load(name)["nodes"]}
    assert used >= {name for name in known if name.startswith("Flux2Kit")}


@every
def test_drawn_right(server, known, name):
    """Queued as shipped, the picture passes its checker, and carries the workflow."""
    workflow = load(name)
    outputs = server.run(graph.to_prompt(workflow, known), workflow)
    (file,) = server.saved(outputs)
    with Image.open(io.BytesIO(file.read_bytes())) as picture:
        report = scenes.check(picture, wanted(workflow))
        assert picture.size == (128, 128) and '"flux2_kit"' in picture.info["workflow"]
    assert report.ok, str(report)
