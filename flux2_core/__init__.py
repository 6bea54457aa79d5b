"""FLUX.2 as a plain PyTorch library: transformer, autoencoder, text encoders, sampling.

The shortest use:

    from flux2_core import Pipeline
    Pipeline.load("nano")("a red circle left on white background", seed=1).save("circle.png")
"""

from . import latents, positions, schedule
from .autoencoder import AutoEncoder
from .checkpoint import load_autoencoder, load_text_encoder, load_transformer
from .configs import VARIANTS, AutoEncoderConfig, TextEncoderConfig, TransformerConfig, Variant
from .errors import Flux2Error
from .generate_files import load_writer
from .kv_cache import ReferenceCache
from .paused import PausedState
from .pipeline import Paths, Pipeline
from .prompt_cache import PromptCache
from .quantised import quantize
from .references import Reference, Region
from .sampling import denoise
from .step_cache import StepCache
from .stream import Controls
from .text_encoder import TextEncoder
from .transformer import Flux2Transformer
from .visibility import ReferenceControl, RegionPrompt

__all__ = [
    "VARIANTS",
    "AutoEncoder",
    "AutoEncoderConfig",
    "Controls",
    "Flux2Error",
    "Flux2Transformer",
    "Paths",
    "PausedState",
    "Pipeline",
    "PromptCache",
    "Reference",
    "ReferenceCache",
    "ReferenceControl",
    "Region",
    "RegionPrompt",
    "StepCache",
    "TextEncoder",
    "TextEncoderConfig",
    "TransformerConfig",
    "Variant",
    "denoise",
    "latents",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "load_writer",
    "positions",
    "quantize",
    "schedule",
]
