"""Windows on a MODEL: how it looks at pictures that are larger than one of them."""

from torch import Tensor

from ..flux2_core.errors import Flux2Error
from ..flux2_core.latents import PIXELS
from ..flux2_core.windows import Window, windows
from .host_controls import is_ours

WINDOWS = "flux2_kit_windows"  # of transformer_options: (side, overlap) in latent cells


def with_windows(model, side: int, overlap: int):
    """A MODEL that looks through windows of `side` pixels which share `overlap` pixels."""
    if not is_ours(model):
        raise Flux2Error(
            "This model cannot look through windows",
            "a model from the host's own loader",
            "Load it with FLUX.2 Load Model or FLUX.2 Loader",
        )
    cells = side // PIXELS, overlap // PIXELS
    windows(1, 1, *cells)  # raises for impossible values
    out = model.clone()
    out.model_options["transformer_options"][WINDOWS] = cells
    return out


def windows_of(options: dict | None, x: Tensor, controls) -> tuple[list[Window], int] | None:
    """The windows of this pass and their overlap; None where one is enough."""
    if not (wanted := (options or {}).get(WINDOWS)):
        return None
    every = windows(x.shape[-2], x.shape[-1], *wanted)
    if len(every) == 1:
        return None
    if controls.control or controls.mask is not None:
        raise Flux2Error(
            "Windows cannot be combined with ControlNet or an attention mask",
            f"a picture of {x.shape[-1] * PIXELS} x {x.shape[-2] * PIXELS} in {len(every)} windows",
            "Remove FLUX.2 Windows, or what brings the control",
        )
    return every, wanted[1]
