"""The solver: how the path from noise to picture is followed."""

from ..flux2_core.solvers import SOLVERS
from . import host_run
from .schema import Schema, io

SOLVER = {
    "options": list(SOLVERS),
    "default": "euler",
    "tooltip": "euler: the stock one. unipc: third order, the closest with few steps. dpmpp_2m: second "
    "order. heun: second order, calls the model twice a step. sde: with fresh noise at every step.",
}
ETA = {
    "default": 1.0,
    "min": 0.0,
    "max": 1.0,
    "step": 0.05,
    "tooltip": "sde only: how much noise is drawn anew. 0 is euler.",
}


class Flux2KitSolver(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitSolver",
            display_name="FLUX.2 Solver",
            category="FLUX.2/sampling",
            description="A solver for Sampler Custom Advanced, FLUX.2 Preview and FLUX.2 Continue.",
            search_aliases=["ksampler select", "sampler", "unipc", "dpmpp", "heun"],
            inputs=[io.Combo.Input("solver", **SOLVER), io.Float.Input("eta", **ETA)],
            outputs=[io.Sampler.Output(tooltip="For a sampler node.")],
        )

    @classmethod
    def execute(cls, solver="euler", eta=1.0):
        return io.NodeOutput(host_run.Solver(solver, eta))
