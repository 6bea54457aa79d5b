"""Our solvers as the host's SAMPLER, and runs that stop between two steps.

The host scales latents before and after a run, which cannot be undone in floating point: a paused run
keeps what the solver held, in the model's own space.
"""

import logging
from hashlib import sha256

import comfy.samplers
import comfy.utils
from torch import Tensor

from ..flux2_core.errors import Flux2Error
from ..flux2_core.paused import ModelPrint, PausedState, fingerprint
from ..flux2_core.sampling import Advanced, advance, check_finite
from ..flux2_core.solvers import draw, get_solver
from . import host_sampling
from .host import config_of, variant_of
from .host_preview import progress

log = logging.getLogger(__name__)


class Solver(comfy.samplers.KSAMPLER):
    """One of our solvers. `seeds`: of its own noise, one a picture; None: the run's and those after.

    `begin` says where a run starts, x -> (x, step, last step, history); `keep` is told where it ended.
    """

    def __init__(self, solver: str = "euler", eta: float = 1.0, seeds=None, begin=None, keep=None):
        super().__init__(self.run)
        self.solver, self.eta, self.seeds = get_solver(solver).name, eta, seeds
        self.begin, self.keep = begin, keep

    def run(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        args, seed = extra_args or {}, (extra_args or {}).get("seed") or 0
        x, start, stop, history = self.begin(x) if self.begin else (x, 0, None, ())
        seeds = self.seeds or [seed + i for i in range(len(x))]
        seen: dict = {}

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            seen["x"], seen["x0"] = x, model(x, t, **args)
            return (x - seen["x0"]) / t[:, None, None, None]

        def told(step: int, _, __) -> None:
            if callback is not None:
                callback({"i": step, "denoised": seen["x0"], "x": seen["x"]})

        made = advance(
            velocity, x, sigmas, self.solver, start, stop,
            eta=self.eta, history=history, noise=lambda i: draw(seeds, i, x), on_step=told,
        )  # fmt: skip
        if self.keep is None:
            return made.x
        self.keep(made)
        return made.x if made.estimate is None else made.estimate


def for_latent(solver: str, eta: float, seed: int, latent: dict) -> Solver:
    """A solver whose own noise follows the numbers of a batch's pictures."""
    index = latent.get("batch_index")
    return Solver(solver, eta, [seed + i for i in index] if index else None)


def solver_of(sampler) -> tuple[str, float]:
    """Solver and eta of a SAMPLER; none is Euler. Raises Flux2Error for one of the host's, whose
    inside cannot be stopped and taken up again."""
    if sampler is None:
        return "euler", 1.0
    if isinstance(sampler, Solver):
        return sampler.solver, sampler.eta
    name = getattr(
        getattr(sampler, "sampler_function", None), "__name__", "a sampler of another node"
    )
    if name == "sample_euler" and not getattr(sampler, "extra_options", None):
        return "euler", 1.0
    raise Flux2Error(
        "This sampler cannot be paused",
        name.removeprefix("sample_"),
        "Use FLUX.2 Solver, or leave sampler empty for Euler",
    )


def begin(guider, sigmas: Tensor, latent: dict, seed: int, sampler=None) -> PausedState:
    """A run that has not taken a step: its x is the noise itself, which the host mixes with the latent
    when the first one is taken."""
    solver, eta = solver_of(sampler)
    start = host_sampling.empty_for(guider.model_patcher, latent).float().cpu()
    numbers = latent.get("batch_index") or range(len(start))
    noise = host_sampling.noise(seed, start, latent.get("batch_index"))
    mask = latent.get("noise_mask")
    return PausedState(
        noise, start, noise, start, sigmas.float().cpu(), 0, tuple(seed + i for i in numbers),
        model_of(guider), solver, eta,
        mask=None if mask is None else mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu(),
        conditions=conditions_of(guider),
        extras={k: v for k, v in latent.items() if k != "samples" and "downscale_ratio" not in k},
    )  # fmt: skip


def go_on(guider, state: PausedState, stop: int) -> PausedState:
    """Take the steps up to `stop`. The guider sees the whole run's sigmas throughout: ranges of steps,
    caches and guidance over time are where they would be in a run without a pause."""
    state.check_model(model_of(guider))
    ended: list[Advanced] = []

    def enter(x: Tensor):
        known = x if state.x is state.noise else state.x.to(x)
        return known, state.step, stop, tuple((s, v.to(x)) for s, v in state.history)

    guider.run(
        state.noise,
        state.latent,
        Solver(state.solver, state.eta, list(state.seeds), enter, ended.append),
        state.sigmas,
        denoise_mask=state.mask,
        callback=progress(guider.model_patcher, state.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=state.seeds[0],
    )
    made = ended[0]
    check_finite(made.x)
    kept = Advanced(
        made.x.cpu(),
        tuple((s, v.cpu()) for s, v in made.history),
        None if made.estimate is None else made.estimate.cpu(),
    )
    return state.advanced(kept, stop)


def continued(state: PausedState, guider, sampler, strength: float) -> PausedState:
    """The run for the rest: by another solver or under other conditions, or from further back."""
    solver, eta = (state.solver, state.eta) if sampler is None else solver_of(sampler)
    rest = state.under(solver, eta, conditions_of(guider))
    if state.history and not rest.history:
        log.info("The rest is drawn otherwise: what %s remembers is dropped.", state.solver)
    return rest.rewound(strength)


def picture(guider, state: PausedState) -> dict:
    """The LATENT of a run: where it is done, as the host's samplers give it, else the estimate."""
    model, x = guider.model_patcher.model, state.estimate
    if state.step == state.steps:
        x = model.model_sampling.inverse_noise_scaling(state.sigmas[-1], state.x)
    return {**state.extras, "samples": model.process_latent_out(x)}


def model_of(guider) -> ModelPrint:
    model = guider.model_patcher
    width = config_of(model).hidden_size
    return ModelPrint(variant_of(model).name, width, fingerprint(model.model.diffusion_model))


def conditions_of(guider) -> str:
    """A digest of prompts, references, controls and guidance."""
    digest = sha256()
    _feed(digest, guider.original_conds)
    _feed(
        digest, [guider.cfg, repr(getattr(guider, "course", None)), getattr(guider, "rescale", 0)]
    )
    return digest.hexdigest()[:16]


def _feed(digest, value) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(map(str, value)):
            if key not in ("uuid", "model_conds"):
                digest.update(key.encode())
                _feed(digest, value.get(key))
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _feed(digest, one)
    elif isinstance(value, (str, int, float, bool)) or value is None:
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__name__.encode())
