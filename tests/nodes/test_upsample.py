"""FLUX.2 Prompt Upsample in the host's own executor: toy language models, nano's stand-in, an
endpoint, and the lock."""

import json

import pytest
import torch
from PIL import Image

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.generate_files import load_writer
from flux2_pack.flux2_core.references import to_pil
from flux2_pack.flux2_core.upsample import ROLES, Ask, local_writer
from flux2_pack.tests.core import toy_language
from flux2_pack.tests.core.chat_server import KEY, ChatServer
from flux2_pack.tests.hosting.inprocess import HostError
from flux2_pack.tests.nodes import toy
from flux2_pack.tests.nodes.toy import add_nodes, node

pytestmark = pytest.mark.host
TEXT = "a red circle"
KEEP = {"text": ("up", 0), "report": ("up", 1)}


def graph(text=TEXT, file="nano (built in)", references=0, **more) -> dict:
    """The node as the front end queues it, with every widget at its default."""
    widgets = {
        "text": text, "writer": "text encoder", "task": "auto", "seed": 0, "temperature": 0.15,
        "if_refused": "stop", "locked": "", "lock_saved": True,
    }  # fmt: skip
    prompt = {
        "load": node("Flux2KitTextEncoderLoader", text_encoder=file),
        "up": node("Flux2KitPromptUpsample", clip=["load", 0], **{**widgets, **more}),
    }
    chain = {}
    for i in range(1, references + 1):
        prompt[f"picture{i}"] = node("ToyImage", number=i, width=64, height=64)
        values = {"name": "hero" if i == 1 else "", "strength": 1.0, "start": 0.0, "end": 1.0}
        chain = {"references": [f"chain{i - 1}", 0]} if i > 1 else {}
        prompt[f"chain{i}"] = node(
            "Flux2KitReference", image=[f"picture{i}", 0], **values, **chain,
            importance=1.0, megapixels=0.0,
        )  # fmt: skip
        prompt["up"]["inputs"]["references"] = [f"chain{i}", 0]
    return prompt


def run(host, prompt: dict, **more):
    made = host.run(prompt, KEEP, **more)
    return made.kept["text"], made.kept["report"], made


@pytest.fixture(scope="module", autouse=True)
def nodes(host):
    add_nodes(host)


@pytest.fixture(scope="module")
def files(host):
    """family -> a toy's file among the host's text encoders. Its output head likes the end."""
    pytest.importorskip("transformers", reason="pip install transformers")
    folder, out = host.models("text_encoders"), {}
    for family, model in (
        ("mistral", toy_language.mistral()),
        ("qwen", toy_language.qwen(tied=False)),
    ):
        stop = toy_language.SPECIAL[family].index("</s>" if family == "mistral" else "<|im_end|>")
        with torch.no_grad():
            model.lm_head.weight[stop] *= 3
        out[family] = toy_language.write(model, family, folder / f"toy-{family}.safetensors")
    return out


# --------------------------------------------------------------------------------- text encoders


@pytest.mark.parametrize("family", ["mistral", "qwen"])
def test_it_writes_what_the_core_writes(host, files, family):
    """The same words as the library's, pictures included where there is a tower."""
    text, said, made = run(
        host, graph("a cat", files[family].name, references=2, temperature=1.0, seed=4)
    )
    pictures = tuple(to_pil(toy.images(i, (64, 64))[0][0]) for i in (1, 2))
    ask = Ask("a cat", "edit", 2, ("hero", ""), pictures if family == "mistral" else (), 4, 1.0)
    assert text == local_writer(load_writer(files[family]))(ask).text.strip() and text != "a cat"
    assert ("does not see the references" in said) == (family == "qwen")
    assert text in made.outputs["up"]["text"][0] and made.progress


def opened(clip):
    raise RuntimeError("the writer was loaded")


def test_the_same_question_is_not_asked_twice(host, files, monkeypatch):
    from flux2_pack.nodes import host_upsample

    prompt = graph("a dog", files["qwen"].name, temperature=1.0, seed=1)
    first = run(host, prompt)[0]
    monkeypatch.setattr(host_upsample, "_open", opened)
    assert run(host, prompt)[0] == first
    prompt["up"]["inputs"]["seed"] = 2
    with pytest.raises(HostError, match="the writer was loaded"):
        run(host, prompt)


