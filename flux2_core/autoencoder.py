"""The autoencoder: pixels (B, 3, H, W) in [-1, 1] <-> latents (B, 128, H / 16, W / 16).

Module names are the BFL checkpoint's. Facts that are easy to get wrong: the latent is the mean (the
log-variance is never used); it is packed 2x2, then normalised with the file's statistics, eps 1e-4;
the stride-2 convolutions pad right and bottom only; `decoder.up` is numbered by resolution, so it
runs from the last to the first.
Source: FLUX.2 reference implementation (black-forest-labs/flux2, Apache-2.0).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .configs import AutoEncoderConfig, Shapes, count
from .errors import Flux2Error
from .latents import CHANNELS, EPS, check_size, denormalise, normalise, pack, unpack


def groups(base: int) -> int:
    """How many groups every GroupNorm of a network of this base width has.

    32, as released, where that divides the width. Narrower networks get four channels a group: with
    one channel a group the mean of each channel, flat colour, would be normalised away.
    """
    return 32 if base % 32 == 0 else base // 4


class ResBlock(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W): twice norm-swish-conv, plus the input."""

    def __init__(self, inputs: int, outputs: int, groups: int, ops=nn, **kw):
        super().__init__()
        self.norm1 = ops.GroupNorm(groups, inputs, eps=1e-6, **kw)
        self.conv1 = ops.Conv2d(inputs, outputs, 3, padding=1, **kw)
        self.norm2 = ops.GroupNorm(groups, outputs, eps=1e-6, **kw)
        self.conv2 = ops.Conv2d(outputs, outputs, 3, padding=1, **kw)
        self.nin_shortcut = ops.Conv2d(inputs, outputs, 1, **kw) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Every position sees every position, one head as wide as the layer; plus the input."""

    def __init__(self, width: int, groups: int, ops=nn, **kw):
        super().__init__()
        self.norm = ops.GroupNorm(groups, width, eps=1e-6, **kw)
        self.q = ops.Conv2d(width, width, 1, **kw)
        self.k = ops.Conv2d(width, width, 1, **kw)
        self.v = ops.Conv2d(width, width, 1, **kw)
        self.proj_out = ops.Conv2d(width, width, 1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (
            rearrange(conv(n), "b c h w -> b 1 (h w) c").contiguous()
            for conv in (self.q, self.k, self.v)
        )
        out = rearrange(self.attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, 1, H * W, D) each -> the same; softmax scale 1 / sqrt(D)."""
        return F.scaled_dot_product_attention(q, k, v)


class Mid(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, width: int, groups: int, ops=nn, **kw):
        super().__init__()
        self.block_1 = ResBlock(width, width, groups, ops, **kw)
        self.attn_1 = AttnBlock(width, groups, ops, **kw)
        self.block_2 = ResBlock(width, width, groups, ops, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H / 2, W / 2); the zeros are on the right and at the bottom."""

    def __init__(self, width: int, ops=nn, **kw):
        super().__init__()
        self.conv = ops.Conv2d(width, width, 3, stride=2, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2 H, 2 W), nearest, then a convolution."""

    def __init__(self, width: int, ops=nn, **kw):
        super().__init__()
        self.conv = ops.Conv2d(width, width, 3, padding=1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the way to the next one, if there is one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, ops=nn, **kw):
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(outputs if i else inputs, outputs, groups, ops, **kw) for i in range(blocks)
        )
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> moments (B, 2 * 32, H / 8, W / 8): means, then log-variances."""

    def __init__(self, config: AutoEncoderConfig, ops=nn, **kw):
        super().__init__()
        base, n = config.encoder_channels, groups(config.encoder_channels)
        widths = [base * m for m in config.multipliers]
        self.conv_in = ops.Conv2d(3, base, 3, padding=1, **kw)
        self.down = nn.ModuleList(
            Level(inputs, outputs, config.encoder_blocks, n, ops, **kw)
            for inputs, outputs in zip([base, *widths[:-1]], widths, strict=True)
        )
        for level, width in zip(self.down, widths[:-1], strict=False):
            level.downsample = Downsample(width, ops, **kw)
        self.mid = Mid(widths[-1], n, ops, **kw)
        self.norm_out = ops.GroupNorm(n, widths[-1], eps=1e-6, **kw)
        moments = 2 * config.latent_channels
        self.conv_out = ops.Conv2d(widths[-1], moments, 3, padding=1, **kw)
        self.quant_conv = ops.Conv2d(moments, moments, 1, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """(B, 32, H / 8, W / 8) -> pixels (B, 3, H, W)."""

    def __init__(self, config: AutoEncoderConfig, ops=nn, **kw):
        super().__init__()
        n, latent = groups(config.decoder_channels), config.latent_channels
        widths = [config.decoder_channels * m for m in config.multipliers]
        self.post_quant_conv = ops.Conv2d(latent, latent, 1, **kw)
        self.conv_in = ops.Conv2d(latent, widths[-1], 3, padding=1, **kw)
        self.mid = Mid(widths[-1], n, ops, **kw)
        self.up = nn.ModuleList(
            Level(inputs, outputs, config.decoder_blocks, n, ops, **kw)
            for inputs, outputs in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width, ops, **kw)
        self.norm_out = ops.GroupNorm(n, widths[0], eps=1e-6, **kw)
        self.conv_out = ops.Conv2d(widths[0], 3, 3, padding=1, **kw)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Bounded(Protocol):
    """Something that runs an autoencoder in bounded memory."""

    def encode(self, vae: "AutoEncoder", pixels: Tensor) -> Tensor: ...

    def decode(self, vae: "AutoEncoder", latents: Tensor) -> Tensor: ...


class AutoEncoder(nn.Module):
    """Both networks and the latent's statistics.

    Pixels and latents come and go in the dtype the weights compute in.
    """

    def __init__(self, config: AutoEncoderConfig, ops=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        kw = {"dtype": dtype, "device": device}
        self.encoder = Encoder(config, ops, **kw)
        self.decoder = Decoder(config, ops, **kw)
        # Holds the statistics under the file's names, and is never called: a forward in training
        # mode would change them. A file without `num_batches_tracked` loads strictly all the same.
        packed = 4 * config.latent_channels
        self.bn = nn.BatchNorm2d(packed, eps=EPS, affine=False, device=device)

    def encode(self, pixels: Tensor, memory: "Bounded | None" = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 128, H / 16, W / 16), normalised.

        `memory`, a vae_memory.Memory, bounds what it takes; None is the whole picture at once.
        Raises Flux2Error for anything but three channels, for sides that are no multiples of 16 and
        for values that are not numbers.
        """
        if memory is not None:
            return memory.encode(self, pixels)
        check_pixels(pixels)
        mean = self.encoder(pixels)[:, : self.config.latent_channels]
        return normalise(pack(mean), *self.statistics())

    def decode(self, latents: Tensor, memory: "Bounded | None" = None) -> Tensor:
        """The inverse: (B, 128, h, w) -> (B, 3, 16 h, 16 w) in about [-1, 1].

        Not clamped, as in the reference implementation: that belongs to making a picture of it.
        """
        if memory is not None:
            return memory.decode(self, latents)
        check_latents(latents, self.config)
        z = denormalise(latents, *self.statistics())
        return self.decoder(unpack(z))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the packed channels (128,), as the file has them."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None and variance is not None  # a BatchNorm2d that tracks has both
        return mean, variance


