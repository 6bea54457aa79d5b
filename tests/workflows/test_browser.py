"""ComfyUI's real front end: a shipped workflow opens, runs from its button, and comes back from
the picture that it saved.

The screenshots are in pytest's temporary folder: --basetemp DIR puts it where you want to look.
"""

from itertools import combinations

import pytest
from PIL import Image

from flux2_pack.tests.hosting.server import PROJECT
from flux2_pack.tests.workflows import browser
from flux2_pack.tests.workflows.shipped import NAMES, load, wrong
from flux2_pack.tests.workflows.test_files import area, group_area, inside, overlap

pytestmark = [pytest.mark.host, pytest.mark.slow]
SECONDS = 300  # for each wait; on a quiet machine the page is ready in 5 s and a picture in 3 s


@pytest.fixture(scope="module")
def canvas(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not browser.find():
        pytest.skip(f"needs a browser: one of {', '.join(browser.BROWSERS)}")
    with playwright.sync_playwright() as running:
        page = browser.Canvas(running, server, SECONDS)
        yield page
        page.close()


def content(graph: dict) -> tuple[list, list]:
    """What must survive a round trip: nodes with their values, and what links to what."""
    nodes = {int(node["id"]): node for node in graph["nodes"]}  # newer front ends have text ids
    values = [
        (id, node["type"], node.get("title"), node.get("widgets_values") or [])
        for id, node in sorted(nodes.items())
    ]
    links = [
        (int(source), output, int(target), nodes[int(target)]["inputs"][slot]["name"], kind)
        for _, source, output, target, slot, kind in graph["links"]
    ]
    return values, sorted(links)


def test_open_run_and_restore(canvas, tmp_path):
    name = "text_to_image"
    shipped = load(name)
    canvas.open_template(PROJECT, name)
    canvas.wait_for_nodes(len(shipped["nodes"]))
    assert canvas.unknown() == []
    opened = canvas.graph()
    assert content(opened) == content(shipped)
    canvas.picture(tmp_path / "opened.png")

    entry = canvas.run()
    assert entry["status"]["status_str"] == "success"
    canvas.picture(tmp_path / "ran.png")
    (file,) = canvas.server.saved(entry["outputs"])
    with Image.open(file) as picture:
        assert wrong(picture, shipped) == []

    canvas.clear()
    canvas.drop(file, "image/png")
    canvas.wait_for_nodes(len(shipped["nodes"]))
    assert content(canvas.graph()) == content(opened)
    canvas.picture(tmp_path / "restored.png")
    assert canvas.errors == []


def test_a_saved_picture_has_its_prompt_locked(canvas):
    """Dragged back, the graph holds what was written, where it was empty as shipped."""
    name = "prompt_upsample"
    shipped = load(name)
    canvas.clear()
    canvas.open_template(PROJECT, name)
    canvas.wait_for_nodes(len(shipped["nodes"]))
    (file,) = canvas.server.saved(canvas.run()["outputs"])
    canvas.clear()
    canvas.drop(file, "image/png")
    canvas.wait_for_nodes(len(shipped["nodes"]))
    locked = [
        next(n for n in graph["nodes"] if n["type"] == "Flux2KitPromptUpsample")["widgets_values"][
            -2
        ]
        for graph in (shipped, canvas.graph())
    ]
    assert locked == ["", shipped["extra"]["flux2_kit"]["prompt"]]


@pytest.mark.parametrize("name", NAMES)
def test_layout(canvas, tmp_path, name):
    """With pictures and previews in the nodes, none lies on another or sticks out of its group."""
    shipped = load(name)
    canvas.clear()
    canvas.open_template(PROJECT, name)
    canvas.wait_for_nodes(len(shipped["nodes"]))
    assert canvas.unknown() == []
    canvas.run()
    canvas.picture(tmp_path / f"{name}.png")
    graph = canvas.graph()
    for a, b in combinations(graph["nodes"], 2):
        assert not overlap(area(a), area(b)), (a["type"], b["type"])
    groups = [group_area(group) for group in graph["groups"]]
    for node in graph["nodes"]:
        assert any(inside(area(node), group) for group in groups), node["type"]
    assert canvas.errors == []
