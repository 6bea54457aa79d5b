"""The step cache: most of the model left out in steps in which little changes."""

from ..flux2_core.errors import Flux2Error
from ..flux2_core.step_cache import StepCache
from . import host_steps
from .host_controls import is_ours
from .schema import Schema, io


def _inputs() -> list:
    return [
        io.Model.Input("model", tooltip="A model from FLUX.2 Loader or FLUX.2 Load Model."),
        io.Float.Input(
            "threshold",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            round=0.001,
            tooltip="How much the picture may change inside the model since it was computed last "
            "for the rest to be reused, as a share: more is faster and less like the picture "
            "without. 0 switches the cache off.",
        ),
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="From which share of the run on steps may be reused. 0.2 leaves the first "
            "fifth, in which the layout is decided, as it is. The first step is always computed.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Up to which share of the run steps may be reused. 0.8 leaves the last fifth, "
            "in which fine detail is made, as it is. The last step is always computed.",
        ),
        io.Int.Input(
            "in_a_row",
            default=3,
            min=1,
            max=100,
            tooltip="How many steps in a row may be reused before one is computed.",
        ),
    ]


class Flux2KitStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitStepCache",
            display_name="FLUX.2 Step Cache",
            category="FLUX.2/sampling",
            description="Leaves most of the model out in steps in which little changes: faster, "
            "with a small error that is measured. What it did stands on the node and in the log "
            "after each run.",
            search_aliases=[
                "first block cache",
                "teacache",
                "fbcache",
                "faster steps",
                "skip steps",
            ],
            inputs=_inputs(),
            outputs=[io.Model.Output(tooltip="The model with the cache, for the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, threshold=0.1, start=0.0, end=1.0, in_a_row=3):
        if not is_ours(model):
            raise Flux2Error(
                "This model cannot use the step cache",
                "a model from the host's own loader",
                "Load it with FLUX.2 Load Model or FLUX.2 Loader",
            )
        cache = StepCache(threshold, start=start, end=end, most=in_a_row)
        return io.NodeOutput(host_steps.with_steps(model, cache if threshold else None, cls.hidden))
