"""A workflow as the front end saves it -> a prompt as the server runs it. Standard library only.

The front end does this in the browser; the demo and the tests have none. Known: muted and bypassed
nodes, reroutes, notes, primitives. Not known: subgraphs (a shipped workflow has none).
"""

SILENT = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
MUTED, BYPASSED = 2, 4
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """workflow: the UI form. object_info: the server's answer at /object_info.

    Returns node id -> {"class_type", "inputs", "_meta"}. Raises ValueError for a node or a widget
    value that the server does not know.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt = {}
    for id, node in nodes.items():
        if node["type"] in SILENT or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"node {id}: this ComfyUI has no '{node['type']}'")
        inputs = _widgets(node, object_info[node["type"]])
        for slot in node.get("inputs", ()):
            source = _source(slot.get("link"), nodes, links)
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or object_info[node["type"]]["display_name"]
        entry = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
        prompt[str(id)] = entry
    return prompt


def _widgets(node: dict, info: dict) -> dict:
    """Saved widget values are positional, in the order of the node's definition."""
    values = list(node.get("widgets_values") or ())
    inputs = {}
    for name, kind, options in widgets(info):
        if not values:
            break
        inputs[name] = values.pop(0)
        if _has_after_generate(name, kind, options) and values and values[0] in AFTER_GENERATE:
            values.pop(0)
        if options.get("image_upload") and values:
            values.pop(0)  # the upload button counts as a widget
    if values:
        raise ValueError(f"node {node['id']} ({node['type']}) has no widgets for {values}")
    return inputs


def widgets(info: dict) -> list[tuple[str, object, dict]]:
    """(name, type, options) of the inputs that the front end draws as widgets, in order."""
    found = []
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
            if (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
                found.append((name, kind, options))
    return found


def _has_after_generate(name: str, kind, options: dict) -> bool:
    return bool(options.get("control_after_generate")) or (kind == "INT" and name in SEEDS)


def _source(link: int | None, nodes: dict, links: dict):
    """What a link finally brings: [node id, output], a primitive's value, or None."""
    if link is None:
        return None
    id, output = links[link]
    node = nodes[id]
    if node["type"] == "PrimitiveNode":
        return node["widgets_values"][0]
    if node["type"] == "Reroute":
        return _source(node["inputs"][0].get("link"), nodes, links)
    if node.get("mode", 0) == MUTED:
        return None
    if node.get("mode", 0) == BYPASSED:
        kind = node["outputs"][output]["type"]
        same = (slot for slot in node.get("inputs", ()) if slot["type"] == kind)
        return _source(next(same, {}).get("link"), nodes, links)
    return [str(id), output]
