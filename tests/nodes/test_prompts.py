"""Prompts in the host: kept on disk, in batches, out of memory; advice and the builder's round trip."""

import json
import logging
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_pack.flux2_core import configs
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
TEXT = "a red circle left on white background"
WEIGHT = "flux2.model.layers.0.mlp.up_proj.weight"
PARTS = (
    "a lighthouse", 'a sign "OPEN"', "fog; dawn", "85 mm, f/1.8", "läuft", "灯台", "back\\slash {x}", "50 %",
)  # fmt: skip


@pytest.fixture
def folder(host, tmp_path, monkeypatch):
    """An empty cache, and a host without loaded models."""
    import comfy.model_management as memory

    from flux2_pack.nodes import host_prompts

    monkeypatch.setattr(host_prompts, "folder", lambda: tmp_path / "prompts")
    memory.unload_all_models()
    return tmp_path / "prompts"


@pytest.fixture
def shown(host):
    """What a node shows, beside its outputs."""

    def call(node, **inputs):
        with torch.inference_mode():
            result = host.mappings[node].execute(**inputs)
        return result.args, result.ui.as_dict()["text"][0]

    return call


def loaded(clip) -> bool:
    import comfy.model_management as memory

    return any(clip.patcher.is_clone(model) for model in memory.loaded_models())


def kept(host, clip, **how):
    (clip,) = host.call("Flux2KitPromptCache", clip=clip, **how)
    return clip


def rows(host, clip, text=TEXT):
    (((made, options),),) = host.call("Flux2KitPrompt", clip=clip, text=text)
    assert set(options) == {"pooled_output"} and options["pooled_output"] is None
    return made


def lora(clip, scale=0.1):
    clip = clip.clone()
    shape = clip.patcher.model.state_dict()[WEIGHT].shape
    change = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    assert clip.add_patches({WEIGHT: ("diff", (change,))}, 1.0)
    return clip


# ------------------------------------------------------------------------------------------- cache


def test_a_hit_is_the_same_and_loads_nothing(host, folder, shown, monkeypatch):
    wanted = rows(host, toy.clip())
    _, said = shown("Flux2KitPrompt", clip=kept(host, toy.clip()), text=TEXT)
    assert said.endswith("Now in the prompt cache.")
    again = kept(host, toy.clip())
    monkeypatch.setattr(again.cond_stage_model, "encode_token_weights", None)
    ((((made, _),),), said) = shown("Flux2KitPrompt", clip=again, text=TEXT)
    assert torch.equal(made, wanted) and made.dtype == wanted.dtype
    assert said.endswith("From the prompt cache.")
    assert not loaded(again)


def test_without_the_node_nothing_is_kept(host, folder):
    rows(host, toy.clip())
    assert not folder.exists()


def test_another_encoder_never_hits(host, folder):
    """Other weights, one other value, another file, a LoRA: before, during and after its use."""
    first, patched = kept(host, toy.clip()), lora(kept(host, toy.clip()))
    plain = rows(host, first)
    assert not torch.equal(rows(host, patched), plain)
    assert torch.equal(rows(host, patched), rows(host, lora(toy.clip())))
    assert torch.equal(rows(host, first), plain)
    others = [toy.clip(seed=4), toy.clip(), toy.clip(), lora(toy.clip(), 0.2)]
    others[1].cond_stage_model.stored[WEIGHT][3, 3] += 1e-3
    others[2].cond_stage_model.origin = (1, 2)
    for other in others:
        wanted = rows(host, other)
        assert torch.equal(rows(host, kept(host, other)), wanted)
    assert len(list(folder.iterdir())) == 2 + len(others)


def test_a_loras_weights_at_work_are_not_taken_for_the_encoders(host, folder):
    """Two clones share their weights, which are patched while one of them is in use."""
    clip = kept(host, toy.clip())
    patched = lora(clip)
    rows(host, patched, "another prompt")  # now the shared weights are the patched ones
    assert torch.equal(rows(host, clip), rows(host, toy.clip()))
    clip.cond_stage_model.encode_token_weights = None
    rows(host, clip)


def test_changes_that_cannot_be_told_are_not_kept(host, folder, caplog):
    clip = kept(host, toy.clip())
    clip.patcher.add_object_patch("flux2.something", 1)
    clip.cond_stage_model.flux2.something = 0
    assert torch.equal(rows(host, clip), rows(host, toy.clip()))
    assert "Prompts are not kept" in caplog.text and not folder.exists()


def test_switched_off_for_all(host, folder, monkeypatch):
    monkeypatch.setenv("FLUX2_PROMPT_CACHE", "off")
    rows(host, kept(host, toy.clip()))
    assert not folder.exists()


