"""In which precision each layer of the transformer is stored and computed.

    auto               as the file has it; fp8 weights are multiplied in fp8 where the card can
    bf16               weights decoded at load, mathematics in bf16
    fp8                weights in fp8, a scale for each row; products in fp8 where the card can
    fp8 weights only   weights in fp8, products in bf16: half the memory, bf16's mathematics

Only the blocks' linear layers are ever changed. A list of `layer: precision` lines, with * for any
part of a name, makes exceptions.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Flux2Error
from .formats import Packed, encode
from .products import NATIVE
from .quantised import BLOCK_LINEARS, FP8_FORM, State

log = logging.getLogger(__name__)

AUTO, BF16, FP8, WEIGHTS = "auto", "bf16", "fp8", "fp8 weights only"
PRECISIONS = (AUTO, BF16, FP8, WEIGHTS)


def choices(names: Iterable[str], precision: str = AUTO, exceptions: str = "") -> dict[str, str]:
    """Block linears among `names` (without `.weight`) -> the precision of each. Later lines of
    `exceptions` win. Raises Flux2Error for an unknown precision, and for a line that fits no layer."""
    layers = [name for name in names if BLOCK_LINEARS.fullmatch(name)]
    found = dict.fromkeys(layers, _known(precision))
    for line in exceptions.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        pattern, colon, wanted = (part.strip() for part in line.partition(":"))
        fitting = [name for name in layers if fnmatchcase(name, pattern)]
        if not colon or not fitting:
            raise Flux2Error(
                "A line of the list of layers fits no layer"
                if colon
                else "This is no line of a list of layers",
                line[:80],
                f"Write one such as {layers[0] if layers else 'double_blocks.0.*'}: bf16; * stands "
                "for any part of a name",
            )
        found |= dict.fromkeys(fitting, _known(wanted))
    return found


def _known(precision: str) -> str:
    if precision not in PRECISIONS:
        raise Flux2Error(
            "There is no such precision", repr(precision)[:40], f"Use {', '.join(PRECISIONS)}"
        )
    return precision


def store(state: State, chosen: Mapping[str, str]) -> dict[str, Tensor | Packed]:
    """Weights as a file has them -> as they are to be stored, layer by layer."""
    out = dict(state)
    for layer, precision in chosen.items():
        key = f"{layer}.weight"
        weight = out.get(key)
        packed = isinstance(weight, Packed)
        if weight is None or precision == AUTO:
            continue
        if precision == BF16:
            out[key] = weight.decode(torch.bfloat16) if packed else weight
        elif not packed or weight.format != FP8_FORM:
            out[key] = encode(weight.decode() if packed else weight, FP8_FORM)
    return out


def compute(network: nn.Module, chosen: Mapping[str, str]) -> None:
    """Tell quantised layers which mathematics they were chosen for."""
    for layer, precision in chosen.items():
        module: Any = network.get_submodule(layer)
        if hasattr(module, "compute") and precision == WEIGHTS:
            module.compute = "weights"


# ------------------------------------------------------------------------------------------- the guard


@contextmanager
def without_codes(network: nn.Module) -> Iterator[None]:
    """Products of quantised layers in the activations' own dtype."""
    layers: list[Any] = [m for m in network.modules() if _multiplies_codes(m)]
    for layer in layers:
        layer.compute = "weights"
    try:
        yield
    finally:
        for layer in layers:
            layer.compute = "fp8"


def guarded(
    network: nn.Module, run: Callable[[], Tensor], forget: Callable[[], None] = lambda: None
) -> Tensor:
    """run(), a pass through `network`. If products of codes made NaN or infinity of it, the first layer
    that did is named in the log and the pass is repeated without them. `forget` empties
    caches that may hold what the first try left there."""
    out = run()
    if not any(map(_multiplies_codes, network.modules())) or bool(torch.isfinite(out).all()):
        return out
    forget()
    layer = first_overflow(network, run)
    forget()
    with without_codes(network):
        again = run()
    if bool(torch.isfinite(again).all()):
        log.warning(
            "The product of codes overflowed in %s: this step was repeated in %s. If it goes on, load "
            "the model with precision 'fp8 weights only', or list this layer as bf16.",
            layer or "a layer", str(out.dtype).removeprefix("torch."),
        )  # fmt: skip
    return again


def _multiplies_codes(layer: nn.Module) -> bool:
    return getattr(layer, "compute", "") == "fp8" and getattr(layer, "format", "") in NATIVE


def first_overflow(network: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """The first quantised layer whose product is not finite. Layers with a hook take plain numbers, so
    that what comes out is that of the layer alone."""
    found: list[str] = []

    def look(name: str):
        def hook(_, inputs, out: Tensor) -> None:
            if not found and not bool(torch.isfinite(out).all()):
                found.append(name)

        return hook

    hooks = [
        m.register_forward_hook(look(n.removeprefix("_orig_mod.")))  # of a compiled network
        for n, m in network.named_modules()
        if _multiplies_codes(m)
    ]
    try:
        with _uncompiled():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _uncompiled() -> Any:
    """Within it, what torch.compile has compiled runs as it stands: graphs do not see new hooks."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()  # nothing is compiled, or PyTorch is older than 2.6
    return torch.compiler.set_stance("force_eager")
