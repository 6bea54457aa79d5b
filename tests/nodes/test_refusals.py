"""Mistakes a user can make, and the sentence each is answered with."""

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def models(host):
    """Toy files, and the MODEL and VAE of the klein form."""
    toy.write_models(host.models)
    (model,) = host.call("Flux2KitModelLoader", model="toy-klein.safetensors")
    (vae,) = host.call("Flux2KitVAELoader", vae="toy-vae.safetensors")
    return model, vae


def refusal(call, *args, **kw) -> str:
    with pytest.raises(Flux2Error) as error:
        call(*args, **kw)
    return str(error.value)


def test_wrong_text_encoder(host, models):
    (latent,) = host.call("Flux2KitEmptyLatent", model=models[0], width=64, height=64)
    for node, extra in (("Flux2KitSampler", {"seed": 1}), ("Flux2KitFlex", {})):
        said = refusal(
            host.call,
            node,
            model=models[0],
            positive=toy.conditioning(1, width=7680),
            latent=latent,
            **extra,
        )
        assert said == (
            "The text encoder does not belong to this model. Seen: its rows are 7680 wide, the "
            "model reads 384. Load nano's own."
        )


def test_wrong_text_encoder_under_the_hosts_sampler(host, models):
    with pytest.raises(Flux2Error, match=r"text encoder does not belong to this model"):
        toy_prompt = toy.conditioning(1, width=7680)
        (latent,) = host.call("Flux2KitEmptyLatent", model=models[0], width=64, height=64)
        host.call(
            "KSampler",
            model=models[0],
            seed=1,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=toy_prompt,
            negative=toy_prompt,
            latent_image=latent,
            denoise=1.0,
        )


class Sdxl:
    """Stands for the VAE of another model: what our nodes ask of it."""

    latent_channels = 4

    def spacial_compression_encode(self):
        return 8


def test_a_vae_of_another_model(host, models):
    image = toy.images(1, (64, 64))[0]
    calls = (
        ("Flux2KitVAEEncode", {"image": image}),
        ("Flux2KitVAEDecode", {"samples": {"samples": torch.zeros(1, 4, 8, 8)}}),
        ("Flux2KitApplyReferences", {"positive": toy.conditioning(1), "image_1": image}),
    )
    for node, inputs in calls:
        assert refusal(host.call, node, vae=Sdxl(), **inputs) == (
            "This VAE is not FLUX.2's. Seen: 4 channels at 1/8 of the size, FLUX.2 has 128 at "
            "1/16. Load flux2-vae.safetensors, or use the VAE of FLUX.2 Loader."
        )


def test_a_latent_of_another_model(host, models):
    said = refusal(
        host.call,
        "Flux2KitSampler",
        model=models[0],
        positive=toy.conditioning(1),
        negative=toy.conditioning(2),
        latent={"samples": torch.ones(1, 16, 8, 8)},
        steps=1,
    )
    assert said.startswith("The latent is not FLUX.2's. Seen: shape (1, 16, 8, 8), wanted (batch")
    said = refusal(
        host.call, "VAEDecode", vae=models[1], samples={"samples": torch.ones(1, 16, 8, 8)}
    )
    assert said.startswith("This latent is not FLUX.2's. Seen: shape (1, 16, 8, 8)")


@pytest.mark.parametrize(("width", "height"), [(100, 128), (128, 100)])
def test_sizes(host, models, width, height):
    said = refusal(host.call, "Flux2KitEmptyLatent", model=models[0], width=width, height=height)
    assert said == (
        f"Width and height must be multiples of 16. Seen: {width} x {height}. The nearest size "
        f"that fits is {96 if width == 100 else 128} x {96 if height == 100 else 128}."
    )


def test_an_eleventh_reference(host, models):
    images = {f"image_{i + 1}": image for i, image in enumerate(toy.images(1, *[(64, 64)] * 10))}
    (chain,) = host.call("Flux2KitReference", image=toy.images(2, (64, 64))[0])
    inputs = {"vae": models[1], "positive": toy.conditioning(1)}
    *_, ten = host.call("Flux2KitApplyReferences", **inputs, **images)
    assert len(ten) == 10
    sentence = "FLUX.2 takes at most 10 reference images. Seen: 11. Remove 1, or put several"
    assert refusal(
        host.call, "Flux2KitApplyReferences", **inputs, references=chain, **images
    ).startswith(sentence)
    assert refusal(
        host.call, "Flux2KitReference", image=toy.images(1, (64, 64))[0], references=ten
    ).startswith(sentence)
    # Nor one that another node had added before.
    before = toy.conditioning(1, reference_latents=toy.latents(1, (4, 4)))
    said = refusal(host.call, "Flux2KitApplyReferences", vae=models[1], positive=before, **images)
    assert "Seen: 11, with those that another node added" in said


