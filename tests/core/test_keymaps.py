"""The tables of names: complete at the released sizes, and the same in both directions."""

import pytest
import torch

from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.configs import VARIANTS, AutoEncoderConfig, TransformerConfig
from flux2_pack.flux2_core.keymaps import AUTOENCODER, TRANSFORMER, to_bfl, to_diffusers
from flux2_pack.flux2_core.transformer import Flux2Transformer

TOY = TransformerConfig(256, 96, 2, 3, guidance_embed=True)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("dev", 299, 32_223_281_152),
        ("klein-4b", 149, 3_875_544_576),
        ("klein-9b", 201, 9_078_581_248),
    ],
)
def test_transformer_map_is_complete_at_released_sizes(name, tensors, parameters):
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    c = VARIANTS[name].transformer
    with torch.device("meta"):
        ours = Flux2Transformer(c).state_dict()
        theirs = diffusers.Flux2Transformer2DModel(
            num_layers=c.double_blocks,
            num_single_layers=c.single_blocks,
            num_attention_heads=c.heads,
            joint_attention_dim=c.context_dim,
            guidance_embeds=c.guidance_embed,
        ).state_dict()
    assert len(ours) == tensors
    assert sum(tensor.numel() for tensor in ours.values()) == parameters
    assert shapes(to_bfl(theirs, TRANSFORMER)) == shapes(ours)
    assert shapes(to_diffusers(ours, TRANSFORMER)) == shapes(theirs)


@pytest.mark.parametrize(("decoder", "parameters"), [(128, 84_046_115), (96, 62_373_091)])
def test_vae_map_is_complete_at_released_sizes(decoder, parameters):
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    widths = tuple(decoder * m for m in (1, 2, 4, 4))
    with torch.device("meta"):
        ours = AutoEncoder(AutoEncoderConfig(decoder_channels=decoder)).state_dict()
        theirs = diffusers.AutoencoderKLFlux2(decoder_block_out_channels=widths).state_dict()
    statistics = 257  # two of 128, and a counter
    assert len(ours) == 251
    assert sum(tensor.numel() for tensor in ours.values()) == parameters + statistics
    assert shapes(to_bfl(theirs, AUTOENCODER)) == shapes(ours)
    assert shapes(to_diffusers(ours, AUTOENCODER)) == shapes(theirs)


def shapes(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_maps_are_each_other_s_inverse(kind):
    torch.manual_seed(0)
    state, rules = {
        "transformer": (Flux2Transformer(TOY).state_dict(), TRANSFORMER),
        "vae": (AutoEncoder(AutoEncoderConfig(32, 32)).state_dict(), AUTOENCODER),
    }[kind]
    there = to_diffusers(state, rules)
    assert same(to_bfl(there, rules), state)
    assert same(to_diffusers(to_bfl(there, rules), rules), there)
    assert same(to_bfl(state, rules), state)  # BFL's names pass through


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
