"""The reference cache: references computed once, not in every step."""

import logging

from ..flux2_core.configs import NANO, NANO_GUIDED
from ..flux2_core.errors import Flux2Error
from ..flux2_core.kv_cache import ReferenceCache
from . import host_cache
from .host import config_of
from .host_controls import is_ours
from .schema import Schema, io

AUTO, OFF, EXACT, APPROXIMATE = MODES = ["auto", "off", "exact", "approximate"]
STORES = {"model precision": "model", "fp8": "fp8"}
PLACES = {"device": "device", "host memory": "host"}
log = logging.getLogger(__name__)


def _inputs() -> list:
    return [
        io.Model.Input("model", tooltip="A model from FLUX.2 Loader or FLUX.2 Load Model."),
        io.Combo.Input(
            "mode",
            options=MODES,
            default=AUTO,
            tooltip="exact: computed once a run, the picture stays the same; only for weights in "
            "the KV form (klein 9B-KV). approximate: for all others, with a small error. auto: "
            "exact where that is possible, else off. off: computed in every step.",
        ),
        io.Boolean.Input(
            "kv_form",
            default=False,
            tooltip="Run the model in the KV form, in which references do not look at the rest. "
            "Klein 9B-KV always does; nano can do both, and draws a slightly different picture. "
            "Others were not trained for it.",
        ),
        io.Int.Input(
            "interval",
            default=4,
            min=1,
            max=100,
            tooltip="approximate: after how many steps references are computed anew. More is "
            "faster and less like the picture without a cache; 1 keeps nothing.",
        ),
        io.Int.Input(
            "guard",
            default=1,
            min=0,
            max=100,
            tooltip="approximate: how many first steps always compute the references. The layout "
            "is decided there.",
        ),
        io.Combo.Input(
            "store",
            options=list(STORES),
            default="model precision",
            tooltip="In which form they are kept. fp8 takes half the memory of bf16, with a small "
            "error, also in the exact mode.",
        ),
        io.Combo.Input(
            "place",
            options=list(PLACES),
            default="device",
            tooltip="Where they are kept. Host memory leaves the graphics card's memory free; "
            "they are copied over a little ahead of their use.",
        ),
        io.Boolean.Input(
            "keep",
            default=False,
            tooltip="exact: keep them after the run too, so that the next run with the same "
            "references and weights does not compute them at all. Their memory stays taken.",
        ),
    ]


class Flux2KitReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitReferenceCache",
            display_name="FLUX.2 Reference Cache",
            category="FLUX.2/references",
            description="Computes references once and not in every step: faster, the more so the "
            "more references there are. What it did is in the log after each run.",
            search_aliases=["kv cache", "flux kv cache", "reference kv", "faster references"],
            inputs=_inputs(),
            outputs=[io.Model.Output(tooltip="The model with the cache, for the sampler.")],
        )

    @classmethod
    def execute(
        cls, model, mode=AUTO, kv_form=False, interval=4, guard=1, store="model precision",
        place="device", keep=False,
    ):  # fmt: skip
        kv = in_kv_form(model, kv_form)
        mode, cache = decide(mode, kv), None
        if mode != OFF:
            how = {"interval": interval, "guard": guard}
            cache = ReferenceCache(mode, store=STORES[store], place=PLACES[place], **how)
        return io.NodeOutput(host_cache.with_cache(model, cache, kv=kv, keep=keep))


def in_kv_form(model, wanted: bool) -> bool:
    """Whether the model is to run in the KV form. Raises Flux2Error for one that cannot."""
    if not is_ours(model):
        raise Flux2Error(
            "This model cannot use the reference cache",
            "a model from the host's own loader",
            "Load it with FLUX.2 Load Model or FLUX.2 Loader",
        )
    config = config_of(model)
    if wanted and not config.kv_references and config not in (NANO, NANO_GUIDED):
        raise Flux2Error(
            "This model was not trained in the KV form",
            "kv_form on",
            "Switch kv_form off; for klein 9B-KV choose its name as variant in FLUX.2 Load Model",
        )
    return wanted or config.kv_references


def decide(mode: str, kv: bool) -> str:
    """exact, approximate or off. Raises Flux2Error for exact without the KV form."""
    if mode == EXACT and not kv:
        raise Flux2Error(
            "An exact reference cache needs a model in the KV form",
            "a model whose references look at the rest of the picture",
            "Choose approximate or auto, load klein 9B-KV, or with nano switch kv_form on",
        )
    if mode == AUTO and not kv:
        log.info("Reference cache: off, because this model's weights are not in the KV form.")
    return (EXACT if kv else OFF) if mode == AUTO else mode
