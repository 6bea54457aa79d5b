"""A run stopped between two steps: everything that its rest needs, and a file for it.

x is kept in the model's own space, as the solver left it: hosts scale latents on the way out, which
cannot be undone in floating point. A file is untrusted: it is checked in full before it is used.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import Flux2Error
from .files import read_header
from .latents import CHANNELS
from .sampling import Advanced
from .solvers import SOLVERS, History, draw

KEY, VERSION = "flux2_kit_state", 1
MOST_STEPS = 1000
PICTURES = ("x", "estimate", "noise", "latent")  # tensors that are all of one shape
AGAIN = "Save the run again with FLUX.2 Save State"


class ModelPrint(NamedTuple):
    """Which model a run belongs to. `fingerprint` is of its norms: they are the same in every format
    of the weights, and LoRAs leave them alone."""

    variant: str
    width: int
    fingerprint: str


@dataclass(frozen=True, eq=False)
class PausedState:
    """A run over `sigmas` (n + 1,) that has taken `step` of its n steps.

    Pictures are float32 (B, 128, h, w) on the CPU: `x`, in model space at sigmas[step]; `estimate`,
    the finished picture as the last step's model call saw it; `noise` and `latent`, what the run
    began with, which a `mask` (1 or B, 1, h, w) of the places to draw still needs. `seeds`: one a
    picture, of the solver's noise. `conditions`: a digest of prompt, references and guidance, "" if
    unknown; a history made under others is not worth keeping. `extras`: what else a host's latent
    carries; a file does not keep it.
    """

    x: Tensor
    estimate: Tensor
    noise: Tensor
    latent: Tensor
    sigmas: Tensor
    step: int
    seeds: tuple[int, ...]
    model: ModelPrint
    solver: str = "euler"
    eta: float = 1.0
    history: History = ()
    mask: Tensor | None = None
    conditions: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def advanced(self, by: Advanced, step: int) -> "PausedState":
        """The same run, further on."""
        estimate = self.estimate if by.estimate is None else by.estimate
        return replace(self, x=by.x, history=by.history, estimate=estimate, step=step)

    def check_model(self, model: ModelPrint) -> None:
        """Raise unless the rest is to be drawn by the model that began."""
        if model.width != self.model.width:
            seen = f"it is {self.model.width} wide, this one {model.width}"
        elif model.variant != self.model.variant:
            seen = f"it was {self.model.variant or 'unknown'}, this one is {model.variant or 'unknown'}"
        elif model.fingerprint != self.model.fingerprint:
            seen = "its weights are others"
        else:
            return
        raise Flux2Error(
            "Another model began this run",
            seen,
            "Continue with the model of FLUX.2 Preview; a LoRA may come or go",
        )

    def under(self, solver: str, eta: float, conditions: str) -> "PausedState":
        """The rest by this solver, under these conditions. What the solver remembers goes where it
        would mislead: another solver reads it otherwise, other prompts have other velocities."""
        known = self.conditions and conditions
        same = solver == self.solver and (not known or conditions == self.conditions)
        history = self.history if same else ()
        return replace(self, solver=solver, eta=eta, conditions=conditions, history=history)

    def rewound(self, strength: float) -> "PausedState":
        """Back by a share of the steps taken, with fresh noise: 0 is the state itself, 1 the run's
        start, where nothing of the picture is left.

        From sigma to sigma' > sigma as the forward process goes: x' = a x + b z with
        a = (1 - sigma') / (1 - sigma) and a^2 sigma^2 + b^2 = sigma'^2.
        """
        if not 0 <= strength <= 1:
            raise Flux2Error(
                "Strength is the share of the steps taken that are drawn again",
                f"{strength:g}",
                "Set it between 0 (none) and 1 (all of them)",
            )
        back = self.step - round(strength * self.step)
        if back == self.step:
            return self
        now, then = float(self.sigmas[self.step]), float(self.sigmas[back])
        keep = (1 - then) / (1 - now) if now < 1 else 1.0
        fresh = max(0.0, then * then - keep * keep * now * now) ** 0.5
        noise = draw(self.seeds, -1 - back, self.x)
        return replace(self, x=keep * self.x + fresh * noise, step=back, history=())

    def save(self, path: str | Path) -> None:
        """A safetensors file: the tensors, and the rest as JSON in its metadata. It is complete or
        not there at all."""
        path = Path(path)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self._tensors().items()}
        about: dict[str, Any] = {
            "version": VERSION,
            "step": self.step,
            "seeds": list(self.seeds),
            "model": list(self.model),
            "solver": self.solver,
            "eta": self.eta,
            "history": [sigma for sigma, _ in self.history],
            "conditions": self.conditions,
        }
        about["digest"] = _digest(about, tensors)
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part, {KEY: json.dumps(about)})
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise Flux2Error(
                "The run could not be saved", f"{path.name}: {error}", "Free some space on the disk"
            ) from error

    def _tensors(self) -> dict[str, Tensor]:
        out = {name: getattr(self, name) for name in (*PICTURES, "sigmas")}
        if self.mask is not None:
            out["mask"] = self.mask
        # A file holds each tensor once: those that share memory are copied.
        return {n: t.clone() for n, t in out.items()} | {
            f"history.{i}": seen.clone() for i, (_, seen) in enumerate(self.history)
        }

    @classmethod
    def load(cls, path: str | Path) -> "PausedState":
        """Raises Flux2Error for a file that is no paused run, or not as it was saved."""
        path = Path(path)
        header = read_header(path)
        if KEY not in header.metadata:
            raise Flux2Error(
                f"{path.name} is no paused run", "a safetensors file of another kind", AGAIN
            )
        if {entry.dtype for entry in header.tensors.values()} != {"F32"}:
            raise _damaged(path, "numbers of another kind")
        try:
            about = json.loads(header.metadata[KEY])
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in header.tensors}
            version = about.get("version")
            if version == VERSION:
                digest = about.pop("digest")
                if digest != _digest(about, tensors):
                    raise _damaged(path, "its content is not what was saved")
                return _checked(cls._of(about, tensors))
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, Flux2Error):
                raise
            raise _damaged(path, "its description cannot be read") from error
        except (OSError, RecursionError, OverflowError) as error:
            raise _damaged(path, "it cannot be read") from error
        raise Flux2Error(
            f"{path.name} was saved by another version of the FLUX.2 nodes",
            f"version {str(version)[:20]}, this one reads {VERSION}",
            AGAIN,
        )

    @classmethod
    def _of(cls, about: dict[str, Any], tensors: dict[str, Any]) -> "PausedState":
        seen = enumerate(about.pop("history"))
        history = tuple((float(sigma), tensors.pop(f"history.{i}")) for i, sigma in seen)
        model, seeds = ModelPrint(*about.pop("model")), tuple(about.pop("seeds"))
        about.pop("version")
        known = {part.name for part in fields(cls)} - {"extras"}
        if not known.issuperset(about) or not known.issuperset(tensors):
            raise ValueError("unknown parts")
        return cls(**about, **tensors, model=model, seeds=seeds, history=history)


def fingerprint(network: nn.Module) -> str:
    """Of the scales of a transformer's norms, as bfloat16: equal for all formats of one model."""
    norms = {
        name.rpartition(".")[0]: p
        for name, p in network.named_parameters()
        if name.endswith(("_norm.scale", "_norm.weight"))
    }
    digest = sha256()
    for name in sorted(norms):
        digest.update(name.encode())
        digest.update(_bytes(norms[name].detach().to(torch.bfloat16)))
    return digest.hexdigest()[:16]


def _digest(about: dict, tensors: dict[str, Tensor]) -> str:
    digest = sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _checked(state: PausedState) -> PausedState:
    """The state, if its parts fit together. Raises Flux2Error."""
    shape, n = tuple(state.x.shape), len(state.sigmas) - 1
    numbers = (state.step, *state.seeds)
    pictures = [getattr(state, name) for name in PICTURES] + [seen for _, seen in state.history]
    if state.sigmas.ndim != 1 or not 1 <= n <= MOST_STEPS:
        raise _contradicts(f"{n} steps")
    if any(type(number) is not int for number in numbers) or not 0 <= state.step <= n:
        raise _contradicts(f"step {str(state.step)[:20]} of {n}")
    if not _falls([*map(float, state.sigmas)]):
        raise _contradicts("sigmas that do not fall from 1 or less to 0 or more")
    if len(shape) != 4 or shape[1] != CHANNELS or 0 in shape or len(state.seeds) != shape[0]:
        raise _contradicts(f"a picture of shape {shape}, {len(state.seeds)} seeds")
    if any(tuple(picture.shape) != shape for picture in pictures):
        raise _contradicts("pictures of several sizes")
    if state.mask is not None and not _mask_fits(state.mask, shape):
        raise _contradicts(f"a mask of shape {tuple(state.mask.shape)} for pictures of {shape}")
    if state.solver not in SOLVERS or not 0 <= state.eta <= 1:
        raise _contradicts(f"solver {str(state.solver)[:20]}, eta {str(state.eta)[:20]}")
    seen = [sigma for sigma, _ in state.history]
    taken = {float(sigma) for sigma in state.sigmas[: state.step]}
    if len(seen) > 4 or not taken.issuperset(seen) or not _falls([*reversed(seen)]):
        raise _contradicts("a history that does not belong to its steps")
    return state


def _falls(sigmas: Sequence[float]) -> bool:
    return all(0 <= s <= 1 for s in sigmas) and all(b <= a for a, b in pairwise(sigmas))


def _mask_fits(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.ndim == 4 and mask.shape[0] in (1, shape[0]) and 0 not in mask.shape


def _contradicts(seen: str) -> Flux2Error:
    return Flux2Error("This paused run contradicts itself", seen, AGAIN)


def _damaged(path: Path, seen: str) -> Flux2Error:
    return Flux2Error(f"{path.name} is damaged", seen, AGAIN)
