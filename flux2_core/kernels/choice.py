"""Which form of a product of fp8 codes a layer uses on a card: by what `tune` found there.

Without measurements it is PLAIN: codes up to 448, the product, and what is added in passes of its own.
"""

from typing import NamedTuple

import torch

from . import gemm, tune
from .fused import measured
from .reference import E4M3_MAX


class Form(NamedTuple):
    """`fused`: gate, residual and LoRA in the product's own pass. `narrow`: activations up to
    `maximum` and weights re-based (`gemm.rebase`), whose sums fit into float16."""

    fused: bool = False
    narrow: bool = False
    maximum: float = E4M3_MAX


PLAIN = Form()


def form(
    device: torch.device, rows: int, columns: int, depth: int, add: bool, low: bool, rebased: bool
) -> Form:
    """For x (rows, depth) by (columns, depth)'; `add`: gate and residual follow; `low`: a LoRA too.
    `rebased`: the weight's codes are, or can be, divided by 16."""

    def worth(op: str, than: tune.Found | None = None) -> tune.Found | None:
        found = tune.found(op, device, rows, columns, depth)
        least = tune.WORTH * (than.speedup if than else 1)
        return found if found and found.speedup >= least else None

    for after in (True, False) if add else (False,):
        full = worth(measured(low and after, after, False))
        small = worth(measured(low and after, after, True), full) if rebased else None
        if small is not None and small.tile is not None:
            return Form(after, True, gemm.ACTIVATION_MAX[small.tile.k])
        if full is not None:
            return Form(after)
    return PLAIN


# PyTorch's compiler is to ask it while it traces, not to trace it: it reads a file.
form._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
