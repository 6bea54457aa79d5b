"""Hosted nodes in a real server that is asked other things meanwhile. The service takes its time."""

import json
import os
import sys
import time
import uuid
from pathlib import Path

import pytest

from flux2_pack.tests.hosted.server import KEY
from flux2_pack.tests.hosting import graph
from flux2_pack.tests.hosting.server import Server
from flux2_pack.tests.hosting.service import Service
from flux2_pack.tests.workflows.shipped import load

pytestmark = [pytest.mark.host, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A ComfyUI, and a service that needs six polls for a picture: about 15 seconds."""
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        pytest.skip("needs a ComfyUI: set COMFYUI_PATH, or run dev.py test")
    base = tmp_path_factory.mktemp("slow")
    with (
        Service(sys.executable, base, seconds=2) as hosted,
        Server(comfyui, base, sys.executable, ROOT, env=hosted.environment) as running,
    ):
        running.service = hosted.environment["FLUX2KIT_HOSTED_GATEWAY"]
        yield running


def queue(server, seed: int) -> tuple[str, dict]:
    """The shipped workflow with two hosted nodes of different seeds -> (prompt id, prompt)."""
    workflow = load("hosted_pro_edit")
    prompt = graph.to_prompt(workflow, server.get("/object_info"))
    (id,) = (id for id, node in prompt.items() if node["class_type"] == "Flux2KitHosted")
    (save,) = (id for id, node in prompt.items() if node["class_type"] == "SaveImage")
    prompt[id]["inputs"]["seed"] = seed
    inputs = {**prompt[id]["inputs"], "seed": seed + 1}
    prompt["second"] = {**prompt[id], "inputs": inputs}
    images = {**prompt[save]["inputs"], "images": ["second", 0]}
    prompt["third"] = {**prompt[save], "inputs": images}
    body = {"prompt": prompt, "client_id": uuid.uuid4().hex}
    status, answer = server.post("/prompt", body)
    assert status == 200, answer
    return answer["prompt_id"], prompt


def ordered(server) -> list[dict]:
    """What the journal says is with the service."""
    files = (server.base / "hosted" / "tasks").glob("*.json")
    return [entry for entry in map(json.loads, map(_text, files)) if entry["state"] == "sent"]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # fetched in between
        return '{"state": "gone"}'


def wait_for(what, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_two_at_once_interrupted_then_fetched_with_the_server_awake(slow):
    id, _ = queue(slow, 1)
    wait_for(lambda: len(ordered(slow)) == 2)  # both are with the service
    start = time.monotonic()
    assert "Flux2KitHosted" in slow.get("/object_info")
    assert time.monotonic() - start < 5  # the answer is large and this machine may be busy
    assert slow.get("/queue")["queue_running"], "it was still at it"
    start = time.monotonic()
    slow.post("/interrupt", {})
    entry = wait_for(lambda: slow.get(f"/history/{id}").get(id))
    assert time.monotonic() - start < 5
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds and len(ordered(slow)) == 2

    id, _ = queue(slow, 1)
    entry = wait_for(lambda: slow.get(f"/history/{id}").get(id))
    assert entry["status"]["status_str"] == "success", entry["status"]
    texts = [
        shown["text"][0]
        for shown in entry["outputs"].values()
        if "images" in shown and "text" in shown
    ]
    assert len(texts) == 2 and all("paid before" in text for text in texts)
    assert ordered(slow) == []
    nothing_leaked(slow, entry)


def nothing_leaked(server, entry) -> None:
    """Neither key nor address in log, history or anything saved; the manifests name the origin."""
    files = [p for p in (server.base / "output").rglob("*") if p.is_file() and p.suffix != ".json"]
    assert len(files) == 4
    for data in [json.dumps(entry).encode(), server.log.read_bytes(), *map(Path.read_bytes, files)]:
        assert KEY.encode() not in data and server.service.encode() not in data
    kept = [p.read_bytes() for p in server.base.rglob("*.json")]
    assert kept and not any(KEY.encode() in data for data in kept)
