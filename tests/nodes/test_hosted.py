"""FLUX.2 Hosted in the host's own executor, against a local server that speaks the protocol."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.references import Reference
from flux2_pack.tests.hosted.server import KEY, SIGNATURE, Server, answer
from flux2_pack.tests.hosting.inprocess import HostError
from flux2_pack.tests.nodes.toy import node

pytestmark = pytest.mark.host
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


@pytest.fixture(scope="module")
def running():
    with Server() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch, tmp_path):
    """A fresh service, and an environment that leads to it."""
    running.reset()
    running.states = ("Ready",)
    for name in ("ADDRESS", "SETTINGS", "PER_RUN", "PER_DAY"):
        monkeypatch.setenv(f"FLUX2KIT_HOSTED_{name}", "")
    monkeypatch.setenv("BFL_API_KEY", KEY)
    monkeypatch.setenv("FLUX2KIT_HOSTED_GATEWAY", running.url)
    monkeypatch.setenv("FLUX2KIT_HOSTED_STATE", str(tmp_path / "state"))
    yield running
    running.reset()


def hosted(seed: int = 1, **more) -> dict:
    """The node as the front end queues it, with every widget at its default."""
    widgets = {
        "model": "flux-2-klein-4b", "prompt": "a red fox", "width": 64, "height": 64, "seed": seed,
        "steps": 0, "guidance": 0.0, "safety_tolerance": "auto", "output_format": "png",
        "prompt_upsampling": "auto", "region": "global", "per_run": 0.0, "per_day": 0.0,
        "filename_prefix": "flux2_kit/test",
    }  # fmt: skip
    return node("Flux2KitHosted", **{**widgets, **more})


def run(host, prompt: dict, **keep):
    return host.run(prompt, keep=keep)


def one(host, seed: int = 1, **more):
    """Queue one node alone -> (image, report, path, the run)."""
    keep = {"image": ["h", 0], "report": ["h", 1], "file": ["h", 2]}
    made = run(host, {"h": hosted(seed, **more)}, **keep)
    return made.kept["image"], made.kept["report"], Path(made.kept["file"]), made


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_file_is_the_download_and_the_picture_is_the_file(host, server, kind):
    image, said, path, made = one(host, seed=5, output_format=kind)
    (task,) = server.tasks.values()
    assert path.read_bytes() == task.data and SIGNATURE.encode() in task.data
    assert path.is_relative_to(host.output / "flux2_kit")
    with Image.open(path) as picture:
        there = torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)
    assert torch.equal(image[0], there) and image.std() > 0.01
    assert "Klein 4B: cost 1.4 ¢" in said and "1.4 ¢ spent, $9.99 left" in said
    assert "a red fox, in soft light" in said  # the prompt that was used
    (shown,) = made.outputs["h"]["images"]
    assert host.output / shown["subfolder"] / shown["filename"] == path
    manifest = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert manifest["task_id"] in server.tasks and manifest["seed"] == 5


def test_what_is_not_given_is_not_sent(host, server):
    one(host, seed=9)
    (task,) = server.tasks.values()
    assert set(task.fields) == {"prompt", "width", "height", "seed", "output_format"}
    one(
        host, 10, model="flux-2-flex", steps=20, guidance=3.5, safety_tolerance="0",
        prompt_upsampling="off",
    )  # fmt: skip
    fields = list(server.tasks.values())[-1].fields
    assert (fields["steps"], fields["guidance"], fields["safety_tolerance"]) == (20, 3.5, 0)
    assert fields["prompt_upsampling"] is False


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"steps": 4}, "takes no steps"),
        ({"guidance": 4.0}, "takes no guidance"),
        ({"prompt_upsampling": "off"}, "takes no prompt upsampling"),
        ({"model": "flux-2-flex", "guidance": 1.0}, "guidance is out of range"),
        ({"width": 0}, "belong together"),
        ({"prompt": " "}, "prompt is empty"),
        ({"region": "eu"}, "EU cannot be had through your own address"),
        ({"per_run": 1.0}, "ceiling of 1 ¢ per run"),
        ({"filename_prefix": "../out"}, "below ComfyUI's output folder"),
        ({"filename_prefix": "/out"}, "below ComfyUI's output folder"),
        ({"filename_prefix": "a\0b"}, "below ComfyUI's output folder"),
        ({"filename_prefix": ""}, "below ComfyUI's output folder"),
    ],
)
def test_refused_before_anything_is_sent(host, server, more, says):
    with pytest.raises(HostError, match=says):
        one(host, **more)
    assert server.seen == []


def reference(**controls) -> Reference:
    return Reference(torch.full((64, 64, 3), 0.5), **controls)


@pytest.mark.parametrize(
    ("references", "says"),
    [
        ([reference()] * 5, "at most 4 references"),
        ([reference(strength=0.5)], "a strength other than 1"),
        ([reference(start=0.5)], "a step range"),
        ([reference(mask=torch.ones(64, 64))], "a mask"),
        ([reference(region=torch.ones(64, 64))], "a region"),
    ],
)
def test_controls_are_refused_not_dropped(host, server, references, says):
    with pytest.raises(Flux2Error, match=says):
        asyncio.run(
            host.mappings["Flux2KitHosted"].execute(
                "flux-2-klein-4b", "a fox", references=tuple(references)
            )
        )
    assert server.seen == []


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"states": ({"status": "Content Moderated"},)}, "moderation stopped"),
        ({"states": ({"status": "Error"},)}, "could not make the picture"),
        ({"submit": 401}, "does not accept the key"),
        ({"submit": 402}, "no credit"),
        ({"result": b"not a picture"}, "What came is not used"),
    ],
)
def test_a_failure_is_a_sentence_and_never_a_picture(host, server, fault, says):
    server.states = fault.get("states", server.states)
    if "submit" in fault:
        server.faults["submit"].append(answer(fault["submit"]))
    if "result" in fault:
        server.faults["result"].append(answer(200, fault["result"]))
    with pytest.raises(HostError, match=says) as caught:
        one(host, seed=77)
    assert KEY not in str(caught.value)


def test_it_runs_again_only_when_an_input_changes(host, server):
    """Paid work: the host keeps the result, whatever was spent in between."""
    executor = host._executor(Silent())

    def queue(seed, **more):
        prompt = {"h": hosted(seed, **more), "p": node("PreviewImage", images=["h", 0])}
        prompt["c"] = node(
            "Flux2KitHostedCost", model="flux-2-klein-4b", width=64, height=64, pictures=1
        )
        executor.execute(prompt, f"run {time.monotonic()}", {}, ["p", "c"])
        assert executor.success
        said = executor.history_result["outputs"].get("c", {"text": [""]})
        return server.paid, said["text"][0]

    assert queue(1)[0] == 1
    paid, said = queue(1)
    assert paid == 1 and "1.4 ¢ spent" in said  # the cost itself is told anew
    assert queue(2)[0] == 2
    assert queue(2, filename_prefix="flux2_kit/other")[0] == 3


class Silent:
    """What the executor expects of a server."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata: dict = {}  # noqa: RUF012

    def send_sync(self, *_):
        pass

    send_progress_text = send_sync