def check_latents(latents: Tensor, config: AutoEncoderConfig) -> None:
    """Raise unless latents are (B, 128, h, w)."""
    if latents.ndim != 4 or latents.shape[1] != 4 * config.latent_channels:
        raise Flux2Error(
            "This latent is not FLUX.2's",
            f"shape {tuple(latents.shape)}, wanted (batch, {CHANNELS}, height / 16, width / 16)",
            "Connect the output of a FLUX.2 sampler or VAE encoder",
        )


def check_pixels(pixels: Tensor) -> None:
    """Raise unless pixels are (B, 3, H, W), finite, with sides that are multiples of 16."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise Flux2Error(
            "The autoencoder reads RGB pictures",
            f"shape {tuple(pixels.shape)}, wanted (batch, 3, height, width)",
            "Drop the alpha channel, or turn a mask into an image first",
        )
    check_size(pixels.shape[3], pixels.shape[2])
    if not torch.isfinite(pixels).all():
        bad = int((~torch.isfinite(pixels)).sum())
        raise Flux2Error(
            "This picture holds values that are not numbers",
            f"{bad} of {pixels.numel()} are NaN or infinite",
            "Look for the node before this one that made them: its preview will be black or speckled",
        )


def detect_autoencoder(shapes: Shapes) -> AutoEncoderConfig:
    """Weight shapes under BFL names -> config, any width. Raises Flux2Error for any other file."""
    _check_marks(shapes)
    encoder = shapes["encoder.conv_in.weight"][0]
    levels = range(count(shapes, "encoder.down"))
    ends = [shapes.get(f"encoder.down.{i}.block.0.conv2.weight", (0,))[0] for i in levels]
    multipliers = tuple(end // max(1, encoder) for end in ends)
    decoder = shapes["decoder.conv_out.weight"][1] // max(1, multipliers[0])
    for side, width in (("encoder", encoder), ("decoder", decoder)):
        if width < 4 or width % groups(width) or 0 in multipliers:
            raise Flux2Error(
                f"This VAE's {side} has a width FLUX.2 cannot have", f"{width}, {ends}"
            )
    return AutoEncoderConfig(
        encoder,
        decoder,
        multipliers,
        shapes["encoder.quant_conv.weight"][0] // 2,
        count(shapes, "encoder.down.0.block"),
        count(shapes, "decoder.up.0.block"),
    )


MARKS = (
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.conv2.weight",
    "encoder.quant_conv.weight",
    "decoder.post_quant_conv.weight",
    "decoder.conv_out.weight",
    "bn.running_mean",
    "bn.running_var",
)


def _check_marks(shapes: Shapes) -> None:
    if "post_quant_conv.weight" in shapes and "conv_in.weight" in shapes:
        raise Flux2Error(
            "This file holds a decoder alone",
            "no encoder and no statistics in it",
            "Choose the file that also has the encoder: full_encoder_small_decoder.safetensors",
        )
    missing = [key for key in MARKS if key not in shapes]
    seen = f"no {missing[0]} among {len(shapes)} tensors" if missing else ""
    if not missing and tuple(shapes["bn.running_mean"]) != (CHANNELS,):
        seen = f"statistics for {tuple(shapes['bn.running_mean'])} channels, FLUX.2 has {CHANNELS}"
    if seen:
        raise Flux2Error(
            "This is not a FLUX.2 VAE",
            seen,
            "Choose flux2-vae.safetensors (also called ae.safetensors) of FLUX.2; those of FLUX.1, "
            "SDXL and other models make other latents",
        )
