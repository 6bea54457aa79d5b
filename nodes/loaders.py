"""Loaders: a file of the host's model folders, or the built-in nano, as MODEL, CLIP and VAE."""

from ..flux2_core.configs import VARIANTS
from ..flux2_core.precision import PRECISIONS
from . import host, host_find
from .schema import Schema, io, ui

AUTO = "auto"
VARIANT_NAMES = [AUTO, *(name for name, v in VARIANTS.items() if v.text_encoder != "nano")]
VARIANT_TIP = (
    "Which FLUX.2 the file is. auto tells it from the file; klein, klein base and klein KV have the "
    "same shapes and are told apart by the file's name, so set it if a file was renamed. It decides "
    "what auto steps, guidance and size mean."
)


def _files(folder: str, *first: str) -> list[str]:
    return [*first, *host.files(folder)]


def _model_input():
    return io.Combo.Input(
        "model",
        options=_files("diffusion_models", *host.NANOS),
        default=host.NANO,
        tooltip="A FLUX.2 file in models/diffusion_models, or nano: a tiny FLUX.2 that comes with "
        "this pack and draws coloured shapes in seconds on any computer. nano distilled needs 4 "
        "steps and takes no guidance, as klein does; nano guided takes it as a number, as dev does.",
    )


def _text_input(*first: str):
    return io.Combo.Input(
        "text_encoder",
        options=_files("text_encoders", *first, host.NANO),
        default=first[0] if first else host.NANO,
        tooltip="The file in models/text_encoders that reads the prompt: Mistral-3 24B for dev, "
        "Qwen3 4B for klein 4B, Qwen3 8B for klein 9B, nano's own for nano. auto, where offered, "
        "takes the first one that belongs to the model.",
    )


def _vae_input(*first: str):
    taef2 = [host_find.TAEF2] if host_find.taef2_files() else []
    return io.Combo.Input(
        "vae",
        options=_files("vae", *first, host.NANO, *taef2),
        default=first[0] if first else host.NANO,
        tooltip="The file in models/vae that turns latents into pixels and back. FLUX.2's latents "
        "are the same for every FLUX.2, so any FLUX.2 VAE decodes any picture. A file that holds a "
        "small decoder alone takes its encoder from the whole VAE beside it. TAEF2, listed if its two "
        "files are in models/vae_approx, is tiny and rough. auto, where offered, takes the first "
        "one, for nano its own.",
    )


def _variant_input():
    return io.Combo.Input("variant", options=VARIANT_NAMES, default=AUTO, tooltip=VARIANT_TIP)


def _precision_inputs() -> list:
    return [
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default=AUTO,
            optional=True,
            tooltip="How the blocks' weights are stored and multiplied. auto: as the file has them; fp8 "
            "weights are multiplied in fp8 where the card can (RTX 40 and 50, H100 and newer). fp8 "
            "makes them so at load: half of bf16's memory. fp8 weights only multiplies in bf16: for "
            "older cards and the last bit of quality. bf16 decodes everything at load.",
        ),
        io.String.Input(
            "layers",
            default="",
            multiline=True,
            optional=True,
            tooltip="Exceptions from precision, one a line: single_blocks.0.*: bf16. A * stands for "
            "any part of a layer's name, the last line that fits wins. Empty: none.",
        ),
    ]


def _name(variant: str) -> str | None:
    return None if variant == AUTO else variant


class Flux2KitLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitLoader",
            display_name="FLUX.2 Loader",
            category="FLUX.2/loaders",
            description="Loads a FLUX.2 model with the text encoder and VAE that belong to it.",
            search_aliases=["flux2", "klein", "load checkpoint", "unet loader"],
            inputs=[
                _model_input(),
                _variant_input(),
                _text_input(AUTO),
                _vae_input(AUTO),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that draws."),
                io.Clip.Output(tooltip="The text encoder, for FLUX.2 Prompt or CLIP Text Encode."),
                io.Vae.Output(tooltip="Turns pictures into latents and back."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, text_encoder=AUTO, vae=AUTO, **_):
        chosen = {"diffusion_models": model, "text_encoders": text_encoder, "vae": vae}
        return [host.stamp(folder, name) for folder, name in chosen.items()]

    @classmethod
    def execute(cls, model, variant=AUTO, text_encoder=AUTO, vae=AUTO):
        loaded = host_find.model(model, _name(variant))
        nano = model in host.NANOS
        clip = host_find.clip(text_encoder, host.config_of(loaded), nano)
        told = ui.PreviewText(host_find.verdict(model, _name(variant)))
        return io.NodeOutput(loaded, clip, host_find.vae(vae, nano), ui=told)


class Flux2KitModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitModelLoader",
            display_name="FLUX.2 Load Model",
            category="FLUX.2/loaders",
            description="Loads a FLUX.2 transformer alone.",
            search_aliases=["flux2 unet", "diffusion model"],
            inputs=[_model_input(), _variant_input(), *_precision_inputs()],
            outputs=[io.Model.Output(tooltip="The model that draws.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model, **_):
        return host.stamp("diffusion_models", model)

    @classmethod
    def execute(cls, model, variant=AUTO, precision=AUTO, layers=""):
        loaded = host_find.model(model, _name(variant), precision, layers)
        told = ui.PreviewText(host_find.verdict(model, _name(variant)))
        return io.NodeOutput(loaded, ui=told)


class Flux2KitVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitVAELoader",
            display_name="FLUX.2 Load VAE",
            category="FLUX.2/loaders",
            description="Loads a FLUX.2 autoencoder alone, of any width.",
            search_aliases=["flux2 vae", "ae.safetensors", "small decoder"],
            inputs=[
                _vae_input(),
            ],
            outputs=[io.Vae.Output(tooltip="Turns pictures into latents and back.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae):
        return host.stamp("vae", vae)

    @classmethod
    def execute(cls, vae):
        return io.NodeOutput(host_find.vae(vae, vae == host.NANO))


class Flux2KitTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitTextEncoderLoader",
            display_name="FLUX.2 Load Text Encoder",
            category="FLUX.2/loaders",
            description="Loads a FLUX.2 text encoder alone: Mistral-3 24B, Qwen3 4B or 8B, or nano's.",
            search_aliases=["flux2 clip", "mistral", "qwen3", "clip loader"],
            inputs=[
                _text_input(),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, for FLUX.2 Prompt.")],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder):
        return host.stamp("text_encoders", text_encoder)

    @classmethod
    def execute(cls, text_encoder):
        return io.NodeOutput(host_find.clip(text_encoder))
