"""What Kernel Status asks of the host: the device, the model's layers, the host's own attention."""

import comfy.ldm.modules.attention as attention
import comfy.model_management as memory

from ..flux2_core.kernels.words import report

WORDS = {
    "attention_pytorch": "PyTorch",
    "attention_sage": "SageAttention",
    "attention_flash": "flash-attn",
    "attention_xformers": "xFormers",
    "attention_split": "ComfyUI's split attention",
    "attention_sub_quad": "ComfyUI's sub-quadratic attention",
}


def status_of(model) -> str:
    """Of a MODEL, or of the device that the host would load one on."""
    device = memory.get_torch_device() if model is None else model.load_device
    network = None if model is None else model.model.diffusion_model
    name = getattr(attention.optimized_attention, "__name__", "")
    host = f"{WORDS.get(name, name)}, as ComfyUI was started"
    if model is not None and "optimized_attention_override" in model.model_options.get(
        "transformer_options", {}
    ):
        host += "; another node puts its own in its place"
    return report(device, network, host)
