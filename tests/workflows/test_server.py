"""The shipped workflows on a real server: listed, known node by node, and drawn right."""

import io

import numpy as np
import pytest
from PIL import Image

from flux2_pack.tests.hosting import graph, verdict
from flux2_pack.tests.hosting.server import PROJECT
from flux2_pack.tests.workflows.shipped import FOLDER, NAMES, asked, load, wrong

pytestmark = [pytest.mark.host, pytest.mark.slow]
SLOTS = ("required", "optional")  # the rest a node is told without a slot
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
        assert slots == {name for kind in SLOTS for name in info["input_order"].get(kind, ())}
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


@pytest.fixture(scope="module")
def drawn(server, known):
    """name -> the picture that a workflow saves, queued as shipped; drawn once."""
    pictures = {}

    def draw(name: str) -> Image.Image:
        if name not in pictures:
            workflow = load(name)
            (file,) = server.saved(server.run(graph.to_prompt(workflow, known), workflow), name)
            pictures[name] = Image.open(io.BytesIO(file.read_bytes()))
        return pictures[name]

    return draw


@every
def test_drawn_right(drawn, name):
    """The picture passes its checker, and carries the workflow."""
    workflow, picture = load(name), drawn(name)
    many = verdict.across(asked(workflow))
    size = asked(workflow).get("size", (128 * many + 8 * (many - 1), 128))
    assert picture.size == tuple(size)
    assert '"flux2_kit"' in picture.info["workflow"]
    assert wrong(picture, workflow) == []


def test_the_cache_changes_nothing(drawn):
    """Off and on, side by side. Observed: not one level of 255."""
    off, on = (
        np.asarray(part.convert("RGB"), np.int16)
        for part in verdict.panels(drawn("reference_cache"), 2)
    )
    assert np.abs(off - on).max() <= 1


def test_strength_changes_the_picture(drawn):
    """At 0 it is another picture than at 1."""
    parts = verdict.panels(drawn("strength_grid"), 4)
    absent, _, stock, _ = (np.asarray(part.convert("RGB"), np.float32) for part in parts)
    assert np.abs(absent - stock).mean() > 5
