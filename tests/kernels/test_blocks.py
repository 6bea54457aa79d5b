"""Linears of NVFP4, MXFP8 and INT8: the definition, what is handed to the libraries, who serves."""

import pytest
import torch
import torch.nn.functional as F

from flux2_pack.flux2_core import formats
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kernels import blocks, table
from flux2_pack.flux2_core.kernels.ops import fp8_linear

BF16 = torch.bfloat16
M, N, K = 37, 96, 160


def numbers(rows: int, columns: int = K, seed: int = 0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rel(y, wanted) -> float:
    return ((y.double() - wanted.double()).norm() / wanted.double().norm()).item()


def packed(form: str, rows: int, seed: int):
    made = formats.encode(numbers(rows, seed=seed), form)
    order = ["weight", "weight_scale", *(["weight_scale_2"] if form == "nvfp4" else [])]
    return made.decode().double(), [made.parts[name] for name in order]


def operands(form: str, each: bool = False):
    """The exact product, and the arguments of the operation."""
    x, activations = packed(form, M, 1)
    w, weights = packed(form, N, 2)
    if each:  # a scale for each row of the weight, as stacked layers have
        rows = torch.linspace(0.5, 2, N).reshape(-1, 1)
        w, weights[2] = w * rows.double(), weights[2] * rows
    return x @ w.T, [*activations, *weights]


CASES = [("mxfp8", False), ("nvfp4", False), ("nvfp4", True)]


@pytest.mark.parametrize(("form", "each"), CASES)
@pytest.mark.parametrize("name", ["reference", "eager"])
def test_decoded(name, form, each):
    """Seen: 1.7e-3, the rounding to bfloat16; NVFP4's decoded numbers are rounded to it as well,
    3.0e-3."""
    wanted, args = operands(form, each)
    y = getattr(blocks, f"{form}_{name}")(*args)
    assert y.dtype == BF16
    assert rel(y, wanted) <= (3.5e-3 if (name, form) == ("eager", "nvfp4") else 2.0e-3)


def as_cards_do(seen):
    """F.scaled_mm for blocks, which a CPU has not: decodes what it is given, K contiguous in both
    factors, scales in tiles, halves the library's way round."""
    kinds, orders = F.ScalingType, F.SwizzleType

    def decode(codes, scale, recipe, order):
        scale, recipe, order = (v if isinstance(v, list) else [v] for v in (scale, recipe, order))
        assert codes.stride(1) == 1 and codes.shape[0] % 16 == 0
        assert order[0] == orders.SWIZZLE_32_4_4 and scale[0].is_contiguous()
        rows = codes.shape[0]
        if codes.dtype == torch.float8_e4m3fn:
            assert recipe == [kinds.BlockWise1x32] and scale[0].dtype == torch.float8_e8m0fnu
            scales = formats.unswizzle(scale[0], rows, codes.shape[1] // 32).float()
            return (codes.float().unflatten(1, (-1, 32)) * scales[..., None]).flatten(1)
        assert codes.dtype == torch.float4_e2m1fn_x2 and scale[0].dtype == torch.float8_e4m3fn
        assert recipe == [kinds.BlockWise1x16, kinds.TensorWise] and scale[1].numel() == 1
        raw = codes.view(torch.uint8)
        values = formats.e2m1_decode(raw << 4 | raw >> 4)  # the low half first
        scales = formats.unswizzle(scale[0], rows, values.shape[1] // 16).float() * scale[1]
        return (values.unflatten(1, (-1, 16)) * scales[..., None]).flatten(1)

    def scaled_mm(a, b, sa, ra, sb, rb, oa, ob, output_dtype=None, **_):
        seen.append(a.shape)
        return (decode(a, sa, ra, oa) @ decode(b.T, sb, rb, ob).T).to(output_dtype)

    return scaled_mm


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="needs PyTorch 2.10")
@pytest.mark.parametrize("provider", ["torch", "kitchen"])
@pytest.mark.parametrize(("form", "each"), CASES)
def test_what_the_libraries_are_given(form, each, provider, monkeypatch):
    """Bit for bit what a product of exactly these numbers gives; rows padded to 16."""
    if provider == "kitchen":
        pytest.importorskip("comfy_kitchen")
    wanted, args = operands(form, each)
    seen = []
    monkeypatch.setattr(F, "scaled_mm", as_cards_do(seen))
    if provider == "kitchen":

        def positional(a, b, **named):
            order = ("scale_a", "scale_recipe_a", "scale_b", "scale_recipe_b")
            rest = [named.pop(key) for key in (*order, "swizzle_a", "swizzle_b")]
            return as_cards_do(seen)(a, b, *rest, **named)

        monkeypatch.setattr(F, "scaled_mm", positional)
    y = getattr(blocks, f"{form}_{provider}")(*args)
    assert y.shape == (M, N) and y.dtype == BF16
    assert rel(y, wanted) <= (2.7e-3 if each else 2.0e-3)
    assert seen[0][0] == 48


# ------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("one_scale", [False, True])
def test_int8(one_scale):
    made = formats.encode(numbers(N), "int8_tensorwise").parts
    scale = made["weight_scale"].max() if one_scale else made["weight_scale"]
    x = numbers(M, seed=3).to(BF16)
    wanted = x.double() @ (made["weight"].double() * scale.double()).T
    assert rel(blocks.int8_reference(x, made["weight"], scale), wanted) <= 2.0e-3
    assert rel(blocks.int8_eager(x, made["weight"], scale), wanted) <= 2.7e-3


@pytest.mark.parametrize("one_scale", [False, True])
def test_int8_by_comfy_kitchen(one_scale):
    """Activations rounded to int8 too: 40 dB or more for Gaussian numbers. Seen: 42 dB."""
    pytest.importorskip("comfy_kitchen")
    made = formats.encode(numbers(N), "int8_tensorwise").parts
    scale = made["weight_scale"].max() if one_scale else made["weight_scale"]
    x = numbers(M, seed=3).to(BF16)
    wanted = x.double() @ (made["weight"].double() * scale.double()).T
    assert rel(blocks.int8_kitchen(x, made["weight"], scale), wanted) <= 0.01


# ------------------------------------------------------------------------------ who serves


def chosen(op: str, arch: str, monkeypatch):
    monkeypatch.setattr(table, "architecture", lambda device: arch)
    dtypes, widths, rows = table.OPS[op].typical
    case = table.Case(torch.device("cuda", 0), dtypes, widths, rows)
    candidate, refused = table.OPS[op].resolve(case)
    return candidate.name, dict(refused)


@pytest.mark.parametrize("op", ["mxfp8_linear", "nvfp4_linear"])
def test_blackwell_alone_multiplies_blocks(op, monkeypatch):
    if hasattr(F, "scaled_mm"):
        assert chosen(op, "sm_120", monkeypatch)[0] == "torch"
        monkeypatch.delattr(F, "scaled_mm")
    monkeypatch.setattr(blocks, "kitchen", lambda: None)
    name, refused = chosen(op, "sm_100", monkeypatch)
    assert name == "eager" and "this PyTorch" in refused["torch"]
    assert "not installed" in refused["comfy-kitchen"]
    monkeypatch.setattr(blocks, "kitchen", lambda: torch)  # a module without the function
    assert "has no scaled_mm" in chosen(op, "sm_120", monkeypatch)[1]["comfy-kitchen"]
    assert chosen(op, "sm_90", monkeypatch)[0] == "eager"


def test_int8_is_comfy_kitchens_on_cards(monkeypatch):
    kitchen = type("Kitchen", (), {"int8_linear": None})
    monkeypatch.setattr(blocks, "kitchen", lambda: kitchen)
    assert chosen("int8_linear", "sm_86", monkeypatch)[0] == "comfy-kitchen"
    assert chosen("int8_linear", "sm_70", monkeypatch)[0] == "eager"
    assert chosen("int8_linear", "cpu", monkeypatch)[0] == "eager"


# ------------------------------------------------------------------------------- as operations


def operation(name: str):
    return getattr(getattr(torch.ops, fp8_linear.namespace), name).default


def calls():
    made = formats.encode(numbers(N), "int8_tensorwise").parts
    x = numbers(M).to(BF16)
    return {
        "mxfp8_linear": operands("mxfp8")[1],
        "nvfp4_linear": operands("nvfp4", each=True)[1],
        "int8_linear": [x, made["weight"], made["weight_scale"]],
    }


@pytest.mark.parametrize("name", calls())
def test_operations_hold_together(name):
    """Without the test of mutation, whose arithmetic has no 8-bit numbers."""
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operation(name), calls()[name], test_utils=tests)


@pytest.mark.parametrize("name", calls())
def test_no_rows_are_asked_of_nobody(name, fussy):
    fussy(name)
    args = calls()[name]
    few = [t[:0] for t in args[: 1 if name == "int8_linear" else 2]]
    y = operation(name)(*few, *args[len(few) :])
    assert y.shape == (0, N) and y.dtype == BF16


@pytest.mark.parametrize("name", calls())
def test_tensors_that_do_not_fit_are_refused(name):
    args = calls()[name]
    args[-2 if name == "int8_linear" else -1] = torch.ones(3, 5, dtype=torch.uint8)
    with pytest.raises(Flux2Error, match="do not fit together"):
        operation(name)(*args)
