"""What a file is when it is not what was asked for, told from the names of its tensors."""

import re
from collections.abc import Mapping

from .errors import Flux2Error

# What was asked for: in plain words, and where such files usually lie.
KINDS = {
    "transformer": (
        "a FLUX.2 transformer",
        "a FLUX.2 dev or klein file from the diffusion_models folder",
    ),
    "vae": ("a FLUX.2 VAE", "flux2-vae.safetensors from the vae folder"),
    "text_encoder": (
        "a FLUX.2 text encoder",
        "a Mistral-3 or Qwen3 file from the text_encoders folder",
    ),
}

# A pattern in the names, and what the file then is. The first that fits.
STRANGERS = (
    (
        r"lora_[ABab]\.|lora_down|lora_up|lora\.(down|up)|lokr_|hada_w|dora_scale",
        "a LoRA, a change to a model; a LoRA loader takes it",
    ),
    (r"control_(img_in|blocks|transformer_blocks)|controlnet_", "a ControlNet"),
    (r"double_stream_modulation_img\.", "a FLUX.2 transformer"),
    (r"double_blocks\.0\.img_mod\.|single_transformer_blocks\.0\.norm\.linear", "a FLUX.1 model"),
    (
        r"input_blocks\.0\.0\.|conditioner\.embedders|cond_stage_model|down_blocks\.0\.resnets\.0\.time_emb",
        "a Stable Diffusion or SDXL model",
    ),
    (r"joint_blocks\.0\.", "a Stable Diffusion 3 model"),
    (
        r"noise_refiner\.0\.|transformer_blocks\.0\.img_mlp\.net|blocks\.0\.cross_attn\.",
        "a model of another family",
    ),
    (r"decoder\.layers\.0\.", "a tiny autoencoder, made for previews"),
    (r"(encoder|decoder)\.conv_(in|out)\.", "a VAE"),
    (r"text_model\.encoder|encoder\.block\.0\.layer\.0", "a CLIP or T5 text encoder"),
    (r"layers\.0\.mlp\.gate_proj", "a text encoder"),
    (r"^token_embd\.", "a text encoder"),
)


def stranger(names: Mapping[str, object], kind: str, file: str) -> Flux2Error:
    """The error for a file in which nothing of `kind` was found."""
    wanted, where = KINDS[kind]
    for pattern, what in STRANGERS:
        if any(re.search(pattern, name) for name in names):
            return Flux2Error(f"{file} is not {wanted}", what, f"Choose {where}")
    first = next(iter(names), "")
    return Flux2Error(
        f"{file} is not {wanted}",
        f"{len(names)} tensors, {first[:80]} the first",
        f"Choose {where}",
    )
