"""The model's layers through our own product, in Triton's interpreter, with a made-up card and a made-up
result of tuning: sums in float16, gate and residual for each picture, a LoRA."""

import pytest
import torch

from flux2_pack.flux2_core import kernels, lora, narrow
from flux2_pack.flux2_core.kernels import fused, table, tune
from flux2_pack.flux2_core.kernels.tiles import Tile
from flux2_pack.flux2_core.lora_names import Place
from flux2_pack.flux2_core.quantised import QuantLinear, quantize
from flux2_pack.tests.core.toys import KLEIN, decibels, inputs, toy

BF16 = torch.bfloat16
pytestmark = pytest.mark.interpreted


def test_a_model_in_sums_of_float16(monkeypatch):
    given = inputs(0, batch=2)
    given = {k: v.to(BF16) if k in ("x", "context") else v for k, v in given.items()}
    model = quantize(toy(KLEIN), "fp8").to(BF16)
    name, draw = "single_blocks.1.linear2", torch.Generator().manual_seed(0)
    n, k = model.get_submodule(name).shape
    parts = {"A": torch.randn(5, k, generator=draw), "B": torch.randn(n, 5, generator=draw) * 0.1}
    lora.Applied(model, [lora.Delta(Place(name), parts)], lora.Report("", ""), 0.5)
    with kernels.use("reference"):
        wanted = model(**given)
    found = tune.Found("fp16", Tile(32, 64, 64, 4, 2), 1.5)
    monkeypatch.setattr(tune, "found", lambda op, *_: found if op.endswith("narrow") else None)
    with kernels.use("reference"):
        defined = model(**given)
    monkeypatch.setattr(table, "architecture", lambda device: "sm_89")
    launched, own = [], fused.fp8_linear_fused_own
    monkeypatch.setattr(fused.FUSED, "candidates", list(fused.FUSED.candidates))
    kernels.register(
        fused.NAME, "triton", 60, lambda *a: launched.append(a[8]) or own(*a), fused._refuses
    )
    with kernels.use("triton,reference"):
        made = model(**given)
    fused.FUSED.chosen.clear()
    assert len(launched) == 22 and all(launched) and not fused.FUSED.broken
    assert all(narrow.is_rebased(m.held) for m in model.modules() if isinstance(m, QuantLinear))
    assert decibels(made, defined) > 28  # seen 34: roundings to bfloat16 flip codes
    assert decibels(made, wanted) > 25  # seen 29.9