def test_two_at_once(host, server):
    """Both are with the service at the same time, and one ceiling per run holds for both."""
    server.states = ("Pending", "Pending", "Ready")
    prompt = {"a": hosted(1), "b": hosted(2)}
    made = run(host, prompt, a=["a", 0], b=["b", 0], fa=["a", 2], fb=["b", 2])
    assert server.peak == 2 and made.kept["fa"] != made.kept["fb"]
    assert not torch.equal(made.kept["a"], made.kept["b"])
    with pytest.raises(HostError, match="ceiling of 2 ¢ per run"):
        run(
            host, {"a": hosted(3, per_run=2.0), "b": hosted(4, per_run=2.0)}, a=["a", 0], b=["b", 0]
        )


def test_polls_go_on_while_the_hosts_loop_stands_still(server, host):
    """As it does while a local model samples."""
    server.states = ("Pending", "Pending", "Ready")

    async def both():
        values = {k: v for k, v in hosted(5)["inputs"].items() if k not in ("model", "prompt")}
        call = host.mappings["Flux2KitHosted"].execute("flux-2-klein-4b", "a fox", **values)
        task = asyncio.ensure_future(call)
        while not server.of("submit"):
            await asyncio.sleep(0.02)
        until = time.monotonic() + 15
        while not server.of("result") and time.monotonic() < until:
            time.sleep(0.05)
        assert server.of("result")
        return await task

    assert asyncio.run(both()).args[0].shape == (1, 64, 64, 3)


