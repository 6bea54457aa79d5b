"""Who can compute attention besides PyTorch: libraries that are used where they are installed.

Nothing here is imported before attention is first computed on a GPU. What a library calls its
functions, and in which order it wants the axes, is said here and nowhere else; whether it may be
used, and where, `attention` finds out by running it.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, L, D) each -> (B, H, Q, D)
LseKernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # and (B, H, Q), float32


class Provider(NamedTuple):
    """`find` and `find_lse` import a kernel, or raise ImportError; `refuses` says why it is not
    even tried for a device and dtype. With `exact` products are those of the activations' own
    dtype; others have 8 bits or fewer, and are held to less."""

    name: str
    words: str
    find: Callable[[], Kernel]
    refuses: Callable[[torch.device, torch.dtype], str | None]
    find_lse: Callable[[], LseKernel] | None = None
    exact: bool = True


def nvidia(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "it needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not read {str(dtype).removeprefix('torch.')}"
    return None


def blackwell(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := nvidia(device, dtype):
        return reason
    old = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 10
    return "it needs a Blackwell GPU" if old else None


def function(*names: str) -> Callable[..., Any]:
    """The first of module.function that imports. Raises ImportError, which says why the last one
    does not; what is broken (a missing CUDA library, say) counts as not there."""
    why: Exception | None = None
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            absent = getattr(error, "name", None) == module.partition(".")[0]
            if why is None or not absent:
                why = error
    if isinstance(why, ModuleNotFoundError) and why.name in {n.partition(".")[0] for n in names}:
        raise ImportError("it is not installed")
    raise ImportError(f"it does not import: {type(why).__name__}: {why}")


# -------------------------------------------------------------------------------- flash-attn 2 and 3

FLASH = ("flash_attn_interface.flash_attn_func", "flash_attn.flash_attn_func")


def _turned(*tensors: Tensor) -> list[Tensor]:
    """(B, H, L, D) <-> (B, L, H, D)."""
    return [t.transpose(1, 2) for t in tensors]


def flash() -> Kernel:
    run = function(*FLASH)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = run(*_turned(q, k, v))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return kernel


def flash_lse() -> LseKernel:
    run = function(*FLASH)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        try:
            out, lse, *_ = run(*_turned(q, k, v), return_attn_probs=True)
        except TypeError:  # versions that always give both
            out, lse, *_ = run(*_turned(q, k, v))
        return out.transpose(1, 2), lse

    return kernel


# --------------------------------------------------------------------- SageAttention, comfy-kitchen


def sage() -> Kernel:
    run = function("sageattention.sageattn")
    return lambda q, k, v: run(q, k, v, tensor_layout="HND", is_causal=False)


def sage3() -> Kernel:
    run = function("sageattn3.sageattn3_blackwell")
    return lambda q, k, v: run(q, k, v, is_causal=False)


def kitchen() -> Kernel:
    here = function("comfy_kitchen.int8_attention_is_available")
    run = function("comfy_kitchen.int8_attention")
    if not here():
        raise ImportError("comfy-kitchen has no compiled int8 attention for this GPU")
    return run


# ----------------------------------------------------------------------------------- PyTorch's others


def _cudnn(q: Tensor, k: Tensor, v: Tensor, lse: bool):
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, lse)


def cudnn() -> Kernel:
    return lambda q, k, v: _cudnn(q, k, v, False)[0]


def cudnn_lse() -> LseKernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _cudnn(q, k, v, True)
        return out, lse.reshape(q.shape[:3])

    return kernel


def _refuses_cudnn(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := nvidia(device, dtype):
        return reason
    if torch.version.hip or not hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention"):
        return "this PyTorch has no attention by cuDNN"
    return None


PROVIDERS: tuple[Provider, ...] = (
    Provider("flash", "flash-attn", flash, nvidia, flash_lse),
    Provider("cudnn", "cuDNN's attention", cudnn, _refuses_cudnn, cudnn_lse),
    Provider("sage", "SageAttention", sage, nvidia, exact=False),
    Provider("sage3", "SageAttention 3", sage3, blackwell, exact=False),
    Provider("kitchen", "comfy-kitchen's int8 attention", kitchen, nvidia, exact=False),
)