def test_pixels_that_are_not_numbers(host, models):
    image = toy.images(1, (64, 64))[0]
    image[0, 3, 3] = float("nan")
    said = refusal(
        host.call,
        "Flux2KitApplyReferences",
        vae=models[1],
        positive=toy.conditioning(1),
        image_2=image,
    )
    assert said.startswith("Reference 1 holds values that are not numbers.")
    said = refusal(host.call, "Flux2KitVAEEncode", vae=models[1], image=image)
    assert said.startswith("This picture holds values that are not numbers.")


def test_small_and_narrow_references(host):
    said = refusal(host.call, "Flux2KitReference", image=toy.images(1, (63, 64))[0], name="dot")
    assert said.startswith('Reference 1 ("dot") is too small to be a reference. Seen: 64 x 63 pix')
    said = refusal(host.call, "Flux2KitReference", image=toy.images(1, (64, 600))[0])
    assert said.startswith("Reference 1 is too narrow to be a reference. Seen: 600 x 64 pixels.")


def test_a_negative_is_needed_for_true_guidance(host, models):
    (latent,) = host.call("Flux2KitEmptyLatent", model=models[0], width=64, height=64)
    inputs = {"model": models[0], "positive": toy.conditioning(1), "latent": latent}
    said = refusal(host.call, "Flux2KitFlex", **inputs, guidance=2.5)
    assert "needs a negative prompt at guidance 2.5" in said
    assert host.call("Flux2KitFlex", **inputs, guidance=1.0)
    assert host.call("Flux2KitFlex", **inputs, negative=toy.conditioning(2))


def test_a_model_of_another_family(host):
    class Other:
        class model:
            class model_config:
                unet_config = {"image_model": "wan2.1"}  # noqa: RUF012

    said = refusal(host.call, "Flux2KitEmptyLatent", model=Other)
    assert said.startswith("This model is not FLUX.2.")


FILES = {
    "lora": ({"diffusion_model.img_in.lora_A.weight": torch.zeros(4, 128)}, "LoRA"),
    "flux1": ({"double_blocks.0.img_mod.lin.weight": torch.zeros(4, 4)}, "FLUX.1"),
    "sdxl": ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, "SDXL"),
    "vae": ({"decoder.conv_in.weight": torch.zeros(4, 4)}, "a VAE"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_transformer(host, kind):
    tensors, word = FILES[kind]
    save_file(tensors, host.models("diffusion_models") / f"{kind}.safetensors")
    said = refusal(host.call, "Flux2KitModelLoader", model=f"{kind}.safetensors")
    assert f"{kind}.safetensors is not a FLUX.2 transformer" in said and word in said


def test_broken_files(host, models):
    folder = host.models("diffusion_models")
    whole = (folder / "toy-klein.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "random.safetensors").write_bytes(bytes(range(256)) * 40)
    for name, word in (("cut", "is cut short"), ("random", "is not a safetensors file")):
        assert word in refusal(host.call, "Flux2KitModelLoader", model=f"{name}.safetensors")


def test_pickles_are_not_offered(host):
    """A pickle in the folder is not in the list, and is refused by name."""
    from flux2_pack.nodes import host as adapter

    (host.models("diffusion_models") / "evil.ckpt").write_bytes(b"\x80\x02.")
    assert "evil.ckpt" not in adapter.files("diffusion_models")
    said = refusal(host.call, "Flux2KitModelLoader", model="evil.ckpt")
    assert said.startswith(".ckpt files are not opened: they can run any program")


def test_a_vae_file_of_another_model(host):
    save_file(
        {"decoder.conv_in.weight": torch.zeros(4, 4), "encoder.conv_in.weight": torch.zeros(4, 4)},
        host.models("vae") / "other.safetensors",
    )
    said = refusal(host.call, "Flux2KitVAELoader", vae="other.safetensors")
    assert said.startswith("This is not a FLUX.2 VAE.")