def test_what_is_lost_stops_the_run_or_is_said(host, files):
    prompt = graph('a sign "OPEN"', files["qwen"].name, temperature=1.0)
    with pytest.raises(HostError, match='4 attempts lost "OPEN"'):
        run(host, prompt)
    prompt["up"]["inputs"]["if_refused"] = "keep my prompt"
    text, said, made = run(host, prompt)
    assert text == 'a sign "OPEN"' and "Your prompt is used as it is" in said
    assert "Your prompt is used as it is" in made.outputs["up"]["text"][0]


def test_it_can_be_interrupted(host, files, monkeypatch):
    """At the third word; the next run writes as if nothing had been."""
    import comfy.model_management as memory
    import comfy.utils

    bar, said = comfy.utils.ProgressBar.update_absolute, []

    def update(self, value, *more, **named):
        said.append(value)
        if value == 3:
            memory.interrupt_current_processing()
        return bar(self, value, *more, **named)

    prompt = graph("a fox", files["qwen"].name, temperature=1.0, seed=2)
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    with pytest.raises(HostError, match="interrupted"):
        run(host, prompt)
    assert said == [1, 2, 3]
    monkeypatch.undo()
    assert run(host, prompt)[0]


def test_a_folder_of_shards_is_one_choice(host, files):
    """As publishers ship Mistral-3 whole: the index is listed, its shards are not."""
    from flux2_pack.nodes import host as adapter

    folder = files["mistral"].parent / "toy-shards"
    toy_language.mistral().save_pretrained(folder, max_shard_size="400KB")
    (folder / "tokenizer.json").write_text(toy_language.tokenizer_json("mistral"))
    listed = [name for name in adapter.files("text_encoders") if "toy-shards" in name]
    assert [name.replace("\\", "/") for name in listed] == [
        "toy-shards/model.safetensors.index.json"
    ]
    prompt = graph("a cat", listed[0], references=1, if_refused="keep my prompt")
    assert "does not see" not in run(host, prompt)[1]


def test_a_cut_file_is_refused_before_anything_is_loaded(host, files, monkeypatch):
    from flux2_pack.nodes import host_upsample

    short = files["mistral"].with_name("toy-cut.safetensors")
    toy_language.write(toy_language.mistral(), "mistral", short, leave=("lm_head",))
    monkeypatch.setattr(host_upsample, "_open", opened)
    with pytest.raises(HostError, match=r"toy-cut\.safetensors cannot write text.*output head"):
        run(host, graph("a cat", short.name))


def test_the_encoder_reads_as_before(host, files):
    """Writing leaves the CLIP as it was: its rows are the same before and after."""
    prompt = graph("a cat", files["qwen"].name, temperature=1.0, seed=9)
    prompt["before"] = node("Flux2KitPrompt", clip=["load", 0], text="a cat")
    prompt["after"] = node("Flux2KitPrompt", clip=["load", 0], text=["up", 0])
    kept = host.run(prompt, {"a": ("before", 0), "b": ("after", 0), "t": ("up", 0)}).kept
    again = node("Flux2KitPrompt", clip=["load", 0], text="a cat")
    clean = host.run({"load": prompt["load"], "again": again}, {"a": ("again", 0)}).kept
    assert torch.equal(kept["a"][0][0], clean["a"][0][0])
    assert kept["b"][0][0].shape == kept["a"][0][0].shape


def test_a_host_clip_or_none_is_refused(host):
    prompt = graph()
    del prompt["up"]["inputs"]["clip"], prompt["load"]
    with pytest.raises(HostError, match="nothing to write with"):
        run(host, prompt)
    from flux2_pack.nodes import host_upsample

    class Other:
        cond_stage_model = torch.nn.Linear(1, 1)

    with pytest.raises(Flux2Error, match="host's own loader"):
        host_upsample.source_of("text encoder", Other())


# ------------------------------------------------------------------------------------------ nano


def test_nano_has_a_stand_in(host):
    text, said, _ = run(host, graph(seed=1))
    assert text == "a red circle right on white background"
    assert "nano's text encoder cannot write" in said
    with pytest.raises(HostError, match="nano's world only"):
        run(host, graph("a zeppelin"))


def test_names_become_numbers(host):
    text, said, _ = run(host, graph("the shape of @hero in the color of image 2", references=2))
    assert text.startswith("the shape of image 1 in the color of image 2")
    assert "does not see the references" in said


# ------------------------------------------------------------------------------------------ lock


def test_locked_text_is_the_result(host):
    locked = '  Exactly this, "OPEN"\n'
    text, said, _ = run(host, graph('a sign "SHUT" by image 4', locked=locked))
    assert text == locked and said.startswith("Locked")
    assert '"SHUT", image 4' in said  # what the prompt says now and the locked one does not


