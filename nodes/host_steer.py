"""Controls on their way through the host: from a conditioning's `flux2_kit` to one forward."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import comfy.conds
import torch
import torch.nn.functional as F
from torch import Tensor

from ..flux2_core.errors import Flux2Error
from ..flux2_core.negatives import Negative
from ..flux2_core.references import active, on_grid
from ..flux2_core.schedule import share
from ..flux2_core.stream import Controls
from ..flux2_core.visibility import ReferenceControl, RegionPrompt
from .host_controls import CACHE, KV, STEPS


@dataclass(frozen=True, eq=False)
class HostControls(Controls):
    """Controls, and what the host hands over beside the tensors."""

    options: dict = field(default_factory=dict)
    control: dict | None = None
    method: str = "index"
    mask: Tensor | None = None

    @property
    def bend(self) -> tuple:
        """The host's rope options as sorted pairs."""
        return tuple(sorted((self.options.get("rope_options") or {}).items()))


def steer(
    options: dict, kit: dict | None, size: tuple[int, int], *, control, method: str, mask
) -> HostControls:
    """What the host says of one call -> Controls. `kit` is the conditioning's `flux2_kit`, `size`
    the picture's latent grid (h, w)."""
    controls = HostControls(
        kv_references=options.get(KV),
        still=method == "index_timestep_zero",
        options=options,
        control=control,
        method=method,
        mask=mask,
    )
    cache, earlier = options.get(CACHE), options.get(STEPS)
    if not kit and cache is None and earlier is None:
        return controls
    begun, step, steps = _progress(options)
    if cache is not None:
        cache.step = step
    if earlier is not None:
        earlier.step, earlier.steps = step, steps
    if cache is not None or earlier is not None:
        call = (tuple(options.get("uuids", ())), tuple(options.get("cond_or_uncond", ())))
        about = (method, controls.bend)
        controls = replace(controls, cache=cache, steps=earlier, about=about, call=call)
    if not kit:
        return controls
    if mask is not None:
        raise Flux2Error(
            "Controlled references cannot be combined with an attention mask",
            "another node set one",
            "Remove that node, or set the controls to their defaults",
        )
    entries = kit.get("references", ())
    regions = kit.get("regions", ())
    return replace(
        controls,
        references=tuple(_entry(entry, size, begun) for entry in entries),
        regions=tuple(
            RegionPrompt(r["context"], on_grid(r["region"], size), r["base"]) for r in regions
        ),
        isolate=bool(kit.get("isolate")),
        negative=_negative(kit.get("negative"), begun),
    )


def _entry(entry: dict, size: tuple[int, int], begun: float) -> ReferenceControl:
    region = entry.get("region")
    return ReferenceControl(
        entry.get("strength", 1.0),
        active(entry.get("start", 0.0), entry.get("end", 1.0), begun),
        entry.get("keep"),
        None if region is None else on_grid(region, size),
    )


def _negative(entry: dict | None, begun: float) -> Negative | None:
    if entry is None or not active(entry["start"], entry["end"], begun):
        return None
    return Negative(entry["context"], entry["scale"], entry["tau"], entry["alpha"])


def _progress(options: dict) -> tuple[float, int, int]:
    """The share of the run that lies behind, the step's number, and how many there are. Without a
    run: its start."""
    run, now = options.get("sample_sigmas"), options.get("sigmas")
    if run is None or now is None:
        return 0.0, 0, 0
    begun, steps = share(run, float(now.flatten()[0])), len(run) - 1
    return begun, round(begun * steps), steps


class Steering(comfy.conds.CONDRegular):
    """`flux2_kit` among the host's conditions: calls are joined only where all of it is equal."""

    @classmethod
    def of(cls, kit: dict, text_length: int) -> "Steering":
        """With the region prompts padded as the main prompt is, on the left."""
        regions = [
            {**r, "context": _padded(r["context"], text_length)} for r in kit.get("regions", ())
        ]
        negative = kit.get("negative")
        if negative:
            negative = {**negative, "context": _padded(negative["context"], text_length)}
        return cls({**kit, "regions": regions, "negative": negative})

    def process_cond(self, batch_size, **kwargs):
        return self

    def can_concat(self, other):
        return alike(self.cond, other.cond)

    def concat(self, others):
        return self.cond

    def size(self):
        return [1]


def _padded(text: Tensor, length: int) -> Tensor:
    return F.pad(text, (0, 0, max(0, length - text.shape[1]), 0))


def alike(a, b) -> bool:
    """Equal in every tensor and number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b.to(a.device)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and a == b


def check_batches(references: Sequence[Tensor] | None, noise: Tensor | None) -> None:
    """Raise where a reference has neither one picture nor one for each latent."""
    for i, latent in enumerate(references or ()):
        if noise is not None and len(latent) not in (1, len(noise)):
            raise Flux2Error(
                f"Reference {i + 1} holds {len(latent)} pictures",
                f"{len(noise)} {'picture is' if len(noise) == 1 else 'pictures are'} drawn",
                "Give it one picture, or as many as are drawn",
            )
