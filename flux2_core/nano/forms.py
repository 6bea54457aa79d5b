"""nano's other forms: small files that change the base's weights, merged when they are loaded.

`nano-distilled` is a LoRA and nothing else; `nano-guided` also brings the layers that embed a
guidance.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..configs import NANO
from ..files import open_checkpoint
from ..formats import Packed
from ..lora import read

FORMS = {
    "nano-distilled": "nano_distilled_lora.safetensors",
    "nano-guided": "nano_guided.safetensors",
}
PREFIX = "diffusion_model."  # of a LoRA's keys
EMBEDDER = "guidance_in."


def form_file(name: str) -> Path:
    return Path(__file__).parent / FORMS[name]


def merge(
    base: Mapping[str, Tensor | Packed], name: str
) -> tuple[dict[str, Tensor | Packed], Mapping[str, str]]:
    """The base's weights -> the form's, float32 where they change; and its file's metadata."""
    file = form_file(name)
    checkpoint = open_checkpoint(file)
    state = dict(base)
    shapes = {
        key.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for key, tensor in base.items()
        if isinstance(tensor, Tensor) and tensor.ndim == 2
    }
    for delta in read(file, NANO, shapes)[0]:
        key, rows = f"{delta.place.layer}.weight", delta.span(NANO.hidden_size)
        weight = state[key]
        assert isinstance(weight, Tensor)  # nano's own file is not quantised
        state[key] = weight = weight.float()
        weight[rows] += delta.matrix()
    state |= checkpoint.load({key: key for key in checkpoint.tensors if key.startswith(EMBEDDER)})
    return state, checkpoint.metadata
