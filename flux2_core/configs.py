"""What a FLUX.2 model is made of: one frozen dataclass per network and a table of known variants.

No code branches on a model's name, only on these fields. `detect` reads the fields off weight
shapes, so that any size of the family loads, known or not.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import Flux2Error

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TransformerConfig:
    """The flow transformer. The defaults are FLUX.2 dev (model card, 32.2 B parameters)."""

    hidden_size: int = 6144
    context_dim: int = 15360
    double_blocks: int = 8
    single_blocks: int = 48
    guidance_embed: bool = True
    in_channels: int = 128
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)
    theta: int = 2000
    mlp_ratio: int = 3
    text_length: int = 512  # rows the text is padded to: padding has positions too
    kv_references: bool = False  # references see references only and stand at t = 0 (klein 9B-KV)

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dim)

    @property
    def heads(self) -> int:
        return self.hidden_size // self.head_dim


@dataclass(frozen=True)
class AutoEncoderConfig:
    """The autoencoder. `channels` is the width at full resolution; the small decoder has 96."""

    encoder_channels: int = 128
    decoder_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    latent_channels: int = 32
    encoder_blocks: int = 2
    decoder_blocks: int = 3


@dataclass(frozen=True)
class TextEncoderConfig:
    """A decoder-only language model whose hidden states after `layers_out` layers are stacked."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers_out: tuple[int, ...]  # index k: the state after k layers, before the final norm
    qk_norm: bool
    rope_theta: float
    norm_eps: float
    pad_id: int
    padding: str  # "left" or "right"
    template: str  # a key of text_encoder.TEMPLATES
    text_length: int = 512

    @property
    def layers(self) -> int:
        """Layers that are needed; a file may hold more."""
        return max(self.layers_out)

    @property
    def context_dim(self) -> int:
        return self.hidden_size * len(self.layers_out)


MISTRAL3_24B = TextEncoderConfig(
    131072, 5120, 32768, 32, 8, 128, (10, 20, 30), False, 1e9, 1e-5, 11, "left", "mistral3"
)
QWEN3_4B = TextEncoderConfig(
    151936, 2560, 9728, 32, 8, 128, (9, 18, 27), True, 1e6, 1e-6, 151643, "right", "qwen3"
)
QWEN3_8B = TextEncoderConfig(
    151936, 4096, 12288, 32, 8, 128, (9, 18, 27), True, 1e6, 1e-6, 151643, "right", "qwen3"
)
NANO_TEXT = TextEncoderConfig(
    192, 128, 320, 2, 1, 64, (1, 2, 3), True, 1e4, 1e-6, 0, "right", "nano", text_length=32
)
TEXT_ENCODERS = {
    "mistral3-24b": MISTRAL3_24B,
    "qwen3-4b": QWEN3_4B,
    "qwen3-8b": QWEN3_8B,
    "nano": NANO_TEXT,
}

KLEIN_4B = TransformerConfig(3072, 7680, 5, 20, guidance_embed=False)
KLEIN_9B = TransformerConfig(4096, 12288, 8, 24, guidance_embed=False)
NANO = TransformerConfig(256, 384, 2, 4, guidance_embed=False, text_length=32)
NANO_GUIDED = replace(NANO, guidance_embed=True)


@dataclass(frozen=True)
class Variant:
    """A released model: its shapes and what it wants when the user says `auto`.

    `guidance_kind`: "embedded" (one forward, the value is an input), "cfg" (two forwards) or "none"
    (distilled: a guidance value does nothing).
    """

    name: str
    label: str
    transformer: TransformerConfig
    text_encoder: str  # a key of TEXT_ENCODERS
    steps: int
    guidance: float
    guidance_kind: str
    size: int = 1024  # native side in pixels


_KV_9B = TransformerConfig(4096, 12288, 8, 24, guidance_embed=False, kv_references=True)
VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("dev", "FLUX.2 dev", TransformerConfig(), "mistral3-24b", 50, 4.0, "embedded"),
        Variant("klein-4b", "FLUX.2 klein 4B", KLEIN_4B, "qwen3-4b", 4, 1.0, "none"),
        Variant("klein-base-4b", "FLUX.2 klein base 4B", KLEIN_4B, "qwen3-4b", 50, 4.0, "cfg"),
        Variant("klein-9b", "FLUX.2 klein 9B", KLEIN_9B, "qwen3-8b", 4, 1.0, "none"),
        Variant("klein-base-9b", "FLUX.2 klein base 9B", KLEIN_9B, "qwen3-8b", 50, 4.0, "cfg"),
        Variant("klein-9b-kv", "FLUX.2 klein 9B-KV", _KV_9B, "qwen3-8b", 4, 1.0, "none"),
        Variant("nano", "nano (built in)", NANO, "nano", 8, 1.0, "cfg", 128),
        Variant("nano-distilled", "nano distilled (built in)", NANO, "nano", 4, 1.0, "none", 128),
        Variant(
            "nano-guided", "nano guided (built in)", NANO_GUIDED, "nano", 8, 4.0, "embedded", 128
        ),
    )
}

MARKS = (
    "img_in.weight",
    "txt_in.weight",
    "double_stream_modulation_img.lin.weight",
    "final_layer.linear.weight",
)


def detect(shapes: Shapes) -> TransformerConfig:
    """Weight shapes under BFL names, without prefix -> config.

    Raises Flux2Error for anything that is no FLUX.2 transformer. Shapes are read off layers that
    quantised files leave whole (img_in, txt_in), never off block linears.
    """
    missing = [key for key in MARKS if key not in shapes]
    if missing:
        raise Flux2Error(
            "This is not a FLUX.2 transformer",
            f"no {missing[0]} among {len(shapes)} tensors",
            "Choose a FLUX.2 dev or klein file from the diffusion_models folder",
        )
    hidden, channels = shapes["img_in.weight"]
    context = shapes["txt_in.weight"][1]
    if channels != 128:
        raise Flux2Error(
            "This model does not read FLUX.2 latents",
            f"img_in takes {channels} channels, FLUX.2 has 128",
            "Choose a FLUX.2 dev or klein file",
        )
    if hidden % 128:
        raise Flux2Error(
            "This model's width is no multiple of a FLUX.2 head",
            f"{hidden}",
            "The file may be damaged",
        )
    config = TransformerConfig(
        hidden,
        context,
        count(shapes, "double_blocks"),
        count(shapes, "single_blocks"),
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )
    own = (nano for nano in (NANO, NANO_GUIDED) if config == _plain(nano))
    return next(own, config)


def variants_of(config: TransformerConfig) -> list[Variant]:
    """Every known variant with these shapes; weights alone cannot tell klein's kinds apart."""
    return [v for v in VARIANTS.values() if _plain(v.transformer) == _plain(config)]


def count(shapes: Shapes, name: str) -> int:
    """How many different numbered blocks `name.0.`, `name.1.` ... there are."""
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.")
    return len({m[1] for key in shapes if (m := pattern.match(key))})


def _plain(config: TransformerConfig) -> TransformerConfig:
    c = config
    return TransformerConfig(
        c.hidden_size, c.context_dim, c.double_blocks, c.single_blocks, c.guidance_embed
    )