def interrupt_when(ready) -> threading.Thread:
    import nodes

    def wait():
        until = time.monotonic() + 20
        while not ready() and time.monotonic() < until:
            time.sleep(0.02)
        nodes.interrupt_processing()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_interrupt_stops_all_in_flight_and_loses_nothing(host, server):
    """Two pictures are ordered; the next run fetches both without paying."""
    server.states = ("Pending",) * 100
    thread = interrupt_when(lambda: len(server.of("poll")) >= 2)
    start, prompt = time.monotonic(), {"a": hosted(11), "b": hosted(12)}
    with pytest.raises(HostError, match="interrupted"):
        run(host, prompt, a=["a", 0], b=["b", 0])
    thread.join()
    assert time.monotonic() - start < 10
    for task in server.tasks.values():
        task.states.clear()
        task.states.append("Ready")
    made = run(host, prompt, a=["a", 1], b=["b", 1])
    assert server.paid == 2
    assert "paid before" in made.kept["a"] and "paid before" in made.kept["b"]


def test_a_picture_that_came_after_the_end_of_its_run_is_kept_for_the_next(host, server):
    """The host cancels a node in the middle; its picture is there already."""
    values = {k: v for k, v in hosted(21)["inputs"].items() if k not in ("model", "prompt")}

    def call():
        return host.mappings["Flux2KitHosted"].execute("flux-2-klein-4b", "a fox", **values)

    async def cut():
        task = asyncio.ensure_future(call())
        while not server.of("submit"):
            await asyncio.sleep(0.01)
        while not server.of("result"):
            time.sleep(0.02)  # the host's loop is busy
        time.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(cut())
    assert asyncio.run(call()).args[0].shape == (1, 64, 64, 3)
    assert server.paid == 1 and len(server.of("submit")) == 1


def test_files_of_many_at_once_never_meet(host, server, tmp_path):
    from flux2_pack.nodes import host_hosted

    class Made:
        width = height = 64

        def __init__(self, i):
            self.task_id = f"task-{i}"

        def save(self, path):
            time.sleep(0.02)  # a disk takes its time
            path.with_suffix(".png").write_text(self.task_id)
            return path.with_suffix(".png")

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: host_hosted.save(Made(i), "many/x")[0], range(40)))
    assert len(set(paths)) == 40
    assert len({p.name.split("_")[1] for p in paths}) == 40


def test_the_key_and_the_address_are_in_nothing_that_a_user_shares(host, server, caplog, capfd):
    caplog.set_level("DEBUG")
    prompt = {"h": hosted(31), "s": node("SaveImage", images=["h", 0], filename_prefix="shared/x")}
    made = run(host, prompt, report=["h", 1])
    server.faults["submit"].append(answer(401, {"detail": f"bad key {KEY}"}))
    with pytest.raises(HostError) as caught:
        one(host, seed=32)
    png = host.png(made, "s").read_bytes()
    written = "".join([caplog.text, *capfd.readouterr(), str(caught.value), str(made)])
    assert KEY not in written and KEY.encode() not in png
    ours = "".join(record.getMessage() for record in caplog.records if "aiohttp" not in record.name)
    assert server.url not in ours + str(made) and server.url.encode() not in png


def cost(host, **inputs):
    call = host.mappings["Flux2KitHostedCost"].execute("flux-2-pro", **inputs)
    return asyncio.run(call).args[0]


def test_the_cost_before(host, server, monkeypatch):
    said = cost(host, width=2048, height=2048, references=(reference(),), pictures=10)
    assert "Pro, 9 ¢: 4 MP out, 1 MP in (prices of 2026-11)" in said
    assert "10 pictures: 90 ¢" in said
    assert "Ceilings: $1.00 per run, $10.00 per day" in said and "0 ¢ spent, $10.00 left" in said
    monkeypatch.setenv("FLUX2KIT_HOSTED_PER_RUN", "2")
    assert "It will be refused: a picture costs more than a run may" in cost(host)
    monkeypatch.setenv("BFL_API_KEY", "")
    without = cost(host)
    assert "Pro, 3 ¢: 1 MP out" in without and "There is no key" in without
    assert server.seen == []


def test_estimate_on_the_node_is_the_cost_reported(host, server):
    _, said, *_ = one(host, 41, model="flux-2-max", width=0, height=0)
    assert "Max: cost 7 ¢" in said and "expected" not in said


def test_shipped_workflows_hold_no_key_and_no_address():
    for path in WORKFLOWS.glob("hosted_*.json"):
        text = path.read_text("utf-8")
        assert "http" not in text and "BFL_API_KEY" not in text
