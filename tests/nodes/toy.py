"""Toy networks and files for the node tests: the real classes, small, with random weights."""

import contextlib

import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core import configs
from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.transformer import Flux2Transformer

DEV = configs.TransformerConfig(256, 384, 2, 2, guidance_embed=True)
KLEIN = configs.TransformerConfig(256, 384, 2, 3, guidance_embed=False)
VAE = configs.AutoEncoderConfig(16, 16)


def weights(network, seed: int = 0) -> dict:
    """Random weights at which every layer matters: signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        wide = p.ndim > 1
        scale = p[0].numel() ** -0.5 if wide else 0.1
        mean = 1.0 if not wide and "bias" not in name else 0.0
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * scale + mean)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def transformer(config, seed: int = 0) -> dict:
    return weights(Flux2Transformer(config), seed)


def write_models(models) -> dict:
    """Files in the host's folders (`models`: kind -> folder): a dev and a klein form, a VAE."""
    save_file(transformer(DEV), models("diffusion_models") / "toy-dev.safetensors")
    save_file(transformer(KLEIN, 1), models("diffusion_models") / "toy-klein.safetensors")
    save_file(weights(AutoEncoder(VAE), 2), models("vae") / "toy-vae.safetensors")


def text_state(seed: int = 3) -> dict:
    return weights(TextEncoder(configs.NANO_TEXT), seed)


def conditioning(seed: int, rows: int = 24, width: int = 384, **options) -> list:
    """A random prompt as the host's CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, rows, width, generator=generator), {"pooled_output": None, **options}]]


def latents(seed: int, *sizes) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 128, *size, generator=generator) for size in sizes]


def images(seed: int, *sizes) -> list:
    """Random pictures (1, height, width, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, *size, 3, generator=generator) for size in sizes]


def difference(a, b) -> float:
    """The largest difference, over b's standard deviation."""
    return float((a - b).abs().max() / b.std())


def native(state: dict, dtype=torch.float32):
    """The host's own MODEL of these weights."""
    import comfy.sd

    with heads_from_width():
        return comfy.sd.load_diffusion_model_state_dict(dict(state), {"dtype": dtype})


@contextlib.contextmanager
def heads_from_width():
    """ComfyUI 0.3.75 takes every FLUX.2 for dev, with 48 heads: a toy needs the right number. On
    newer hosts this changes nothing."""
    import comfy.model_detection as detection

    stock = detection.detect_unet_config

    def detect(*args, **kw):
        found = stock(*args, **kw)
        if found and found.get("image_model") == "flux2":
            found["num_heads"] = found["hidden_size"] // 128
        return found

    detection.detect_unet_config = detect
    try:
        yield
    finally:
        detection.detect_unet_config = stock


def ours(config, state: dict, variant=None, dtype=torch.float32):
    """Our MODEL of these weights."""
    from flux2_pack.nodes import host_objects

    return host_objects.build_model(config, dict(state), variant, (None, ()), dtype)


def sampled(
    model,
    *,
    references=2,
    method=None,
    batch=1,
    cfg=4.0,
    steps=2,
    size=(8, 8),
    negative=30,
    prepare=lambda model: model,
    hooks=(),
):
    """Latents from the host's own sampling call, with a model that `prepare` may patch; `hooks` for
    the prompt and the negative."""
    import comfy.hooks
    import comfy.sample
    import comfy.samplers

    options = {"guidance": 4.0}
    if references:
        options["reference_latents"] = latents(4, (8, 6), (4, 8))[:references]
    if method:
        options["reference_latents_method"] = method
    positive, negative = (
        conditioning(seed, rows, **options) for seed, rows in ((1, 24), (2, negative))
    )
    if hooks:
        conds = zip((positive, negative), hooks, strict=True)
        positive, negative = (comfy.hooks.set_hooks_for_conditioning(c, h) for c, h in conds)
    noise = torch.randn(batch, 128, *size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            prepare(model.clone()),
            noise,
            cfg,
            comfy.samplers.sampler_object("euler"),
            torch.linspace(1, 0, steps + 1),
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=1,
        )


def lora(state: dict, seed: int = 5, rank: int = 4) -> dict:
    """A LoRA on a few layers, in the layout that every host maps: diffusion_model.<BFL name>."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "img_in"):
        rows, columns = state[f"{name}.weight"].shape
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            random = torch.randn(shape, generator=generator) * 0.1
            out[f"diffusion_model.{name}.lora_{part}.weight"] = random
    return out


def clip(seed: int = 3, change=lambda state: state):
    """Our CLIP with random weights in nano's form."""
    from flux2_pack.flux2_core.tokenizer import nano_tokenizer
    from flux2_pack.nodes import host_text

    tokenizer = nano_tokenizer()
    return host_text.build_clip(configs.NANO_TEXT, change(text_state(seed)), tokenizer, (None, ()))


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


class ToyPrompt:
    """A test-only node: a random prompt, so that no text encoder is needed."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0, "max": 99})}}

    def make(self, number):
        return (conditioning(number, 20 + number),)


class ToyImage:
    """A test-only node: a random picture."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        sides = {"width": ("INT", {"default": 64}), "height": ("INT", {"default": 64})}
        return {"required": {"number": ("INT", {"default": 0, "max": 99}), **sides}}

    def make(self, number, width, height):
        return (images(number, (height, width))[0],)


def add_nodes(host) -> None:
    """Make ToyPrompt and ToyImage known to the host."""
    host.mappings |= {"ToyPrompt": ToyPrompt, "ToyImage": ToyImage}