def test_where_they_are_kept(host):
    from flux2_pack.nodes import host_prompts

    assert host_prompts.folder() == host.base / "user" / "__flux2_kit" / "prompts"


# ------------------------------------------------------------------------------------------ memory


def test_released_on_request(host, folder):
    import comfy.model_management as memory

    other, clip = toy.clip(seed=4), toy.clip()
    wanted = rows(host, clip)
    rows(host, other)
    assert loaded(clip) and loaded(other)
    leaving = kept(host, clip, keep=False, release=True)
    assert torch.equal(rows(host, leaving), wanted)
    assert not loaded(clip) and loaded(other) and len(memory.loaded_models()) == 1
    assert torch.equal(rows(host, clip), wanted) and loaded(clip)


def test_released_weights_are_the_files_again(host, folder):
    """Copies that a device left behind, and a LoRA's patched weights, are gone."""
    clip = toy.clip()
    encoder, stored = clip.cond_stage_model, clip.cond_stage_model.stored
    wanted = rows(host, clip)
    encoder.load_state_dict({n: t.clone() for n, t in stored.items()}, assign=True)
    rows(host, kept(host, lora(clip), keep=False, release=True))
    assert not loaded(clip)
    for name, weight in encoder.named_parameters():
        assert weight.data_ptr() == stored[name].data_ptr(), name
    assert torch.equal(rows(host, clip), wanted)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
def test_an_encoder_that_is_not_used_stays_in_its_file(host, folder, tmp_path):
    """56 MB of weights: loaded, and its prompt from the cache, they take no memory of their own."""
    from flux2_pack.flux2_core.text_encoder import TextEncoder
    from flux2_pack.flux2_core.tokenizer import nano_tokenizer
    from flux2_pack.nodes import host_text

    config = replace(configs.NANO_TEXT, intermediate_size=12 * 1024)
    file, tokenizer = tmp_path / "encoder.safetensors", nano_tokenizer()
    save_file(toy.weights(TextEncoder(config)), file)

    def load():
        return kept(host, host_text.build_clip(config, load_file(file), tokenizer, (None, ())))

    def own():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1000

    first = load()  # alive, so that its memory does not come back meanwhile
    wanted = rows(host, first)
    before = own()
    clip = load()
    assert torch.equal(rows(host, clip), wanted)
    assert own() - before < 10  # MB, observed 0.1; a copy of the weights takes 52


# ----------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("texts", "split", "many"),
    [
        ("a red ring\n---\n\na blue\ncross\n -----  \n{}\n---\n", "lines of ---", 3),
        ("a red ring --- a cross", "lines of ---", 1),
        ("a red ring\n\na blue cross\n", "every line", 2),
    ],
)
def test_a_batch_is_its_prompts_one_by_one(host, texts, split, many):
    clip = toy.clip()
    made, read = host.call("Flux2KitPromptBatch", clip=clip, texts=texts, split=split)
    assert len(made) == len(read) == many
    for ((one, _),), text in zip(made, read, strict=True):
        assert torch.equal(one, rows(host, clip, text))


def test_an_empty_batch_is_a_sentence(host):
    with pytest.raises(Flux2Error, match="no prompt here"):
        host.call("Flux2KitPromptBatch", clip=toy.clip(), texts="---\n \n---", split="lines of ---")


def test_a_batch_resolves_names_and_warns(host, shown, caplog):
    (chain,) = host.call("Flux2KitReference", image=toy.images(1, (64, 64))[0], name="ball")
    texts = "the @ball\n---\na cross without a ring"
    (made, read), said = shown(
        "Flux2KitPromptBatch", clip=toy.clip(), texts=texts, references=chain
    )
    assert read[0] == "the image 1" and len(made) == 2
    assert said.startswith("1: ") and '2: "without a ring": FLUX.2 draws' in said
    assert "without a ring" in caplog.text


def test_what_follows_runs_for_each(host):
    """In a graph: two prompts, one sampler node, two latents, those of the prompts alone."""
    texts = "a red circle left on white background\n---\na blue ring right on pink background"

    auto = {"variant": "auto", "text_encoder": "auto", "vae": "auto"}
    size = {"aspect": "1:1", "megapixels": 0.0, "width": 64, "height": 64, "batch_size": 1}
    how = {"steps": 2, "guidance": 0.0, "seed": 5, "denoise": 1.0}

    def graph(kind, **prompt):
        return {
            "1": toy.node("Flux2KitLoader", model="nano (built in)", **auto),
            "2": toy.node(kind, clip=["1", 1], **prompt),
            "3": toy.node("Flux2KitEmptyLatent", model=["1", 0], **size),
            "4": toy.node(
                "Flux2KitSampler", model=["1", 0], positive=["2", 0], latent=["3", 0], **how
            ),
            "5": toy.node("RebatchLatents", latents=["4", 0], batch_size=2),
        }

    several = graph("Flux2KitPromptBatch", texts=texts, split="lines of ---")
    (both,) = host.run(several, {"x": ["5", 0]}).kept.values()
    for i, text in enumerate(texts.split("\n---\n")):
        (alone,) = host.run(graph("Flux2KitPrompt", text=text), {"x": ["4", 0]}).kept.values()
        assert torch.equal(both["samples"][i : i + 1], alone["samples"])


