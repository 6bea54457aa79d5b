"""The autoencoder against diffusers' AutoencoderKLFlux2, its statistics, its detection, its errors."""

import re

import numpy as np
import pytest
import torch

from flux2_pack.flux2_core import latents
from flux2_pack.flux2_core.autoencoder import AutoEncoder, detect_autoencoder, groups
from flux2_pack.flux2_core.checkpoint import load_autoencoder
from flux2_pack.flux2_core.configs import AutoEncoderConfig
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.nano import scenes

FULL = AutoEncoderConfig(32, 32)
SMALL = AutoEncoderConfig(64, 32)  # the encoder keeps its width, the decoder is narrower
NANO = AutoEncoderConfig(16, 16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def random_autoencoder(config, seed=0):
    """Weights near their usual size, every one of them random: norms, biases and statistics too."""
    torch.manual_seed(seed)
    model = AutoEncoder(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            mean = float("norm" in name and name.endswith("weight"))
            torch.nn.init.normal_(p, mean, 0.1)
        else:
            gain = 0.2 if "conv2" in name else 1  # residual branches, which trained ones keep small
            torch.nn.init.normal_(p, std=gain * p[0].numel() ** -0.5)
    model.bn.running_mean.normal_(std=0.5)
    model.bn.running_var.uniform_(0.2, 3)
    return model


RENAMES = (  # BFL -> diffusers, tried in this order
    (r"^(en|de)coder\.((post_)?quant_conv)", r"\2"),
    (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0.to_"),
    (r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"),
    (r"\.block\.", ".resnets."),
    (r"\.down\.", ".down_blocks."),
    (r"\.up\.(\d)", lambda m: f".up_blocks.{3 - int(m[1])}"),
    (r"sample\.conv", "samplers.0.conv"),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
)


def to_diffusers(state):
    """Our state dict under diffusers' names, the attention's 1x1 convolutions as matrices."""
    out = {}
    for key, value in state.items():
        for pattern, new in RENAMES:
            key = re.sub(pattern, new, key)
        out[key] = value[:, :, 0, 0] if value.ndim == 4 and ".attentions." in key else value
    return out


@pytest.fixture(scope="module", params=[FULL, SMALL, NANO], ids=["full", "small decoder", "nano"])
def pair(request):
    """(ours, diffusers') with the same random weights."""
    diffusers = pytest.importorskip("diffusers")
    config = request.param
    ours = random_autoencoder(config)
    theirs = diffusers.AutoencoderKLFlux2(
        block_out_channels=[config.encoder_channels * m for m in config.multipliers],
        decoder_block_out_channels=[config.decoder_channels * m for m in config.multipliers],
        norm_num_groups=groups(config.decoder_channels),
    ).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    return ours, theirs.requires_grad_(False)


def error(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().std()).item()


def frobenius(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def their_latent(theirs, pixels):
    """The mean, packed and normalised with their own batch norm."""
    return theirs.bn(latents.pack(theirs.encode(pixels).latent_dist.mode()))


@pytest.mark.parametrize("batch, height, width", [(1, 64, 64), (2, 48, 80), (1, 16, 112)])
def test_encode_is_diffusers(pair, batch, height, width):
    ours, theirs = pair
    pixels = torch.rand(batch, 3, height, width) * 2 - 1
    x = ours.encode(pixels)
    assert x.shape == (batch, 128, height // 16, width // 16)
    assert error(x, their_latent(theirs, pixels)) < 1e-5  # observed 4.8e-6


@pytest.mark.parametrize("batch, h, w", [(1, 4, 4), (2, 3, 5), (1, 1, 7)])
def test_decode_is_diffusers(pair, batch, h, w):
    ours, theirs = pair
    x = torch.randn(batch, 128, h, w)
    mean, var = (v.view(1, -1, 1, 1) for v in (theirs.bn.running_mean, theirs.bn.running_var))
    z = latents.unpack(x * torch.sqrt(var + theirs.bn.eps) + mean)
    # One convolution algorithm for both: oneDNN picks by memory layout, and theirs (after an
    # attention in another layout) rounds twice as coarsely as ours, measured against float64.
    with torch.backends.mkldnn.flags(enabled=False):
        pixels, wanted = ours.decode(x), theirs.decode(z).sample
    assert pixels.shape == (batch, 3, 16 * h, 16 * w)
    assert error(pixels, wanted) < 1e-5  # observed 7.8e-6


def test_bf16_is_near_fp32():
    ours = random_autoencoder(FULL)
    half = random_autoencoder(FULL).bfloat16()
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    x = ours.encode(pixels)
    assert frobenius(half.encode(pixels.bfloat16()), x) < 2e-2  # observed 8.8e-3
    x = x.bfloat16()
    assert frobenius(half.decode(x), ours.decode(x.float())) < 2e-2  # observed 1.2e-2


def test_statistics_round_trip():
    z, mean, var = torch.randn(2, 128, 3, 5), torch.randn(128), torch.rand(128) * 3
    x = latents.normalise(z, mean, var)
    assert error(latents.denormalise(x, mean, var), z) < 1e-6  # observed 3.6e-7
    one = torch.zeros(1, 128, 1, 1)
    assert torch.allclose(
        latents.normalise(one + 3, one[0, :, 0, 0] + 1, one[0, :, 0, 0]), one + 200
    )


def test_using_it_never_changes_the_statistics():
    model = random_autoencoder(NANO).train()
    before = model.bn.running_mean.clone()
    model.decode(model.encode(torch.zeros(1, 3, 32, 32)))
    assert torch.equal(before, model.bn.running_mean)


def test_a_file_without_the_counter_of_batches_loads():
    state = AutoEncoder(NANO).state_dict()
    assert state.pop("bn.num_batches_tracked") is not None
    AutoEncoder(NANO).load_state_dict(dict(state))
    del state["bn.running_var"]
    with pytest.raises(RuntimeError, match=r"bn\.running_var"):
        AutoEncoder(NANO).load_state_dict(dict(state))


def test_released_sizes():
    """Parameter counts and tensors of the released files (fact sheet)."""
    full = AutoEncoder(AutoEncoderConfig(), device="meta")
    small = AutoEncoder(AutoEncoderConfig(decoder_channels=96), device="meta")
    assert len(full.state_dict()) == 251
    assert sum(p.numel() for p in full.encoder.parameters()) == 34_425_856
    assert sum(p.numel() for p in full.decoder.parameters()) == 49_620_259
    assert sum(p.numel() for p in small.decoder.parameters()) == 27_947_235
    assert sum(p.numel() for p in AutoEncoder(NANO).parameters()) <= 1_500_000


def shapes_of(config):
    return {k: tuple(v.shape) for k, v in AutoEncoder(config, device="meta").state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [
        AutoEncoderConfig(),
        AutoEncoderConfig(decoder_channels=96),
        NANO,
        AutoEncoderConfig(8, 12, (1, 3, 3), encoder_blocks=1, decoder_blocks=2),
    ],
)
def test_detects_any_width(config):
    assert detect_autoencoder(shapes_of(config)) == config


def without(config, *keys):
    return {k: v for k, v in shapes_of(config).items() if not k.startswith(keys)}


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({}, "not a FLUX.2 VAE"),
        (without(NANO, "bn."), "no bn.running_mean"),
        (shapes_of(NANO) | {"bn.running_mean": (64,)}, "64"),
        (
            {k[8:]: v for k, v in shapes_of(NANO).items() if k.startswith("decoder.")},
            "decoder alone",
        ),
        (shapes_of(NANO) | {"encoder.conv_in.weight": (18, 3, 3, 3)}, "width FLUX.2 cannot have"),
    ],
    ids=["nothing", "other VAE", "other statistics", "decoder alone", "odd width"],
)
def test_refuses_other_files(shapes, words):
    with pytest.raises(Flux2Error, match=words):
        detect_autoencoder(shapes)


@pytest.mark.parametrize(
    "pixels, words",
    [
        (torch.zeros(1, 3, 64, 72), "nearest size that fits is 64 x 64"),
        (torch.zeros(1, 4, 64, 64), "RGB"),
        (torch.zeros(3, 64, 64), "RGB"),
        (torch.full((1, 3, 16, 16), torch.nan), "768 of 768 are NaN"),
        (torch.full((1, 3, 16, 16), torch.inf), "not numbers"),
    ],
)
def test_refuses_bad_pixels(pixels, words):
    with pytest.raises(Flux2Error, match=words):
        AutoEncoder(NANO).encode(pixels)


@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (1, 32, 8, 8), (128, 4, 4)])
def test_refuses_other_latents(shape):
    with pytest.raises(Flux2Error, match=r"not FLUX\.2's"):
        AutoEncoder(NANO).decode(torch.zeros(shape))


def test_groups():
    """As released where 32 divides; four channels a group in narrower networks."""
    assert [groups(width) for width in (128, 96, 32, 16, 8)] == [32, 32, 32, 4, 2]


def test_nano_as_shipped():
    """The built-in weights: small, and good on a picture of nano's world."""
    vae = load_autoencoder("nano", dtype=torch.float32)
    assert vae.config == NANO
    assert sum(p.numel() for p in vae.parameters()) <= 1_500_000  # observed 1,374,771
    thing = scenes.Thing("ring", "orange", "left")
    picture = scenes.draw(scenes.Scene((thing,), "gray"))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    drawn = vae.decode(vae.encode(pixels)).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (drawn - pixels).square().mean()).item()
    assert psnr > 32  # observed 35.2 dB
    image = ((drawn[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    assert scenes.check(image, "an orange ring left on gray background").ok
