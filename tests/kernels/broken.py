"""Kernels that must not pass the compile gate, one for each way to fail."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flux2_pack.flux2_core.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel
def slow_division(x_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    """`/` compiles to an approximate division; `tl.div_rn` is the exact one."""
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place).to(tl.float32) / scale)


@kernel
def narrow_loads(x_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    """Every second element."""
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + 2 * place).to(tl.float32) * scale)


@kernel
def hopper_in_half_precision(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    """On Hopper `max_num_imprecise_acc=0` turns an fp8 product into a float16 one, silently."""
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i[:, None] * BLOCK + k[None, :])
    b = tl.load(b_ptr + i[None, :] * BLOCK + k[:, None])
    acc = tl.dot(a, b, max_num_imprecise_acc=0)
    tl.store(out_ptr + i[:, None] * BLOCK + k[None, :], acc)


def __getattr__(name: str):
    if name == "ends_the_compiler":
        os.abort()
    raise AttributeError(name)
