"""What the loaders' choices mean: files, auto, and files that do not belong together."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core import configs
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.nano.vocabulary import tokenizer_json
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def files(host):
    toy.write_models(host.models)
    metadata = {"tokenizer_json": tokenizer_json()}
    folder = host.models("text_encoders")
    save_file({"a": torch.zeros(1)}, folder / "a-stranger.safetensors")
    state = toy.text_state()
    wide = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}  # as wide, and no more
    save_file(wide, folder / "another-family.safetensors")
    few = {key: w.to(torch.int8) if "mlp" in key else w for key, w in state.items()}
    save_file(few, folder / "int8-text.safetensors", metadata)
    save_file(state, folder / "toy-text.safetensors", metadata)
    (host.models("vae") / "a-broken.safetensors").write_bytes(b"nothing")
    return host


def test_auto_finds_the_files_that_belong_together(files):
    """What could not be loaded, alphabetically first, is passed over: strangers, broken files, text
    encoders of another family that are as wide, and quantised ones."""
    model, clip, vae = files.call("Flux2KitLoader", model="toy-klein.safetensors")
    assert model.model.config == toy.KLEIN
    assert clip.cond_stage_model.flux2.config.context_dim == 384
    assert vae.first_stage_model.config == toy.VAE


def test_named_files(files):
    (clip,) = files.call("Flux2KitTextEncoderLoader", text_encoder="toy-text.safetensors")
    rows = files.call("CLIPTextEncode", clip=clip, text="a red circle")[0][0][0]
    want = files.call("CLIPTextEncode", clip=toy.clip(), text="a red circle")[0][0][0]
    assert toy.difference(rows, want) < 1e-5  # observed 0
    loaded = files.call(
        "Flux2KitLoader",
        model="toy-klein.safetensors",
        text_encoder="toy-text.safetensors",
        vae="toy-vae.safetensors",
    )
    assert len(loaded) == 3


def test_a_text_encoder_of_another_model(files):
    wide = configs.TransformerConfig(256, 7680, 1, 1, guidance_embed=False)
    path = files.models("diffusion_models") / "toy-wide.safetensors"
    save_file(toy.transformer(wide), path)
    with pytest.raises(Flux2Error, match=r"does not belong to this model.* Load Qwen3 4B"):
        files.call("Flux2KitLoader", model=path.name, text_encoder="toy-text.safetensors")
    with pytest.raises(Flux2Error, match=r"No text encoder that belongs to this model was found"):
        files.call("Flux2KitLoader", model=path.name)


@pytest.mark.parametrize(
    ("name", "metadata", "choice", "variant"),
    [
        ("flux-2-klein-4b", {}, "auto", "klein-4b"),
        ("flux-2-klein-base-4b", {}, "auto", "klein-base-4b"),
        ("renamed", {}, "auto", "klein-4b"),
        ("renamed", {}, "klein-base-4b", "klein-base-4b"),
        (
            "renamed",
            {"flux2_kit": json.dumps({"variant": "klein-base-4b"})},
            "auto",
            "klein-base-4b",
        ),
    ],
)
def test_variants(files, monkeypatch, name, metadata, choice, variant):
    """Weights cannot tell klein from klein base: metadata, the name or the user does."""
    from flux2_pack.nodes import host, host_objects

    monkeypatch.setattr(
        host_objects, "read_state_dict", lambda path, kind: ({}, metadata, configs.KLEIN_4B)
    )
    monkeypatch.setattr(
        host_objects, "build_model", lambda config, state, variant, *a, **kw: variant
    )
    found = host_objects.load_model(f"{name}.safetensors", None if choice == "auto" else choice)
    assert found.name == variant
    assert host.NANO == "nano (built in)"


def test_the_loaders_show_what_a_file_is_taken_for(files):
    """On the node itself: klein's kinds look alike, and a renamed file is seen at once."""
    nodes, file = files.mappings, "toy-klein.safetensors"
    for node in ("Flux2KitModelLoader", "Flux2KitLoader"):
        with torch.inference_mode():
            shown = nodes[node].execute(model=file).ui.as_dict()["text"][0]
        assert shown.startswith(f"{file} is ") and "a size that no release has" in shown
        with torch.inference_mode():
            shown = nodes[node].execute(model="nano (built in)").ui.as_dict()["text"][0]
        assert shown == "nano (built in) comes with this pack."


def test_what_auto_means_on_the_hosts_model(files):
    """The host's own MODEL carries no variant: it is told from its shapes, and from its file's name
    where the host remembers it."""
    from flux2_pack.nodes import host

    class Klein:
        class model:
            class model_config:
                unet_config = {  # noqa: RUF012
                    "image_model": "flux2",
                    "hidden_size": 3072,
                    "context_in_dim": 7680,
                    "depth": 5,
                    "depth_single_blocks": 20,
                    "guidance_embed": False,
                }

    assert host.variant_of(Klein).name == "klein-4b"
    Klein.cached_patcher_init = (
        None,
        ("models/flux-2-klein-base-4b.safetensors", {}),
    )  # newer ones
    assert host.variant_of(Klein).name == "klein-base-4b"
    Klein.model.model_config.unet_config |= {
        "hidden_size": 6144,
        "context_in_dim": 15360,
        "depth": 8,
        "depth_single_blocks": 48,
        "guidance_embed": True,
    }
    assert host.variant_of(Klein).name == "dev"


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        ({}, (1024, 1024)),
        ({"aspect": "16:9"}, (1360, 768)),
        ({"aspect": "9:16"}, (768, 1360)),
        ({"megapixels": 4.0}, (2000, 2000)),
        ({"width": 800}, (800, 800)),
        ({"height": 512, "aspect": "3:2"}, (768, 512)),
        ({"width": 640, "height": 368, "aspect": "1:1"}, (640, 368)),
    ],
)
def test_sizes_of_the_empty_latent(files, wanted, size):
    (model,) = files.call("Flux2KitModelLoader", model="toy-klein.safetensors")
    (latent,) = files.call("Flux2KitEmptyLatent", model=model, batch_size=2, **wanted)
    assert latent["samples"].shape == (2, 128, size[1] // 16, size[0] // 16)
