"""FLUX.2 Reference Plan: what it says before the run, what it changes, what it shows."""

import importlib.util
from pathlib import Path

import pytest
import torch

from flux2_pack.flux2_core import positions
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.estimate import activation_bytes
from flux2_pack.flux2_core.references import Reference, plan
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
WIDGETS = {"order": "", "tokens": 0, "memory": 0.0, "cache": "auto", "measure": True}

PATH = Path(__file__).parents[1] / "core" / "live_bytes.py"
spec = importlib.util.spec_from_file_location("live_bytes", PATH)
live_bytes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(live_bytes)


@pytest.fixture(scope="module")
def model(host):
    return host.call("Flux2KitModelLoader", model="nano (built in)")[0]


@pytest.fixture(scope="module")
def foreign():
    """The host's own MODEL of a FLUX.2 file."""
    return toy.native(toy.transformer(toy.KLEIN))


def blank(width: int, height: int, name: str = "", **controls) -> Reference:
    return Reference(torch.zeros(1, 1, 1).expand(height, width, 3), name, **controls)


def planned(host, *references, **inputs):
    """The references and the report."""
    return host.call("Flux2KitReferencePlan", references=references, **inputs)


def canvas(width: int, height: int, batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 128, height // 16, width // 16)}


def test_alone_it_counts_tokens_and_changes_nothing(host):
    chain = (blank(1024, 1024, "hero"), blank(2048, 1024), blank(640, 480))
    out, report = planned(host, *chain)
    assert all(a is b for a, b in zip(out, chain, strict=True))
    assert "| 1 | @hero | 1024 x 1024 | 1024 x 1024 | 4,096 |  |" in report
    assert "| 2 |  | 2048 x 1024 | 1440 x 720 | 4,050 | shrunk by the model's rule |" in report
    assert "Tokens: 9,346 of references." in report
    assert "Connect the model" in report


def test_controls_are_in_the_table(host):
    mask = torch.zeros(512, 512)
    mask[:, :256] = 1
    _, report = planned(
        host,
        blank(512, 512, mask=mask, strength=0.5, end=0.25),
        blank(512, 512, region=torch.ones(8, 8), importance=2.0, start=0.25),
        blank(512, 512, strength=0.0),
        blank(512, 512, megapixels=0.1),
    )
    assert "| 512 | strength 0.5, steps 0% to 25%, mask keeps 50% |" in report
    assert "| 1,024 | steps 25% to 100%, region, importance 2 |" in report
    assert "| 0 | strength 0: off |" in report
    assert "| 304 x 304 | 361 | shrunk by its megapixels |" in report
    assert "Tokens: 1,897 of references, at most 1,385 at once." in report


def test_order(host):
    a, b, c = blank(64, 64, "a"), blank(64, 64), blank(64, 64, "c")
    out, report = planned(host, a, b, c, order="c, 1, 2")
    assert [id(r) for r in out] == [id(c), id(a), id(b)]
    assert "| 1 | @c |" in report and "| 2 | @a |" in report
    with pytest.raises(Flux2Error, match="exactly once"):
        planned(host, a, b, c, order="c, 1")


def test_a_budget_of_tokens_shrinks_and_says_so(host):
    out, report = planned(host, blank(1024, 1024), blank(1024, 1024, "hero"), tokens=4096)
    assert [fit.tokens for fit in plan(out)] == [2025, 2025]
    assert "| 720 x 720 | 2,025 | shrunk by the budget |" in report
    said = (
        'Reference 2 ("hero"): 1024 x 1024 -> 720 x 720, 2,025 tokens, to stay within 4,096 tokens.'
    )
    assert said in report


def test_a_budget_of_memory(host, model):
    """What the report then says the run takes is no more than what was allowed."""
    chain = [blank(1024, 1024)] * 4
    out, report = planned(host, *chain, model=model, memory=0.05, measure=False)
    assert "to stay within 0.05 GB." in report
    from flux2_pack.nodes import plan as node

    run = node.run_of(model, None, node.AUTO)
    tokens = [fit.tokens for fit in plan(out)]
    assert 0.9 * 0.05 < sum(run.memory(tokens)) / 2**30 <= 0.05
    with pytest.raises(Flux2Error, match=r"0.001 GB are not enough for the picture"):
        planned(host, *chain, model=model, memory=0.001, measure=False)
    with pytest.raises(Flux2Error, match="A memory budget needs the model"):
        planned(host, *chain, memory=1.0)


def test_a_cache_of_the_model_counts(host, model):
    """klein's and nano's approximate entries hold every reference, and stay between steps."""
    (cached,) = host.call("Flux2KitReferenceCache", model=model, mode="approximate")
    chain = [blank(128, 128)] * 2
    plain, kept, off = (
        planned(host, *chain, model=m, cache=c, measure=False)[1]
        for m, c in ((model, "auto"), (cached, "auto"), (cached, "off"))
    )
    assert "for the reference cache" in kept
    assert "for the reference cache" not in plain and "for the reference cache" not in off
    (exact,) = host.call("Flux2KitReferenceCache", model=model, mode="exact", kv_form=True)
    assert "once for references" in planned(host, *chain, model=exact)[1]
    assert "with cached references" in planned(host, *chain, model=cached)[1]


def test_memory_and_time_with_a_model(host, model):
    _, report = planned(host, blank(128, 128), model=model, latent=canvas(256, 128, 2))
    assert "Tokens: 64 of references, 128 of the picture, 32 of text: 224." in report
    assert "MB to draw" in report and "free on cpu" in report
    assert "Time: about" in report and "for the 8 steps that nano (built in) wants." in report
    assert "Time" not in planned(host, blank(128, 128), model=model, measure=False)[1]


def test_a_model_is_timed_once(host, model, monkeypatch):
    from flux2_pack.nodes import host_plan

    first = host_plan.clock_of(model)
    monkeypatch.setattr(host_plan, "calibrate", None)
    assert host_plan.clock_of(model.clone()) is first


def test_the_hosts_own_model(host, foreign):
    """Tokens and memory are planned; its blocks are not ours to time."""
    _, report = planned(host, blank(128, 128), model=foreign)
    assert "to draw" in report
    assert "only models from FLUX.2 Load Model can be measured" in report


def test_too_little_memory_is_said(host, model, monkeypatch):
    from flux2_pack.nodes import host_plan

    monkeypatch.setattr(host_plan.memory, "get_free_memory", lambda device: 2**20)
    _, report = planned(host, blank(128, 128), model=model, measure=False)
    assert "more than is free: ComfyUI will make room" in report


@pytest.mark.parametrize("references", [0, 1, 4])
def test_memory_of_our_model_in_the_host(host, model, references):
    """The live bytes of a forward as the host calls it, counted. Bound 10 %, observed 2."""
    network, dtype = model.model.diffusion_model, model.model.get_dtype()
    x, *refs = (torch.zeros(1, 128, 8, 8, dtype=dtype) for _ in range(1 + references))
    context = torch.zeros(1, 32, 384, dtype=dtype)
    now = torch.tensor([0.5], dtype=dtype)
    positions.rope_table.cache_clear()
    counted = live_bytes.peak_bytes(lambda: network(x, now, context, ref_latents=refs))
    config = model.model.config
    sizes = {"text": 32, "picture": 64, "references": [64] * references}
    wanted = activation_bytes(config, **sizes, itemsize=dtype.itemsize)
    assert wanted == pytest.approx(counted, rel=0.1)


def test_it_runs_alone_and_shows_its_report(host, monkeypatch):
    """Queued with nothing after it; the text is on the node and in the history."""
    from flux2_pack.nodes import host_plan

    shown = []

    class Server:
        def send_progress_text(self, text, node):
            shown.append((node, text))

    monkeypatch.setattr(host_plan.PromptServer, "instance", Server(), raising=False)
    result = host.run(
        {
            "1": toy.node("Flux2KitExamplePicture", text="a red ring", size=128),
            "2": toy.node("Flux2KitReference", image=["1", 0], name="ring"),
            "3": toy.node("Flux2KitReferencePlan", references=["2", 0], **WIDGETS),
        }
    )
    assert "| 1 | @ring | 128 x 128 | 128 x 128 | 64 |" in result.outputs["3"]["text"][0]
    assert shown == [("3", "\n".join([
        "Image 1 @ring: 128 x 128, 64 tokens",
        "Tokens: 64 of references.",
        "Connect the model to see memory and time.",
    ]))]  # fmt: skip
