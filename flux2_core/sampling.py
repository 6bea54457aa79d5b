"""From noise to a picture's latent: a solver along the velocity field, whole or in parts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import Flux2Error
from .guidance import Velocity
from .solvers import History, get_solver

OnStep = Callable[[int, int, Tensor], None]  # step (from 0), steps, the picture as it looks now
StepNoise = Callable[[int], Tensor]  # step (from 0) -> standard normal noise, like x


class Advanced(NamedTuple):
    """Where a run stands: x and the solver's history before its next step, and the estimate of the
    finished picture that the model gave last (None where no step was taken)."""

    x: Tensor
    history: History
    estimate: Tensor | None


def denoise(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    solver: str = "euler",
    eta: float = 1.0,
    start: int = 0,
    stop: int | None = None,
    history: History = (),
    noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """x (B, 128, h, w) at sigmas[start] -> x at sigmas[stop]; by default the whole run.

    As `advance`; raises Flux2Error too where the result is not finite.
    """
    how = {"eta": eta, "history": history, "noise": noise, "on_step": on_step}
    return check_finite(advance(velocity, x, sigmas, solver, start, stop, **how).x)


def advance(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    solver: str = "euler",
    start: int = 0,
    stop: int | None = None,
    *,
    eta: float = 1.0,
    history: History = (),
    noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Advanced:
    """Take the steps `start` to `stop` (None: to the end) of a run over `sigmas`.

    Sums in float32, the model in whatever dtype it has. A run taken in parts, each with the history
    of the one before, is the run taken at once, bit for bit. `eta` and `noise` are read by
    stochastic solvers only. `on_step` sees x - sigma v, the estimate of the finished picture, before
    each step is taken; what it raises ends the run. Raises Flux2Error for an unknown solver, for a
    stochastic one without noise, and for steps that the run does not have.
    """
    chosen, steps = get_solver(solver), len(sigmas) - 1
    stop = steps if stop is None else stop
    check_steps(start, stop, steps)
    if chosen.stochastic and eta and noise is None:
        raise Flux2Error(
            f"The solver {solver} draws noise at every step",
            "no noise was given",
            "Give a function of the step, such as solvers.draw with the pictures' seeds",
        )
    run = _Run(velocity, steps, on_step)
    x = x.float()
    for i in range(start, stop):
        now, after = float(sigmas[i]), float(sigmas[i + 1])
        run.begin(i)
        fresh = None if noise is None else (lambda i=i: noise(i))
        x, history = chosen.step(run.field, x, now, after, history, fresh, eta)
    return Advanced(x, history, run.estimate)


class _Run:
    """The velocity as solvers call it; tells of the first place that each step looks at."""

    def __init__(self, velocity: Velocity, steps: int, on_step: OnStep | None):
        self.velocity, self.steps, self.on_step = velocity, steps, on_step
        self.step, self.told = 0, False
        self.estimate: Tensor | None = None

    def begin(self, step: int) -> None:
        self.step, self.told = step, False

    def field(self, x: Tensor, sigma: float) -> Tensor:
        t = torch.full((x.shape[0],), sigma, device=x.device)
        v = self.velocity(x, t).float()
        if not self.told:
            self.told, self.estimate = True, x - sigma * v
            if self.on_step is not None:
                self.on_step(self.step, self.steps, self.estimate)
        return v


def check_steps(start: int, stop: int, steps: int) -> None:
    """Raise unless 0 <= start <= stop <= steps."""
    if not 0 <= start <= stop <= steps:
        raise Flux2Error(
            "These steps are not part of the run",
            f"steps {start} to {stop} of {steps}",
            f"Begin at 0 or later, end at {steps} or earlier, and begin before the end",
        )


def check_finite(x: Tensor) -> Tensor:
    """x, unless it holds NaN or infinity: a black picture would be all that came of it."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise Flux2Error(
            "The model's numbers overflowed: the picture would be black",
            f"{bad} of {x.numel()} values of the latent are NaN or infinite",
            "Run the model in bf16 or fp32 rather than fp16, and try without LoRAs and patches",
        )
    return x
