"""Every node, as its user meets it: words, help, and limits on its size."""

import ast
from pathlib import Path

import pytest

from flux2_pack.tests.conftest import ROOT

pytestmark = pytest.mark.host
DOCS = ROOT / "nodes" / "web" / "docs"


@pytest.fixture(scope="module")
def schemas(host):
    return {name: host.mappings[name].GET_SCHEMA() for name in host.ours}


def test_ids(host, schemas):
    """The host loads the pack's nodes and nothing else; ids are class names."""
    from flux2_pack import nodes

    assert sorted(schemas) == sorted(cls.__name__ for cls in nodes.NODES)
    assert all(name == s.node_id and name.startswith("Flux2Kit") for name, s in schemas.items())


def test_words(schemas):
    for name, schema in schemas.items():
        assert schema.display_name.startswith("FLUX.2 "), name
        assert schema.category.startswith("FLUX.2/"), name
        assert schema.description.endswith("."), name
        for part in schema.inputs + schema.outputs:
            assert part.tooltip and part.tooltip.endswith("."), (name, part)


def test_help_pages(schemas):
    assert {path.stem for path in DOCS.glob("*.md")} == set(schemas)
    for name, schema in schemas.items():
        page = (DOCS / f"{name}.md").read_text("utf-8")
        assert page.startswith(f"# {schema.display_name}\n"), name
        assert len(page) > 150, name


def test_every_default_runs_or_is_a_link(schemas):
    """Widgets have defaults: a node dropped on the canvas is ready."""
    for name, schema in schemas.items():
        for part in schema.inputs:
            if hasattr(part, "default"):
                assert part.default is not None, (name, part.id)


def test_new_fields_are_dropped_on_old_hosts(host):
    from flux2_pack.nodes.schema import Schema

    made = Schema(node_id="X", category="Y", no_host_knows_this=1, search_aliases=["z"])
    assert made.node_id == "X" and not hasattr(made, "no_host_knows_this")


def node_classes():
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for item in ast.parse(path.read_text("utf-8")).body:
            if isinstance(item, ast.ClassDef) and item.name.startswith("Flux2Kit"):
                yield path, item


def test_code_of_nodes():
    """A node is under 40 lines, says io.ComfyNode and spells out its own id."""
    found = list(node_classes())
    assert len(found) >= 12
    for path, item in found:
        where = f"{Path(path).name}: {item.name}"
        assert item.end_lineno - item.lineno < 40, where
        assert [ast.unparse(base) for base in item.bases] == ["io.ComfyNode"], where
        literals = {node.value for node in ast.walk(item) if isinstance(node, ast.Constant)}
        assert item.name in literals, where


def test_only_the_adapter_speaks_to_the_host():
    """comfy.* and friends in nodes/host*.py, comfy_api in schema.py, nowhere else."""
    theirs = ("comfy", "folder_paths", "latent_preview", "node_helpers", "nodes", "execution")
    for path in sorted((ROOT / "nodes").glob("*.py")):
        names = set()
        for item in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(item, ast.Import):
                names |= {alias.name.split(".")[0] for alias in item.names}
            elif isinstance(item, ast.ImportFrom) and not item.level:
                names.add((item.module or "").split(".")[0])
        if not path.name.startswith("host"):
            assert not names & set(theirs), path.name
            assert path.name == "schema.py" or "comfy_api" not in names, path.name
