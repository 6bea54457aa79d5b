"""CLIP: the host's class around our text encoder and its tokenizer."""

from functools import partial
from pathlib import Path

import comfy.hooks
import comfy.model_management as memory
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import nn

from ..flux2_core.checkpoint import locate, read_text_encoder
from ..flux2_core.configs import TEXT_ENCODERS, VARIANTS, TextEncoderConfig, Variant
from ..flux2_core.text_encoder import TextEncoder
from ..flux2_core.tokenizer import PromptTokenizer
from . import host_quant
from .host_objects import fill

KEY = "flux2kit"  # our entry in the host's dictionary of tokens


class Tokenizer:
    """The host's tokenizer contract. A token's weight is 1, padding's is 0: FLUX.2 was trained
    without weights, so (word:1.2) is plain text."""

    def __init__(self, prompts: PromptTokenizer):
        self.prompts = prompts

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_) -> dict:
        ids, mask = self.prompts.encode(text)
        extra = (0,) if return_word_ids else ()
        pairs = zip(ids[0].tolist(), mask[0].float().tolist(), strict=True)
        return {KEY: [[(*pair, *extra) for pair in pairs]]}

    def count(self, text: str) -> int:
        """How many tokens a prompt has with its template, also where the model reads fewer."""
        return len(self.prompts.tokens(text))

    def state_dict(self) -> dict:
        return {}


class Encoder(nn.Module):
    """The host's contract for a text model, around ours."""

    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype):
        super().__init__()
        self.flux2 = TextEncoder(config, comfy.ops.manual_cast, dtype).eval()
        self.dtypes = {dtype}
        self.stored: dict = {}  # the weights as they came, mapped from the file where they can be
        self.origin: tuple = ()  # which file they came from
        self.file = ""  # its path, or "nano"; what else is in it is read from there
        self.reset_clip_options()

    def reset_clip_options(self) -> None:
        self.options: dict = {}

    def set_clip_options(self, options: dict) -> None:
        self.options |= options

    def encode_token_weights(self, tokens: dict) -> tuple:
        """-> (1, T, context_dim) with the padding's rows, and no pooled text."""
        device = self.options.get("execution_device") or memory.text_encoder_device()
        rows = torch.tensor([[token[:2] for token in row] for row in tokens[KEY]], device=device)
        out = self.flux2(rows[..., 0].long(), rows[..., 1] > 0)
        return out.to(memory.intermediate_device()).float(), None

    def load_sd(self, state: dict):
        return self.load_state_dict(state, strict=False)


# The host's copy of the Qwen tokenizer, for files that carry none.
FOLDERS = (Path(comfy.sd.__file__).parent / "text_encoders" / "qwen25_tokenizer",)


def load_clip(path: str, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A text encoder file, or "nano" -> CLIP."""
    state, config, prompts = read_text_encoder(path, folders=FOLDERS)
    clip = build_clip(config, state, prompts, (_clip_patcher, (path,)), disable_dynamic)
    clip.cond_stage_model.file = path
    status = locate(path, "text_encoder").stat()
    clip.cond_stage_model.origin = status.st_size, status.st_mtime_ns
    return clip


def _clip_patcher(path: str, disable_dynamic: bool = False):
    return load_clip(path, disable_dynamic).patcher


def build_clip(
    config: TextEncoderConfig,
    state: dict,
    prompts: PromptTokenizer,
    reload: tuple,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """Weights under their own names, complete -> CLIP."""
    device = memory.text_encoder_device()
    clip = comfy.sd.CLIP(no_init=True)
    dtype = _dtype(state, device)
    clip.cond_stage_model = Encoder(config, dtype)
    clip.tokenizer = Tokenizer(prompts)
    clip.tokenizer_options, clip.layer_idx = {}, None
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    named = {f"flux2.{name}": tensor for name, tensor in state.items()}
    named = host_quant.install(clip.cond_stage_model, named, dtype)
    clip.cond_stage_model.stored = named
    devices = {"load_device": device, "offload_device": memory.text_encoder_offload_device()}
    fill(
        clip,
        clip.cond_stage_model,
        named,
        **devices,
        reload=reload,
        disable_dynamic=disable_dynamic or host_quant.coded(clip.cond_stage_model),
        keep=partial(_keep, clip.cond_stage_model, dtype),
    )
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    return clip


def _keep(encoder: Encoder, dtype: torch.dtype, named: dict) -> dict:
    """Numbers in one dtype: those that have it stay mapped from the file. Codes and scales of
    quantised layers are no numbers."""

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        layer = encoder.get_submodule(name.rpartition(".")[0])
        return tensor if isinstance(layer, host_quant.QuantLinear) else tensor.to(dtype)

    encoder.stored = {name: cast(name, tensor) for name, tensor in named.items()}
    return encoder.stored


def _dtype(state: dict, device) -> torch.dtype:
    """What most weights have, but on a CPU float32, which is exact and there fastest, as long as
    it takes little memory."""
    most = comfy.utils.weight_dtype(host_quant.plain(state))
    if memory.is_device_cpu(device) and host_quant.count(state) < 1e9:
        return torch.float32
    return most if most in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16


def conditioning(clip, text: str) -> list:
    """CONDITIONING of a prompt, by our CLIP or any other of the host."""
    out = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    # Older hosts insist on the key, though FLUX.2 has no pooled text.
    return [[rows, {"pooled_output": None, **options}] for rows, options in out]


def variant(clip) -> Variant | None:
    """A model that one of our text encoders belongs to; the host's own are not told apart."""
    if not isinstance(clip.tokenizer, Tokenizer):
        return None
    template = clip.tokenizer.prompts.config.template
    return next(v for v in VARIANTS.values() if TEXT_ENCODERS[v.text_encoder].template == template)


def length(clip, text: str) -> list[str]:
    """A warning for a prompt of which the model reads the beginning only, with the cut marked."""
    tokenizer = clip.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        return []
    most, count = tokenizer.prompts.config.text_length, tokenizer.count(text)
    if count <= most:
        return []
    said = f"The prompt has {count} tokens, the model reads {most}: its end is cut off."
    at = tokenizer.prompts.cut(text)
    if not at or at >= len(text):
        return [said]
    read, lost = text[max(0, at - 24) : at].rstrip(), text[at : at + 16].lstrip()
    return [f"{said} It is read up to here: ...{read} | {lost}..."]


def counted(clip, text: str) -> str:
    """How much of what the model can read a prompt takes, for one of our text encoders."""
    tokenizer = clip.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        return ""
    return f"{tokenizer.count(text)} of {tokenizer.prompts.config.text_length} tokens"
