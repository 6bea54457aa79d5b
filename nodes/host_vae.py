"""VAE: the host's own class around our autoencoders, filled without its constructor, which only
knows fixed widths."""

import logging
from contextlib import contextmanager
from functools import partial

import comfy.model_management as memory
import comfy.ops
import comfy.sd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..flux2_core import vae_stream
from ..flux2_core.autoencoder import AutoEncoder
from ..flux2_core.checkpoint import read_state_dict
from ..flux2_core.errors import Flux2Error
from ..flux2_core.taef2 import TinyAutoEncoder
from ..flux2_core.vae_memory import WAYS, Memory
from .host_objects import fill, patch_of

log = logging.getLogger(__name__)
AFTER = WAYS[3]  # the way to go on with where a picture did not fit after all


class HostAutoEncoder(AutoEncoder):
    """In the memory that the host has left, or that `bounded` allows."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.memory = Memory(free=memory.get_free_memory)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._run("encode", pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self._run("decode", latents)

    def _run(self, job: str, x: Tensor) -> Tensor:
        try:
            return getattr(self.memory, job)(self, x)
        except memory.OOM_EXCEPTION:
            log.warning("FLUX.2 VAE: out of memory; once more, strip by strip.")
        memory.soft_empty_cache()  # outside the handler, which keeps its tensors alive
        return getattr(vae_stream, job)(self, x, AFTER)


@contextmanager
def bounded(vae, gigabytes: float = 0.0, overflow: bool = False):
    """Inside, a VAE takes at most so much (0: what is free) beyond its weights for a picture, and
    may keep what does not fit in the CPU's memory. Raises Flux2Error for a VAE that cannot."""
    network = vae.first_stage_model
    if not isinstance(network, HostAutoEncoder):
        if gigabytes or overflow:
            raise Flux2Error(
                "This VAE cannot be bounded in memory",
                f"a {type(network).__name__}, which takes a picture at once",
                "Load a FLUX.2 VAE file with FLUX.2 Load VAE, or set memory to 0 and overflow off",
            )
        yield
        return
    before = network.memory
    network.memory = Memory(int(gigabytes * 2**30), overflow, memory.get_free_memory)
    try:
        yield
    finally:
        network.memory = before


def load_vae(path: str, base: str | None = None, disable_dynamic: bool = False) -> comfy.sd.VAE:
    """An autoencoder file, or "nano" -> VAE. `base`: see `load_autoencoder`."""
    state, _, config = read_state_dict(path, "vae", base=base)
    vae = empty_vae()
    network = HostAutoEncoder(config, comfy.ops.disable_weight_init, vae.vae_dtype)
    # the host's figures are for the released width
    encode, decode = (width / 128 for width in (config.encoder_channels, config.decoder_channels))
    factors = 1767 * encode, 2178 * 16 * 16 * decode
    return filled(vae, network, state, factors, (path, base), load_vae, disable_dynamic)


def load_taef2(encoder: str, decoder: str, disable_dynamic: bool = False) -> comfy.sd.VAE:
    """TAEF2's two files -> VAE. Raises Flux2Error if they are not TAEF2's."""
    vae = empty_vae()
    network = TinyAutoEncoder(comfy.ops.disable_weight_init).to(vae.vae_dtype)
    state = _tensors(encoder, "encoder") | _tensors(decoder, "decoder")
    network.check(state)
    factors = 64 * 5, 64 * 5 * 16 * 16  # five tensors of 64 channels
    return filled(vae, network, state, factors, (encoder, decoder), load_taef2, disable_dynamic)


def _tensors(path: str, side: str) -> dict:
    try:
        return {f"{side}.{name}": tensor for name, tensor in load_file(path).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise Flux2Error(
            f"TAEF2's {side} cannot be read", str(error), "Download it again"
        ) from error


def empty_vae() -> comfy.sd.VAE:
    """With all that the host's constructor sets, but no network."""
    vae = comfy.sd.VAE.__new__(comfy.sd.VAE)
    vae.downscale_ratio = vae.upscale_ratio = 16
    vae.latent_channels, vae.latent_dim, vae.output_channels = 128, 2, 3
    vae.process_input, vae.process_output = _to_signed, _to_unit
    vae.working_dtypes = [torch.bfloat16, torch.float32]
    vae.disable_offload = vae.not_video = vae.handles_tiling = False
    vae.crop_input = True
    vae.size = vae.downscale_index_formula = vae.upscale_index_formula = None
    vae.extra_1d_channel = vae.format_encoded = vae.pad_channel_value = None
    vae.audio_sample_rate = 44100
    vae.device, vae.output_device = memory.vae_device(), memory.intermediate_device()
    vae.vae_dtype = memory.vae_dtype(vae.device, vae.working_dtypes)
    return vae


def filled(vae, network, state: dict, factors, files: tuple, load, disable_dynamic: bool):
    """The VAE with a network, its weights, and the host's estimates for encode and decode."""
    vae.first_stage_model = network.eval()
    vae.memory_used_encode, vae.memory_used_decode = (
        partial(_memory, vae.first_stage_model, factor) for factor in factors
    )
    fill(
        vae,
        vae.first_stage_model,
        state,
        load_device=vae.device,
        offload_device=memory.vae_offload_device(),
        reload=(patch_of, (load, *files)),
        disable_dynamic=disable_dynamic,
    )
    return vae


def _memory(network, factor: float, shape, dtype) -> float:
    """Bytes for one picture: `factor` numbers a position of the last two axes, but no more than
    `bounded` allows: the host makes that much room."""
    whole = factor * shape[2] * shape[3] * memory.dtype_size(dtype)
    allowed = network.memory.target if isinstance(network, HostAutoEncoder) else 0
    return min(whole, allowed or whole)


def _to_signed(image):
    return image * 2.0 - 1.0


def _to_unit(image):
    """[-1, 1] -> [0, 1], in place and returned: hosts differ in which of the two they use."""
    return image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
