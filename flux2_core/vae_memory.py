"""How much memory the autoencoder may take: whole where it fits, else strip by strip."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import vae_stream
from .autoencoder import AutoEncoder
from .configs import AutoEncoderConfig
from .latents import PIXELS
from .vae_stream import Streaming

log = logging.getLogger(__name__)

MIB = 2**20
# From the fastest to the one that takes least. Smaller strips recompute more halo.
WAYS = (None, Streaming(), *(Streaming(lean=True, strip=n * MIB // 4) for n in (256, 64, 16, 4, 1)))
HOST_WAYS = tuple(Streaming(host=True, strip=n * MIB) for n in (64, 16, 4, 1))


def free_bytes(device: torch.device) -> int | None:
    """What a device has left; None where that cannot be asked."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and (table := Path("/proc/meminfo")).exists():
        lines = (line.split() for line in table.read_text().splitlines())
        return next((int(kb) * 1024 for name, kb, *_ in lines if name == "MemAvailable:"), None)
    return None


@dataclass(frozen=True)
class Memory:
    """`target`: bytes beyond the weights for one picture, 0 for what is free. `host`: what does
    not fit may wait in the CPU's memory, which is slow. `free` answers for the device.

    The result is the whole picture's whatever is chosen; whole, where it fits, is bit for bit that
    of a call without a Memory.
    """

    target: int = 0
    host: bool = False
    free: Callable[[torch.device], int | None] = free_bytes

    def encode(self, vae: AutoEncoder, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        how = self.choose(vae.config, "encode", width, height, pixels, len(pixels))
        return (
            AutoEncoder.encode(vae, pixels) if how is None else vae_stream.encode(vae, pixels, how)
        )

    def decode(self, vae: AutoEncoder, latents: Tensor) -> Tensor:
        height, width = (PIXELS * side for side in latents.shape[-2:])
        how = self.choose(vae.config, "decode", width, height, latents, len(latents))
        return (
            AutoEncoder.decode(vae, latents)
            if how is None
            else vae_stream.decode(vae, latents, how)
        )

    def choose(
        self, config: AutoEncoderConfig, job: str, width: int, height: int, like: Tensor, batch=1
    ) -> Streaming | None:
        """The fastest way that fits, None for whole; the one that takes least where none does.
        `job` is encode or decode; `like` has the device and the dtype."""
        limit = self.target or self.free(like.device)
        if limit is None:
            return None
        ways = WAYS + HOST_WAYS if self.host and like.device.type != "cpu" else WAYS
        needs = {
            way: estimate(config, job, width, height, like.element_size(), way, batch)
            for way in ways
        }
        for way, need in needs.items():
            if need <= limit:
                return way
        least = min(needs, key=lambda way: needs[way])
        log.warning(
            "FLUX.2 VAE: %s x %s pixels need about %s MiB to %s, more than the %s MiB there are "
            "for it. It goes on with what needs least.",
            width, height, needs[least] // MIB, job, limit // MIB,
        )  # fmt: skip
        return least


def estimate(
    config: AutoEncoderConfig,
    job: str,
    width: int,
    height: int,
    size: int,
    how: Streaming | None,
    batch: int = 1,
) -> int:
    """Bytes beyond the weights that the tensors of one call take at most; `size` is the dtype's.

    Whole pictures get a quarter more, for what convolutions allocate inside.
    """
    pixels = width * height * size
    if how is None:
        return int(1.25 * batch * pixels * _whole(config, job))
    blocks, last = list(_blocks(config, job)), len(config.multipliers) - 1
    deep = 4 * config.multipliers[-1] * _base(config, job) / 4**last  # attention: x, k, v, result
    kept = max(deep, *(_kept(inputs, outputs, how.lean) / 4**i for i, inputs, outputs in blocks))
    if how.host:
        kept = deep / 2
    row = max(max(inputs, outputs) * width * size / 2**i for i, inputs, outputs in blocks)
    strips = 5 * min(max(how.strip, 5 * (how.rows or 1) * row), row * height)
    return int(kept * pixels + strips + 3 * pixels * batch)


def _base(config: AutoEncoderConfig, job: str) -> int:
    return config.encoder_channels if job == "encode" else config.decoder_channels


def _blocks(config: AutoEncoderConfig, job: str):
    """(level, channels in, channels out) of the first residual block of each level."""
    widths = [_base(config, job) * m for m in config.multipliers]
    before = [widths[0], *widths[:-1]] if job == "encode" else [*widths[1:], widths[-1]]
    return zip(range(len(widths)), before, widths, strict=True)


def _kept(inputs: int, outputs: int, lean: bool) -> int:
    """Channels at a level's resolution that live at once (vae_stream.Stream.resblock)."""
    if lean:  # a decoder's level computes the first block's input, from a quarter, when it is read
        return max(outputs, inputs // 4 if outputs < inputs else inputs)
    return max(inputs, 2 * outputs) if outputs < inputs else inputs + outputs


def _whole(config: AutoEncoderConfig, job: str) -> float:
    """Channels at full resolution that live at once in a plain call."""
    blocks = _blocks(config, job)
    factor = 5 if job == "encode" else 3  # a level's input, the block's, its own three | three
    return max(factor * max(inputs, outputs) / 4**i for i, inputs, outputs in blocks)
