"""What the status says, for made-up cards and models."""

import pytest
import torch
from torch import nn

from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.kernels import attention, table, use, words
from flux2_pack.flux2_core.kernels.table import Row
from flux2_pack.flux2_core.quantised import QuantLinear

CPU = torch.device("cpu")


def network(*layers):
    out = nn.Module()
    out.single_blocks = nn.ModuleList(nn.ModuleDict({"linear1": layer}) for layer in layers)
    out.img_in = nn.Linear(16, 16)
    return out


def quantised(form, compute="fp8"):
    layer = QuantLinear(encode(torch.randn(32, 32), form))
    layer.compute = compute
    return layer


def test_layers_are_counted_by_what_they_are():
    plain = [nn.Linear(32, 32, bias=False, dtype=torch.bfloat16) for _ in range(3)]
    fp8 = [quantised("float8_e4m3fn") for _ in range(2)]
    made = network(*plain, *fp8, quantised("float8_e4m3fn", "weights"), quantised("nvfp4"))
    assert list(words.layers(made, CPU)) == [
        "3 layers: bf16",
        "2 layers: fp8, multiplied in bf16: nothing here does it in fp8",
        "1 layer: fp8 weights only, multiplied in bf16",
        "1 layer: NVFP4, decoded at each use",
    ]
    with use("eager"):  # asked for by name
        told = list(words.layers(made, CPU))
        assert "2 layers: fp8, multiplied in fp8" in told
        assert "1 layer: NVFP4, multiplied in NVFP4" in told


def test_a_layer_is_asked_about_with_the_scales_that_it_has(monkeypatch):
    """A candidate that takes one scale alone does not multiply weights with one for each row."""
    op = table.OPS["fp8_linear"]
    monkeypatch.setattr(op, "candidates", list(op.candidates))
    table.register(
        "fp8_linear", "torch", 999, print, lambda case: "rows" if case.widths[2] > 1 else None
    )
    told = list(words.layers(network(quantised("float8_e4m3fn")), CPU))
    op.chosen.clear()
    assert told == ["1 layer: fp8, multiplied in bf16: nothing here does it in fp8"]


def test_a_patched_layer_is_told():
    layer = quantised("float8_e4m3fn")
    layer.weight = torch.zeros(32, 32, dtype=torch.bfloat16)
    assert list(words.layers(network(layer), CPU)) == ["1 layer: bf16, patched"]


def test_what_fared_alike_is_told_once():
    refused = (("triton", "Triton is not installed"),)
    rows = [
        Row("fp8_linear", "cuda:0", "up to 512 rows", "torch", refused),
        Row("fp8_linear", "cuda:0", "up to 8192 rows", "torch", refused),
        Row("fp8_linear", "cuda:0", "up to 8192 rows", "triton", ()),
        Row("quantize_rows", "cuda:0", "", "eager", (*refused, ("torch", refused[0][1]))),
    ]
    assert list(words.served(rows)) == [
        "products in fp8: PyTorch's scaled product",
        "    not our own kernel: Triton is not installed",
        "products in fp8: our own kernel",
        "rounding to fp8: plain PyTorch",
        "    not our own kernel, PyTorch's scaled product: Triton is not installed",
    ]


def test_every_operation_and_server_has_words():
    rows = [*words.status(CPU), *attention.status(CPU)]
    assert {row.op for row in rows} <= set(words.OPS)
    assert {n for row in rows for n, _ in row.refused} | {r.chosen for r in rows} <= set(words.WHO)


@pytest.mark.parametrize(
    ("capability", "said"),
    [((8, 6), "has no fp8 instructions"), ((8, 9), "multiplies fp8"), ((12, 0), "multiplies fp8")],
)
def test_the_card(monkeypatch, capability, said):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA GeForce RTX")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability)
    words.architecture.cache_clear()
    told = words.card(torch.device("cuda", 3))
    words.architecture.cache_clear()
    assert f"RTX (sm_{capability[0]}{capability[1]}; {said}" in told


def test_a_host_says_who_computes_attention_there():
    lines = words.report(CPU, None, "SageAttention, as ComfyUI was started").splitlines()
    assert (
        lines[0].startswith("Device: cpu") and "  attention: SageAttention, as ComfyUI" in lines[3]
    )
    assert sum(line.startswith("  attention: ") for line in lines) == 1
    assert "The model's blocks:" not in lines
