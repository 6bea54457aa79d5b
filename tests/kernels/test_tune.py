"""Tuning: what is tried, chosen, remembered and for whom, with a made-up card and timer."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kernels import measure, tiles, tune
from flux2_pack.flux2_core.kernels.tiles import Tile

ROOT = Path(__file__).resolve().parents[2]
SHAPE = tune.Shape(4608, 6144, 6144)
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "folder", lambda: tmp_path / "flux2-kit")
    monkeypatch.setattr(tune, "card", lambda device: "a card | triton 3.6.0")
    tune._remembered.cache_clear()
    yield
    tune._remembered.cache_clear()


def timer(fast: Tile, speedup: float = 2.0):
    """Seconds as if one tile were faster than the next best, all others slower."""

    def seconds(op, shape, accumulate, tile):
        return 1.0 if tile is None else 1 / speedup if tile == fast else 3.0

    return seconds


def test_the_fastest_tile_is_remembered():
    fast = tiles.TILES["block", 120]["many"][0]
    results = tune.tune(120, [SHAPE], timer(fast))
    tune.remember(tune.card(GPU), results)
    found = tune.found("fp8_linear", GPU, *SHAPE)
    assert found == tune.Found("block", fast, 2.0)
    assert tune.found("fp8_linear", GPU, 2048, 6144, 6144) == found  # as many rows, by bucket
    assert tune.found("fp8_linear", GPU, 512, 6144, 6144) is None
    assert tune.found("fp8_linear", GPU, 4608, 3072, 6144) is None


def test_every_shipped_tile_of_the_card_is_tried():
    tried = set()
    tune.tune(89, [SHAPE], lambda op, shape, form, tile: tried.add((form, tile)) or 1.0)
    wanted = {(f, t) for f in ("fp32", "fp16") for t in tiles.tiles(f, 89, SHAPE.rows)}
    assert tried == wanted | {("", None)}


def test_what_leads_elsewhere_has_nothing_added():
    """Gate and residual follow the layers that lead back to the model's width."""
    told = []
    for shape in (SHAPE, SHAPE._replace(columns=3 * SHAPE.columns)):
        tune.tune(120, [shape], lambda *_: 1.0, told.append)
    wide = {line.op for line in told if line.shape != SHAPE}
    assert {line.op for line in told if line.shape == SHAPE} - {"fp8_weight_linear"} == {
        op for op in tune.FORMS if op != "fp8_weight_linear"
    }
    assert wide == {"fp8_linear", "fp8_linear_narrow"}


def test_a_form_of_pytorchs_own_has_no_tile():
    def seconds(op, shape, accumulate, tile):
        assert accumulate != "mxfp8" or (op == "fp8_linear" and tile is None)
        return 0.5 if accumulate == "mxfp8" else 1.0

    tune.remember(tune.card(GPU), tune.tune(120, [SHAPE], seconds))
    assert tune.found("fp8_linear", GPU, *SHAPE) == tune.Found("mxfp8", None, 2.0)
    assert tune.found("fp8_linear", torch.device("cpu"), *SHAPE) is None


def test_what_does_not_run_is_told_and_passed_over():
    first, *others = tiles.tiles("fp16", 89, SHAPE.rows)
    told = []

    def seconds(op, shape, accumulate, tile):
        if tile == first:
            raise RuntimeError("out of shared memory\nmore lines")
        return 1.0 if tile is None else 0.5

    results = tune.tune(89, [SHAPE], seconds, told.append)
    lines = [x for x in told if x.tile == first]
    assert [x.op for x in lines] == [op for op, forms in tune.FORMS.items() if forms == ("fp16",)]
    assert {x.error for x in lines} == {"RuntimeError: out of shared memory"}
    assert not any(x.seconds for x in lines)
    assert {f.tile for f in results.values()} & set(others)


def test_results_hold_for_one_card_alone(monkeypatch):
    fast = tiles.TILES["block", 120]["many"][0]
    tune.remember("a card | triton 3.6.0", tune.tune(120, [SHAPE], timer(fast)))
    tune.remember("another card", {})
    assert tune.found("fp8_linear", GPU, *SHAPE)
    monkeypatch.setattr(tune, "card", lambda device: "a card | triton 3.7.0")
    assert tune.found("fp8_linear", GPU, *SHAPE) is None
    assert set(json.loads(tune.file().read_text())) == {"a card | triton 3.6.0", "another card"}


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_broken_file_is_as_good_as_none(content):
    tune.file().parent.mkdir()
    tune.file().write_text(content)
    assert tune.found("fp8_linear", GPU, *SHAPE) is None
    tune.remember("a card | triton 3.6.0", {})
    assert json.loads(tune.file().read_text()) == {"a card | triton 3.6.0": {}}


def test_a_newer_card_uses_the_tiles_of_its_kind():
    assert tiles.tiles("block", 121, 4608) == tiles.tiles("block", 120, 4608)
    assert tiles.tiles("fp32", 103, 4608) == tiles.tiles("fp32", 100, 4608)
    assert not tiles.tiles("block", 90, 4608) and not tiles.tiles("fp32", 75, 4608)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card_it_says_so_in_a_sentence():
    with pytest.raises(Flux2Error):
        tune.the_card()
    made = subprocess.run(
        [sys.executable, ROOT / "tests" / "bench" / "tune.py"], capture_output=True, text=True
    )
    assert made.returncode == 1
    assert made.stderr.strip() == "There is no NVIDIA card here to tune for."


# --------------------------------------------------------------- the real candidates, interpreted


def stopwatch(call) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("op", "accumulate"),
    [(op, form) for op, forms in tune.FORMS.items() for form in forms if form != "mxfp8"],
)
def test_candidates_run_and_are_right(op, accumulate):
    bench = measure.Bench(torch.device("cpu"), stopwatch)
    shape, tile = tune.Shape(48, 64, 128), Tile(32, 32, 128, 4, 2)
    assert bench(op, shape, "", None) > 0
    assert bench(op, shape, accumulate, tile) > 0


@pytest.mark.interpreted
def test_a_wrong_result_is_no_candidate(monkeypatch):
    bench = measure.Bench(torch.device("cpu"), stopwatch)
    right = measure.gemm.fp8
    monkeypatch.setattr(measure.gemm, "fp8", lambda *a, **k: right(*a, **k) * 1.02)
    with pytest.raises(Flux2Error, match=r"off by 0\.02"):
        bench("fp8_linear", tune.Shape(48, 64, 128), "fp32", Tile(32, 32, 128, 4, 2))
