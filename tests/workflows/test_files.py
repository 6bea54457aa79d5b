"""The shipped workflows as files: whole, tidy, ready for any FLUX.2, and saying what they draw."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.references import Reference, resolve
from flux2_pack.tests.hosting import verdict
from flux2_pack.tests.workflows import thumbnails
from flux2_pack.tests.workflows.shipped import FOLDER, NAMES, asked, load, wrong

TITLE = 30  # pixels of a node's title bar, above its position
GRAPHS = {name: load(name) for name in NAMES}
# Values that mean "what the loaded model wants", by node and place among its widgets.
AUTO = {
    "Flux2KitLoader": {0: "nano (built in)", 1: "auto", 2: "auto", 3: "auto"},
    "Flux2KitModelLoader": {0: "nano (built in)", 1: "auto"},
    "Flux2KitEmptyLatent": {1: 0, 2: 0, 3: 0},
    "Flux2KitSampler": {0: 0, 1: 0},
    "Flux2KitFlex": {0: 0, 1: 0},
}

every = pytest.mark.parametrize("name", NAMES)


FIRST = {"text_to_image", "edit_one_reference", "two_references", "ten_references"}
CONTROLS = {"reference_controls", "regions", "strength_grid", "reference_cache"}
HOSTED = {"hosted_pro_edit", "hosted_draft_then_flex", "hosted_two_backends"}


def test_those_that_must_be_there():
    assert set(NAMES) >= FIRST | CONTROLS | HOSTED


@every
def test_links(name):
    """Both ends know each link, and inputs and outputs agree on its type."""
    graph = GRAPHS[name]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and max(nodes) == graph["last_node_id"]
    seen = {"inputs": [], "outputs": []}
    for id, source, output, target, slot, kind in graph["links"]:
        left, right = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert id in left["links"] and right["link"] == id
        assert left["type"] == right["type"] == kind
        seen["outputs"].append(id)
        seen["inputs"].append(id)
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"]]
    starts = [i for node in nodes.values() for slot in node["outputs"] for i in slot["links"]]
    assert sorted(ends) == sorted(starts) == sorted(seen["inputs"])
    assert max(ends) == graph["last_link_id"]


def area(node) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def group_area(group) -> tuple[float, float, float, float]:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a, b) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


@every
def test_layout(name):
    """No node on another, each in one titled group, links from left to right."""
    graph = GRAPHS[name]
    for a, b in combinations(graph["nodes"], 2):
        assert not overlap(area(a), area(b)), (a["type"], b["type"])
    groups = [group_area(group) for group in graph["groups"]]
    assert not any(overlap(a, b) for a, b in combinations(groups, 2))
    assert all(group["title"] for group in graph["groups"])
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        assert sum(inside(area(node), group) for group in groups) == 1, node["type"]
    for _, source, _, target, _, _ in graph["links"]:
        assert nodes[source]["pos"][0] <= nodes[target]["pos"][0]


@every
def test_note_and_result(name):
    """Three paragraphs for the user; at the end a picture is saved under the workflow's name."""
    nodes = GRAPHS[name]["nodes"]
    (note,) = (node for node in nodes if node["type"] == "MarkdownNote")
    paragraphs = note["widgets_values"][0].split("\n\n")
    assert len(paragraphs) == 3 and "nano" in paragraphs[0] and "klein" in paragraphs[1]
    (save,) = (node for node in nodes if node["type"] == "SaveImage")
    assert save["widgets_values"] == [f"flux2_kit/{name}"]


@every
def test_another_model_just_works(name):
    """nano as shipped; steps, guidance and size follow whatever is loaded instead."""
    for node in GRAPHS[name]["nodes"]:
        for place, value in AUTO.get(node["type"], {}).items():
            assert node["widgets_values"][place] == value, node["type"]


@every
def test_what_it_says_is_what_it_draws(name):
    """`extra.flux2_kit` is the graph's prompts, names resolved, and its pictures in their order."""
    graph = GRAPHS[name]
    nodes = {node["id"]: node for node in graph["nodes"]}
    source = {link[0]: nodes[link[1]] for link in graph["links"]}

    def inputs(node, *names):
        found = (slot["link"] for slot in node["inputs"] if slot["name"].startswith(names))
        return [source[link] for link in found if link]

    def chain(node):
        """(picture, name) of a FLUX.2 Reference or Plan and those before it."""
        before = [entry for earlier in inputs(node, "references") for entry in chain(earlier)]
        return [
            *before,
            *((picture, node["widgets_values"][0]) for picture in inputs(node, "image")),
        ]

    said, names = asked(graph), []
    for node in nodes.values():
        if node["type"] in ("Flux2KitApplyReferences", "Flux2KitHosted"):
            used = [entry for last in inputs(node, "references") for entry in chain(last)]
            used += [(picture, "") for picture in inputs(node, "image_")]
            names = [Reference(None, label) for _, label in used]
            pictures = [n for n, _ in used if n["type"] != "Flux2KitVAEDecode"]  # a draft
            shown = said.get("draft", []) + [n["widgets_values"][0] for n in pictures]
            assert shown == said["references"]
    place = {"Flux2KitPrompt": 0, "Flux2KitHosted": 1}
    texts = [n["widgets_values"][place[n["type"]]] for n in nodes.values() if n["type"] in place]
    batches = [n["widgets_values"][0] for n in nodes.values() if n["type"] == "Flux2KitPromptBatch"]
    texts += [text for batch in batches for text in batch.split("\n---\n")]
    prompts = [*said.get("draft", ()), said["prompt"], *said.get("further", ())]
    prompts += said.get("regions", ())
    prompts += [said["negative"]] if "negative" in said else []
    assert list(dict.fromkeys(resolve(text, names) for text in texts if text)) == prompts
    assert bool(names) == bool(said["references"]) and all(verdict.sentences(said))


@every
def test_thumbnail(name):
    """It shows what the workflow asks for, under its references."""
    said = asked(GRAPHS[name])
    with Image.open(FOLDER / f"{name}.jpg") as image:
        assert image.format == "JPEG" and image.size == (thumbnails.SIDE, thumbnails.SIDE)
        picture = image.crop(thumbnails.box(len(said["references"]), verdict.across(said)))
    assert wrong(picture, GRAPHS[name]) == []


@pytest.mark.parametrize("many", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 10])
def test_composing_thumbnails(count, many):
    """Whatever the number of references and pictures, nothing is cut off or becomes unreadable."""
    texts = [f"a {color} circle left on white background" for color in ("red", "blue")] * 2
    picture = Image.new("RGB", (136 * many - 8, 128), "white")
    for i, text in enumerate(texts[:many]):
        picture.paste(scenes.draw(scenes.parse(text)), (136 * i, 0))
    reference = Image.new("RGB", (64, 64), (0, 255, 0))
    sheet = thumbnails.compose(picture, [reference] * count, many)
    assert sheet.size == (thumbnails.SIDE, thumbnails.SIDE)
    said = {"prompt": "", "references": [], "shows": texts[:many]}
    found = verdict.reports(sheet.crop(thumbnails.box(count, many)), said)
    assert len(found) == many and all(report.ok for report in found)
    green = (np.asarray(sheet) == (0, 255, 0)).all(-1).sum()
    assert green == (count and count * thumbnails.cell(count) ** 2)
