"""Noise with a will: variations between two seeds, compositions that stay at every size."""

from . import host_sampling
from .sampling import SEED
from .schema import Schema, io


class Flux2KitNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitNoise",
            display_name="FLUX.2 Noise",
            category="FLUX.2/sampling",
            description="Noise for Sampler Custom Advanced: small variations of a seed, and a composition "
            "that stays when the size changes.",
            search_aliases=["random noise", "seed variation", "subseed", "slerp"],
            inputs=[
                io.Int.Input("seed", **SEED),
                io.Int.Input(
                    "variation_seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="The seed to move towards. Pictures of a batch have + 1, + 2 ... of both.",
                ),
                io.Float.Input(
                    "variation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How far: 0 is the seed itself, 1 the variation seed, 0.1 to 0.3 a sister of "
                    "the picture.",
                ),
                io.Boolean.Input(
                    "keep_composition",
                    default=False,
                    tooltip="The same seed gives the same layout at every size. Off: the usual noise.",
                ),
            ],
            outputs=[io.Noise.Output(tooltip="For Sampler Custom Advanced.")],
        )

    @classmethod
    def execute(cls, seed=0, variation_seed=0, variation=0.0, keep_composition=False):
        return io.NodeOutput(host_sampling.Noise(seed, variation_seed, variation, keep_composition))