def workflow() -> dict:
    """As a front end sends it along: widgets by place, the seed's control among them."""
    values = ["a red circle", "text encoder", "auto", 1, "fixed", 0.15, "stop", "", True]
    up = {"id": 7, "type": "Flux2KitPromptUpsample", "widgets_values": values}
    return {"nodes": [{"id": 3, "type": "SaveImage", "widgets_values": ["x"]}, up]}


@pytest.mark.parametrize("on", [True, False])
def test_a_saved_picture_carries_the_lock(host, on):
    """Dragged back, the picture's graph gives the same text and writes nothing."""
    prompt = graph(seed=1, lock_saved=on)
    prompt["7"] = prompt.pop("up")
    prompt["picture"] = node("ToyImage", number=1, width=64, height=64)
    # a text input makes the picture wait for the prompt
    prompt["save"] = node("SaveImage", images=["picture", 0], filename_prefix=["7", 0])
    made = host.run(prompt, {"text": ("7", 0)}, workflow=workflow())
    with Image.open(host.png(made, "save")) as image:
        saved = json.loads(image.info["workflow"])
    values = saved["nodes"][1]["widgets_values"]
    assert values[-2] == (made.kept["text"] if on else "")
    assert values[:-2] == workflow()["nodes"][1]["widgets_values"][:-2]
    if on:
        again = graph("anything else", file="nano (built in)", locked=values[-2])
        assert run(host, again)[0] == made.kept["text"]


@pytest.mark.parametrize("sent", [{}, {"nodes": None}, {"nodes": [{"id": 7}]}, {"nodes": [3]}])
def test_other_workflows_are_left_alone(host, sent):
    assert run(host, graph(), workflow={"extra": 1, **sent})[0]


# -------------------------------------------------------------------------------------- endpoint


@pytest.fixture
def server(monkeypatch):
    with ChatServer() as server:
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        yield server


def test_an_endpoint_writes(host, server):
    """It works without a CLIP, sees the references, and neither key nor address comes out."""
    server.answers = ['A shop with a sign that says "OPEN", as in image 2.']
    prompt = graph('a shop, sign "OPEN", as in image 2', references=2, writer="chat endpoint")
    del prompt["up"]["inputs"]["clip"], prompt["load"]
    text, said, made = run(host, prompt, workflow=workflow())
    assert text == server.answers[0]
    ((headers, body, _),) = server.seen
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["messages"][0]["content"] == ROLES["edit"]
    kinds = [part["type"] for part in body["messages"][1]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    assert "see the references" not in said
    for secret in (KEY, "127.0.0.1"):
        assert secret not in json.dumps([text, said, made.outputs])


def test_an_endpoint_that_is_not_set_up(host, monkeypatch):
    monkeypatch.setenv("FLUX2KIT_CHAT_SETTINGS", "")
    with pytest.raises(HostError, match=r"No chat endpoint is set up.*FLUX2KIT_CHAT_ADDRESS"):
        run(host, graph(writer="chat endpoint"))


def test_an_endpoints_prompt_fits_the_text_encoder(host, server):
    server.answers = ["a red circle " * 40, "a red circle left on white background"]
    assert run(host, graph(writer="chat endpoint", seed=3))[0] == server.answers[1]
    assert len(server.seen) == 2


def test_a_remembered_prompt_is_that_of_these_pictures_and_this_encoder(host, server):
    """Without a text encoder a long answer is fine; with one it must fit. A picture of another
    shape is another picture, though all its pixels are the same."""
    import torch

    from flux2_pack.flux2_core.references import Reference
    from flux2_pack.nodes import host_upsample

    server.answers = ["a red circle " * 40, "a red circle left on white background", "one", "two"]
    prompt = graph("a red circle", writer="chat endpoint", seed=11)
    clip = prompt["up"]["inputs"].pop("clip")
    assert run(host, prompt)[0] == server.answers[0].strip()
    prompt["up"]["inputs"]["clip"] = clip
    assert run(host, prompt)[0] == server.answers[1]
    source, ask = host_upsample.source_of("chat endpoint", None), {"seed": 12}
    made = [
        host_upsample.run(source, None, "a cat", [Reference(torch.ones(size))], **ask).text
        for size in ((64, 128, 3), (128, 64, 3))
    ]
    assert made == ["one", "two"]
