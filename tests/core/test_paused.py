"""Paused runs: the rest of a run is the rest of the whole run, in memory, from a file, elsewhere."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_pack.flux2_core import latents, paused, schedule
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import velocity
from flux2_pack.flux2_core.paused import ModelPrint, PausedState, fingerprint
from flux2_pack.flux2_core.references import active
from flux2_pack.flux2_core.sampling import advance, denoise
from flux2_pack.flux2_core.solvers import SOLVERS, draw
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.flux2_core.visibility import ReferenceControl, RegionPrompt
from flux2_pack.tests.core.toys import KLEIN, TEXT, toy

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = schedule.sigmas(5, width=96, height=64)
SEEDS = (40, 41)
CUT = 3


def field():
    """CFG with two references, one of them for the first half only, and a region's own prompt."""
    generator = torch.Generator().manual_seed(2)

    def random_(*shape):
        return torch.randn(shape, generator=generator)

    text, other, own = (random_(1, TEXT, KLEIN.context_dim) for _ in range(3))
    left = torch.zeros(4, 6)
    left[:, :3] = 1

    def controls(sigma):
        behind = schedule.share(SIGMAS, sigma)
        controlled = (ReferenceControl(0.5), ReferenceControl(1.0, active(0.0, 0.5, behind)))
        return Controls(references=controlled, regions=(RegionPrompt(own, left, 0.2),))

    references = [random_(1, 128, 3, 5), random_(2, 128, 4, 2)]
    return velocity(
        toy(KLEIN), text, negative=other, scale=3.0, references=references, controls=controls
    )


def start():
    return latents.noise(SEEDS[0], width=96, height=64, batch=2)


def noise(step):
    return draw(SEEDS, step, start())


def pause(name, at=CUT) -> PausedState:
    x = start()
    begun = PausedState(
        x=x,
        estimate=x,
        noise=x,
        latent=torch.zeros_like(x),
        sigmas=SIGMAS,
        step=0,
        seeds=SEEDS,
        model=ModelPrint("klein-base-4b", 256, fingerprint(toy(KLEIN))),
        solver=name,
        mask=torch.ones(1, 1, 64, 96),
        conditions="a",
    )
    with torch.inference_mode():
        return begun.advanced(advance(field(), x, SIGMAS, name, 0, at, noise=noise), at)


def finish(state: PausedState) -> torch.Tensor:
    """The rest of a run, from nothing but its state."""
    how = {"solver": state.solver, "eta": state.eta, "history": state.history}
    with torch.inference_mode():
        return denoise(
            field(),
            state.x,
            state.sigmas,
            start=state.step,
            noise=lambda step: draw(state.seeds, step, state.x),
            **how,
        )


def finish_files(folder: str) -> None:
    """What the other process does."""
    for path in sorted(Path(folder).glob("*.state.safetensors")):
        done = finish(PausedState.load(path))
        save_file({"x": done}, path.with_suffix(".done"))


@pytest.fixture(scope="module")
def whole():
    """name -> the uninterrupted run."""
    with torch.inference_mode():
        return {
            name: denoise(field(), start(), SIGMAS, solver=name, noise=noise) for name in SOLVERS
        }


@pytest.mark.parametrize("name", SOLVERS)
def test_preview_and_rest_are_the_whole_run(name, whole, tmp_path):
    state = pause(name)
    assert torch.equal(finish(state), whole[name])
    state.save(tmp_path / "a.safetensors")
    again = PausedState.load(tmp_path / "a.safetensors")
    assert torch.equal(finish(again), whole[name])
    assert torch.equal(again.mask, state.mask) and torch.equal(again.estimate, state.estimate)
    plain = ("step", "seeds", "model", "solver", "eta", "conditions")
    assert all(getattr(again, part) == getattr(state, part) for part in plain)


