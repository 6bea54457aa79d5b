"""Controls on their way through the host: what a conditioning carries beside the host's own keys,
and which MODEL can read it.

Beside `reference_latents` stands flux2_kit = {"version", "references", "regions", "isolate",
"negative"}. Its references are parallel to the latents. Where nothing differs from stock the key is absent, and the
conditioning is the host's own.
"""

from collections.abc import Sequence

from torch import Tensor

from ..flux2_core.configs import TransformerConfig
from ..flux2_core.errors import Flux2Error
from ..flux2_core.references import MOST, Reference, keep, plan

KIT, CACHE, KV = "flux2_kit", "flux2_kit_cache", "flux2_kit_kv"
STEPS = "flux2_kit_steps"
VERSION = 1
EMPTY = {
    "version": VERSION,
    "references": [],
    "regions": [],
    "isolate": False,
    "negative": None,
}
STOCK = {"strength": 1.0, "start": 0.0, "end": 1.0, "keep": None, "region": None, "name": ""}


def entries(chain: Sequence[Reference]) -> list[dict]:
    """What is wanted of each reference, for the conditioning; maps that change nothing are None."""
    out = []
    for reference, fit in zip(chain, plan(chain), strict=True):
        patches, region = keep(reference, fit), reference.region
        maps = {
            "keep": None if patches is None or bool(patches.all()) else patches,
            "region": None if region is None or bool((region >= 1).all()) else region,
        }
        plain = {name: getattr(reference, name) for name in STOCK if name not in maps}
        out.append({**plain, **maps})
    return out


def kit_of(options: dict) -> dict:
    """The controls of one entry of a CONDITIONING, its references as many as the latents.

    Raises Flux2Error where another node has changed the latents under them.
    """
    kit = EMPTY | (options.get(KIT) or {})
    if kit["version"] != VERSION:
        raise Flux2Error(
            "These controls come from another version of the FLUX.2 nodes",
            f"version {kit['version']}, this one reads {VERSION}",
            "Make the conditioning anew, or update the nodes",
        )
    latents, entries = len(options.get("reference_latents") or ()), list(kit["references"])
    if len(entries) > latents:
        raise Flux2Error(
            "A node between has taken references away from their controls",
            f"controls for {len(entries)} references, {latents} reference latents",
            "Put FLUX.2 Apply References after it",
        )
    return kit | {"references": entries + [STOCK] * (latents - len(entries))}


def with_kit(options: dict, kit: dict) -> dict:
    """The options with these controls, or without the key where all of them are stock."""
    plain = {key: value for key, value in options.items() if key != KIT}
    steered = any(e | {"name": ""} != STOCK for e in map(_comparable, kit["references"]))
    return plain | ({KIT: kit} if steered or kit["regions"] or kit["negative"] else {})


def _comparable(entry: dict) -> dict:
    """A tensor compares elementwise: here any map is simply a difference from None."""
    return {key: True if isinstance(value, Tensor) else value for key, value in entry.items()}


def with_references(conditioning, latents: list, entries: list[dict]):
    """The conditioning with these references after those that it has; None stays None."""
    if conditioning is None or not latents:
        return conditioning
    out = []
    for text, options in conditioning:
        kit = kit_of(options)
        every = [*(options.get("reference_latents") or ()), *latents]
        if len(every) > MOST:
            raise Flux2Error(
                f"FLUX.2 takes at most {MOST} reference images",
                f"{len(every)}, with those that another node added",
                f"Remove {len(every) - MOST}",
            )
        kit = kit | {"references": kit["references"] + entries}
        out.append([text, with_kit(options | {"reference_latents": every}, kit)])
    return out


def with_region(conditioning, region: dict, isolate: bool):
    """The conditioning with one more region; `isolate`, once asked for, holds for all of them."""
    out = []
    for text, options in conditioning:
        kit = kit_of(options)
        both = {"regions": [*kit["regions"], region], "isolate": kit["isolate"] or isolate}
        out.append([text, with_kit(options, kit | both)])
    return out


def with_negative(conditioning, negative: dict):
    """The conditioning that steers away from a text: {"context", "scale", "tau", "alpha", "start",
    "end"}. One that it had before is replaced."""
    return [
        [text, with_kit(options, kit_of(options) | {"negative": negative})]
        for text, options in conditioning
    ]


def is_ours(model) -> bool:
    """True for a MODEL of this pack, False for the host's own."""
    return isinstance(getattr(model.model, "config", None), TransformerConfig)


def check_host_model(model, positive, negative=None) -> None:
    """Raise where controls would be lost: only the MODEL of this pack reads them."""
    if is_ours(model):
        return
    carries = any(KIT in options for _, options in [*positive, *(negative or ())])
    if carries or CACHE in model.model_options.get("transformer_options", {}):
        what = "controls of references, regions or a negative" if carries else "a reference cache"
        raise Flux2Error(
            "This model cannot read the controls of FLUX.2 references and regions",
            f"{what}, and a model from the host's own loader",
            "Load it with FLUX.2 Load Model or FLUX.2 Loader",
        )
