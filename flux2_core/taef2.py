"""TAEF2, the tiny autoencoder of the FLUX.2 latent space (madebyollin/taesd, MIT): for previews and
quick looks.

Its latent is the normalised, unpacked one; here it goes in and out packed, like everybody's.
Each network is a plain sequence whose positions are the file's key numbers.
"""

import torch
from torch import Tensor, nn

from .autoencoder import check_latents, check_pixels
from .configs import AutoEncoderConfig
from .errors import Flux2Error
from .latents import pack, unpack


def conv(inputs: int, outputs: int, ops=nn, **kw):
    return ops.Conv2d(inputs, outputs, 3, padding=1, **kw)


class Clamp(nn.Module):
    """Soft limit at +-3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """ReLU(conv-ReLU-conv-ReLU-conv(x) + x), at the lowest resolution with a gate before it."""

    def __init__(self, width: int = 64, gated: bool = False, ops=nn):
        super().__init__()
        parts = [
            conv(width, width, ops),
            nn.ReLU(),
            conv(width, width, ops),
            nn.ReLU(),
            conv(width, width, ops),
        ]
        self.conv = nn.Sequential(*parts)
        self.pool = _gate(width, ops) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return (self.conv(x) + x).relu()


def _gate(width: int, ops) -> nn.Sequential:
    return nn.Sequential(
        ops.Conv2d(width, 4 * width, 1, bias=False),
        ops.GroupNorm(4, 4 * width),
        nn.ReLU(),
        ops.Conv2d(4 * width, width, 1, bias=False),
    )


def encoder(ops=nn, width: int = 64) -> nn.Sequential:
    """Pixels (B, 3, H, W) in [0, 1] -> (B, 32, H / 8, W / 8)."""
    layers: list[nn.Module] = [conv(3, width, ops), Block(width, ops=ops)]
    for level in range(3):
        layers.append(conv(width, width, ops, stride=2, bias=False))
        layers += [Block(width, level == 2, ops) for _ in range(3)]
    return nn.Sequential(*layers, conv(width, 32, ops))


def decoder(ops=nn, width: int = 64) -> nn.Sequential:
    """(B, 32, h, w) -> pixels (B, 3, 8 h, 8 w) in about [0, 1]."""
    layers: list[nn.Module] = [Clamp(), conv(32, width, ops), nn.ReLU()]
    for level in range(3):
        layers += [Block(width, level == 0, ops) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), conv(width, width, ops, bias=False)]
    return nn.Sequential(*layers, Block(width, ops=ops), conv(width, 3, ops))


def encode(net: nn.Sequential, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> (B, 128, H / 16, W / 16)."""
    return pack(net((pixels + 1) / 2))


def decode(net: nn.Sequential, latents: Tensor) -> Tensor:
    """(B, 128, h, w) -> pixels (B, 3, 16 h, 16 w) in [-1, 1]."""
    return net(unpack(latents)).clamp(0, 1) * 2 - 1


class TinyAutoEncoder(nn.Module):
    """Both networks, called as an AutoEncoder is."""

    def __init__(self, ops=nn):
        super().__init__()
        self.encoder, self.decoder = encoder(ops), decoder(ops)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 128, H / 16, W / 16). Raises as AutoEncoder.encode does."""
        check_pixels(pixels)
        return encode(self.encoder, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 128, h, w) -> (B, 3, 16 h, 16 w) in [-1, 1]."""
        check_latents(latents, AutoEncoderConfig())
        return decode(self.decoder, latents)

    def check(self, state: dict) -> None:
        """Raise unless these are TAEF2's weights, under `encoder.` and `decoder.`."""
        wanted = {name: tensor.shape for name, tensor in self.state_dict().items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        wrong = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
        if wrong:
            raise Flux2Error(
                "These files are not TAEF2",
                f"{len(wrong)} tensors are missing or of another shape: {', '.join(wrong[:3])}",
                "Put taef2_encoder.safetensors and taef2_decoder.safetensors into models/vae_approx",
            )
