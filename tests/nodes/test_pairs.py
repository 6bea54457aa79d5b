"""Right and wrong pairs of model, text encoder, VAE and LoRA: each wrong one has its sentence before
anything is drawn."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.configs import AutoEncoderConfig, TransformerConfig
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.nano.vocabulary import tokenizer_json
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
# width 256 both; one reads nano's text, the other klein 4B's
MODELS = {
    "small": TransformerConfig(256, 384, 1, 1, guidance_embed=False),
    "klein's": TransformerConfig(256, 7680, 1, 1, guidance_embed=False),
    "wide": TransformerConfig(512, 384, 1, 1, guidance_embed=False),
}


@pytest.fixture(scope="module")
def files(host):
    folder = host.models("diffusion_models")
    for name, config in MODELS.items():
        save_file(toy.transformer(config), folder / f"pair-{name}.safetensors")
    save_file(
        toy.text_state(),
        host.models("text_encoders") / "pair-text.safetensors",
        {"tokenizer_json": tokenizer_json()},
    )
    save_file(toy.weights(AutoEncoder(toy.VAE), 2), host.models("vae") / "pair-right.safetensors")
    other = {k: v for k, v in toy.weights(AutoEncoder(AutoEncoderConfig(16, 16)), 2).items()}
    save_file(
        {k: v for k, v in other.items() if not k.startswith("bn.")},
        host.models("vae") / "pair-other.safetensors",
    )
    for name in ("small", "wide"):
        h = MODELS[name].hidden_size
        key = "diffusion_model.double_blocks.0.img_attn.qkv"
        tensors = {
            f"{key}.lora_A.weight": torch.ones(2, h),
            f"{key}.lora_B.weight": torch.ones(3 * h, 2),
        }
        save_file(tensors, host.models("loras") / f"pair-{name}.safetensors")
    return host


def load(host, model, text="pair-text.safetensors", vae="pair-right.safetensors", lora="none"):
    """The loaders of a graph, up to where sampling would begin."""
    found = host.call(
        "Flux2KitLoader", model=f"pair-{model}.safetensors", text_encoder=text, vae=vae
    )
    return host.call("Flux2KitLoRA", model=found[0], lora=lora)[0], *found[1:]


@pytest.mark.parametrize("model, lora", [*itertools.product(MODELS, ("none", "small", "wide"))])
def test_models_text_encoders_and_loras(files, model, lora):
    right_text = MODELS[model].context_dim == 384
    right_lora = lora == "none" or MODELS[lora].hidden_size == MODELS[model].hidden_size
    lora = lora if lora == "none" else f"pair-{lora}.safetensors"
    if right_text and right_lora:
        assert len(load(files, model, lora=lora)) == 3
        return
    words = r"was made for .* not for this model" if right_text else r"Load Qwen3 4B"
    with pytest.raises(Flux2Error, match=words):
        load(files, model, lora=lora)


def test_a_vae_without_flux2s_statistics(files):
    with pytest.raises(Flux2Error, match=r"This is not a FLUX\.2 VAE"):
        load(files, "small", vae="pair-other.safetensors")


@pytest.mark.parametrize("slot", ["model", "text_encoder", "vae"])
def test_a_file_in_another_slot(files, slot):
    """Each file where another belongs: it is named for what it is."""
    right = {
        "model": "pair-small.safetensors",
        "text_encoder": "pair-text.safetensors",
        "vae": "pair-right.safetensors",
    }
    folders = {"model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
    for other in (name for name in right if name != slot):
        stray = files.models(folders[slot]) / f"stray-{other}.safetensors"
        stray.write_bytes((files.models(folders[other]) / right[other]).read_bytes())
        with pytest.raises(Flux2Error, match=r"is not a FLUX\.2 .* Seen: a"):
            files.call("Flux2KitLoader", **{**right, slot: stray.name})


def test_a_prompt_of_another_encoder_at_the_sampler(files):
    """Where loaders were mixed by hand, the sampler says it."""
    (model, *_) = load(files, "small")
    latent = {"samples": torch.zeros(1, 128, 4, 4)}
    wide = toy.conditioning(1, width=7680)
    with pytest.raises(Flux2Error, match="text encoder does not belong to this model"):
        files.call("Flux2KitSampler", model=model, positive=wide, latent=latent)
