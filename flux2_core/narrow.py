"""fp8 weights re-based for products that sum in float16: codes / 16, their scale times 16.

The pair stands for the file's numbers but for codes below 2^-2 of a row whose largest is 448, which
it rounds to 2^-5 of them: whoever reads codes and scale alone is off by 4e-5 of the largest at most.
What was rounded is kept beside it, so that `original` gives back the file's own tensors bit for bit.
A layer is re-based once, at its first use on a card where `kernels.tune` found the product worth it;
new tensors take the place of the old ones, and wander between devices as those did.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from .formats import Packed
from .kernels import gemm

log = logging.getLogger(__name__)

MOST = 0.02  # of a weight may be kept beside it: usual ones need 0.1 to 0.4 %, in 5 bytes each
PLACES, CODES, SCALE = PARTS = ("narrow_places", "narrow_codes", "narrow_scale")


def is_rebased(packed: Packed) -> bool:
    return PLACES in packed.parts


def rebased(packed: Packed) -> Packed:
    """An e4m3 matrix -> the same with codes / 16, in memory of its own."""
    with torch.inference_mode(False):
        parts = dict(packed.parts)
        codes = parts["weight"].clone(memory_format=torch.contiguous_format)
        record = gemm.rebase(codes)
        scale = parts.get("weight_scale")
        one = torch.ones((), device=codes.device) if scale is None else scale.float()
        parts |= {"weight": codes, "weight_scale": one * gemm.REBASE}
        parts |= {PLACES: record.places.int(), CODES: record.codes}  # no layer has 2^31 numbers
        return Packed(
            packed.format, packed.shape, parts if scale is None else parts | {SCALE: scale}
        )


def original(packed: Packed) -> Packed:
    """What `rebased` was given, bit for bit; of anything else itself."""
    if not is_rebased(packed):
        return packed
    parts = dict(packed.parts)
    codes = parts["weight"].clone()
    places, lost = (parts[name].to(codes.device) for name in (PLACES, CODES))
    gemm.restore(codes, gemm.Rebased(places.long(), lost))
    own: dict[str, Tensor | None] = {"weight": codes, "weight_scale": parts.get(SCALE)}
    whole = {name: own.get(name, part) for name, part in parts.items() if name not in PARTS}
    kept = {name: part for name, part in whole.items() if part is not None}
    return Packed(packed.format, packed.shape, kept)


def ready(layer: Any, x: Tensor) -> bool:
    """True where a layer's codes are re-based: from now on, if they lie where x does."""
    held = layer.held
    if is_rebased(held):
        return True
    if getattr(layer, "merged", None) is not None:
        return False  # codes that a host's patch was worked into, until it takes them out again
    busy = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if busy or not layer.rebases or held.parts["weight"].device != x.device:
        return False
    try:
        made = rebased(held)
    except torch.cuda.OutOfMemoryError:
        layer.rebases = False
        log.warning("No memory to re-base an fp8 layer: it is multiplied in float32 sums instead")
        return False
    if made.parts[PLACES].numel() > MOST * made.parts["weight"].numel():
        layer.rebases = False  # one scale for numbers too far apart
        return False
    layer.hold(made)
    return True
