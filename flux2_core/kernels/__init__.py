"""Operations around fp8 matrix products: defined in plain PyTorch, served by whatever is fastest.

    codes, scale = kernels.modulate_quantize(x, shift, scale)
    y = kernels.fp8_linear(codes, scale, weight, weight_scale)

`reference` says what each operation means. `status()` lists what serves it here and why not
something faster; `use("reference")` and the environment's FLUX2_KERNELS choose. Importing this
needs neither a GPU nor Triton.
"""

from . import decode, eager, ops, producers, replicated, scaled  # noqa: F401 (they register what they compute)
from .block_codes import modulate_quantize_blocks, quantize_blocks, swiglu_quantize_blocks
from .blocks import int8_linear, mxfp8_linear, nvfp4_linear
from .fused import fp8_linear_fused
from .ops import (
    fp8_linear,
    fp8_weight_linear,
    gated_modulate_quantize,
    modulate_quantize,
    qk_norm_rope,
    quantize_rows,
    requantize,
    swiglu_quantize,
)
from .passes import gated_add, gated_modulate, modulate, swiglu
from .table import Case, register, status, use

__all__ = [
    "Case",
    "fp8_linear",
    "fp8_linear_fused",
    "fp8_weight_linear",
    "gated_add",
    "gated_modulate",
    "gated_modulate_quantize",
    "int8_linear",
    "modulate",
    "modulate_quantize",
    "modulate_quantize_blocks",
    "mxfp8_linear",
    "nvfp4_linear",
    "qk_norm_rope",
    "quantize_blocks",
    "quantize_rows",
    "register",
    "requantize",
    "status",
    "swiglu",
    "swiglu_quantize",
    "swiglu_quantize_blocks",
    "use",
]