def test_the_rest_in_another_process(whole, tmp_path):
    for name in SOLVERS:
        pause(name).save(tmp_path / f"{name}.state.safetensors")
    script = (
        "import sys, types; pack = types.ModuleType('flux2_pack'); pack.__path__ = [sys.argv[1]]; "
        "sys.modules['flux2_pack'] = pack; from flux2_pack.tests.core.test_paused import "
        "finish_files; finish_files(sys.argv[2])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(tmp_path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for name in SOLVERS:
        done = load_file(tmp_path / f"{name}.state.done")["x"]
        assert torch.equal(done, whole[name]), name


def test_rewinding():
    state = pause("unipc")
    assert state.rewound(0.0) is state
    third = state.rewound(1 / 3)
    assert (third.step, third.history) == (2, ())
    # x at the earlier time: the same picture under more noise, here with the spread it had there.
    there = pause("unipc", 2).x
    assert abs(float(third.x.std() / there.std()) - 1) < 0.1  # observed 0.02
    shared = torch.corrcoef(torch.stack((third.x.flatten(), there.flatten())))[0, 1]
    assert 0.05 < shared < 0.99
    anew = state.rewound(1.0)
    assert anew.step == 0 and abs(float(anew.x.std()) - 1) < 0.03  # observed 0.01
    assert abs(float((anew.x * state.noise).mean())) < 0.05  # noise of its own; observed 0.01
    assert torch.equal(anew.x, state.rewound(1.0).x)
    with pytest.raises(Flux2Error, match="share of the steps"):
        state.rewound(1.5)


def test_a_finished_run_can_be_rewound():
    done = pause("euler", 5)
    assert done.rewound(0.4).step == 3
    assert torch.isfinite(finish(done.rewound(0.4))).all()
    assert torch.equal(finish(done), done.x)


def test_what_a_solver_remembers_goes_with_it():
    state = pause("unipc")
    assert state.under("unipc", 1.0, "a").history
    assert state.under("unipc", 1.0, "").history  # conditions unknown
    assert not state.under("unipc", 1.0, "b").history
    assert not state.under("dpmpp_2m", 1.0, "a").history


def test_another_model():
    state = pause("euler")
    state.check_model(state.model)
    for other, seen in (
        ({"variant": "dev"}, "klein-base-4b"),
        ({"width": 3072}, "3072"),
        ({"fingerprint": "0"}, "weights are others"),
    ):
        with pytest.raises(Flux2Error, match=seen):
            state.check_model(state.model._replace(**other))


def test_fingerprints():
    one = toy(KLEIN)
    assert fingerprint(one) == fingerprint(toy(KLEIN)) == fingerprint(toy(KLEIN).bfloat16())
    with torch.no_grad():
        one.single_blocks[0].linear1.weight.mul_(2)  # as a LoRA does
        assert fingerprint(one) == fingerprint(toy(KLEIN))
        one.single_blocks[0].norm.query_norm.weight[3] += 0.5
    assert fingerprint(one) != fingerprint(toy(KLEIN))


def test_200_damaged_files(tmp_path):
    path, bad = tmp_path / "whole.safetensors", tmp_path / "bad.safetensors"
    state = pause("unipc")
    state.save(path)
    raw, rng, refused = path.read_bytes(), random.Random(3), 0
    header = 8 + int.from_bytes(raw[:8], "little")
    for i in range(200):
        data = bytearray(raw)
        end = header if i % 2 else len(raw)
        kind = i % 5
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            data += bytes(rng.randrange(1, 50))
        elif kind == 2:
            at = rng.randrange(8, end)
            data[at : at + 4] = rng.randbytes(rng.randrange(8))
        else:
            for _ in range(rng.choice((1, 1, 1, 8))):
                data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        bad.write_bytes(data)
        try:
            loaded = PausedState.load(bad)
        except Flux2Error as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
        else:  # a blank of the header became another blank
            assert torch.equal(loaded.x, state.x) and loaded.seeds == state.seeds
    assert refused > 190


def forged(path, tensors=None, **changes):
    """A file with a valid digest that says what nobody would have saved."""
    pause("unipc").save(path)
    found = load_file(path) | (tensors or {})
    about = json.loads(paused.read_header(path).metadata[paused.KEY])
    about.pop("digest")
    about |= changes
    about["digest"] = paused._digest(about, found)
    save_file(found, path, {paused.KEY: json.dumps(about)})
    return path


@pytest.mark.parametrize(
    ("tensors", "changes", "seen"),
    [
        ({}, {"step": 9}, "step 9 of 5"),
        ({}, {"step": 1.5}, "step 1.5 of 5"),
        ({}, {"step": True}, "step True of 5"),
        ({}, {"seeds": [1]}, "1 seeds"),
        ({}, {"seeds": ["x", "y"]}, "step"),
        ({}, {"eta": 7}, "eta 7"),
        ({}, {"eta": "much"}, "description"),
        ({}, {"solver": "magic"}, "solver magic"),
        ({}, {"solver": ["euler"]}, "description"),
        ({}, {"model": ["dev"]}, "description"),
        ({}, {"history": [0.1, 0.9, 0.95]}, "history"),
        ({}, {"history": [0.9]}, "description"),
        ({}, {"version": 2}, "version 2"),
        ({}, {"extra": 1}, "description"),
        ({"x": torch.zeros(2, 128, 3, 3)}, {}, "several sizes"),
        ({"estimate": torch.zeros(1)}, {}, "several sizes"),
        ({"mask": torch.zeros(3)}, {}, "a mask"),
        ({"sigmas": SIGMAS.flip(0)}, {}, "do not fall"),
        ({"sigmas": SIGMAS * float("nan")}, {}, "do not fall"),
        ({"sigmas": torch.zeros(0)}, {}, "-1 steps"),
        ({"sigmas": torch.tensor(1.0)}, {}, "contradicts|description"),
        ({"more": torch.zeros(3)}, {}, "description"),
        ({"x": torch.zeros(2, 128, 4, 6).half()}, {}, "another kind"),
    ],
)
def test_contradictions(tmp_path, tensors, changes, seen):
    with pytest.raises(Flux2Error, match=seen):
        PausedState.load(forged(tmp_path / "a.safetensors", tensors, **changes))


def test_other_files(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(Flux2Error, match="is no paused run"):
        PausedState.load(tmp_path / "weights.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(Flux2Error, match="pickle"):
        PausedState.load(tmp_path / "pickle.safetensors")
    with pytest.raises(Flux2Error, match="no such file"):
        PausedState.load(tmp_path / "none.safetensors")


def test_a_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(Flux2Error, match="could not be saved"):
        pause("euler").save(tmp_path / "missing" / "a.safetensors")
    state = replace(pause("euler"), mask=None)
    state.save(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert PausedState.load(tmp_path / "a.safetensors").mask is None