def test_a_batch_encodes_only_what_is_new(host, folder, shown):
    rows(host, kept(host, toy.clip()))
    clip = kept(host, toy.clip(), release=True)
    texts = f"{TEXT}\n---\na blue ring"
    _, said = shown("Flux2KitPromptBatch", clip=clip, texts=texts)
    assert said.endswith("1 of 2 from the prompt cache.") and not loaded(clip)
    assert len(list(folder.iterdir())) == 2


# ------------------------------------------------------------------------------------------ advice


def test_colours_for_nano(host, shown, caplog):
    clip = toy.clip()
    ((((made, _),),), said) = shown("Flux2KitPrompt", clip=clip, text="a ring in color #dc2020")
    assert torch.equal(made, rows(host, clip, "a ring in red"))
    assert "it reads #dc2020 as red." in said and "Read as: a ring in red" in said


def test_the_cut_is_marked(host, shown, caplog):
    _, said = shown("Flux2KitPrompt", clip=toy.clip(), text="red " * 31 + "blue ring left")
    assert "red | blue ring left" in said and said.endswith("35 of 32 tokens")
    assert "red | blue ring left" in caplog.text


def test_pictures_that_no_chain_names(host, shown, caplog):
    caplog.set_level(logging.INFO)
    _, said = shown("Flux2KitPrompt", clip=toy.clip(), text="image 2 with a red shape")
    assert "FLUX.2 Apply References needs 2 pictures connected." in said
    assert "needs 2 pictures" in caplog.text


@pytest.mark.parametrize(
    ("config", "name"),
    [(configs.MISTRAL3_24B, "dev"), (configs.QWEN3_8B, "klein-4b"), (configs.NANO_TEXT, "nano")],
)
def test_the_variant_is_told_by_the_template(host, config, name):
    """dev, klein or nano: kinds of klein read prompts alike."""
    from types import SimpleNamespace

    from flux2_pack.nodes import host_text

    tokenizer = host_text.Tokenizer(SimpleNamespace(config=config))
    assert host_text.variant(SimpleNamespace(tokenizer=tokenizer)).name == name
    assert host_text.variant(SimpleNamespace(tokenizer=None)) is None


def test_prompts_are_not_rolled(host):
    """{a|b} is text, and JSON keeps its braces: the front end changes neither."""
    for node in ("Flux2KitPrompt", "Flux2KitPromptBatch"):
        for part in host.mappings[node].GET_SCHEMA().inputs:
            assert not getattr(part, "dynamic_prompts", None)


# ----------------------------------------------------------------------------------------- builder


def filled(r: random.Random) -> dict:
    """The builder's widgets, as a user may fill them."""

    def maybe():
        return r.choice(PARTS) if r.random() < 0.6 else ""

    names = [
        "subject",
        "action",
        "style",
        "setting",
        "light",
        "camera",
        "font",
        "change",
        "keep",
        "avoid",
    ]
    places = ["anywhere", "left", "right", "top", "bottom", "center"]
    colors = [
        f"#{r.randrange(1 << 24):06x} {r.choice(('', 'sea green'))}"
        + r.choice(("", ": the door", ":car"))
        for _ in range(r.randrange(6))
    ]
    return {name: maybe() for name in names} | {
        "place": r.choice(places),
        "lettering_place": r.choice(places),
        "palette": "\n".join(colors),
        "lettering": "\n".join(r.choice(PARTS) for _ in range(r.randrange(3))),
    }


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_the_builder_json_and_back(host, start):
    """200 prompts: the JSON that the node wrote gives the same prose and the same JSON again."""
    for seed in range(start, start + 50):
        widgets = filled(random.Random(seed))
        text, whole = host.call("Flux2KitPromptBuilder", **widgets)
        again = host.call("Flux2KitPromptBuilder", json=whole)
        assert again == (text, whole), seed
        as_json, _ = host.call("Flux2KitPromptBuilder", **widgets, form="JSON")
        assert json.loads(as_json) == json.loads(whole)
