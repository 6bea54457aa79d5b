"""A product with gate, residual and LoRA behind it: the definition, one step after the other, and
our kernel in one pass."""

import pytest
import torch

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kernels import fused, gemm, scaled, table, tune
from flux2_pack.flux2_core.kernels.reference import quantize_rows
from flux2_pack.flux2_core.kernels.tiles import Tile

BF16 = torch.bfloat16
M, N, K = 37, 96, 160
PARTS = [
    "",
    "residual",
    "gate",
    "lora",
    "residual gate",
    "residual gate lora",
    "residual gates lora",
]


def operands(parts: str, rank: int = 12):
    """The exact result, and the arguments by name."""
    draw = torch.Generator().manual_seed(0)

    def numbers(*size):
        return torch.randn(*size, generator=draw)

    codes, scale = quantize_rows(numbers(M, K))
    weight, weight_scale = quantize_rows(numbers(N, K) * 0.1)
    args = {"codes": codes, "scale": scale, "weight": weight, "weight_scale": weight_scale}
    y = (codes.double() * scale.double()) @ (weight.double() * weight_scale.double()).T
    if "lora" in parts:
        args |= {"low": numbers(M, rank).to(BF16), "up": numbers(N, rank).to(BF16)}
        y = y + args["low"].double() @ args["up"].double().T
    if "gates" in parts:  # one for each of two pictures
        args = {
            k: v if k in ("weight", "weight_scale", "up") else v[: M - 1] for k, v in args.items()
        }
        args["gate"] = numbers(2, N).to(BF16)
        y = y[: M - 1] * args["gate"].double().repeat_interleave(M // 2, 0)
    elif "gate" in parts:
        args["gate"] = numbers(N).to(BF16)
        y = y * args["gate"].double()
    if "residual" in parts:
        args["residual"] = numbers(len(y), N).to(BF16)
        y = args["residual"].double() + y
    return y, args


def rel(y, wanted) -> float:
    return ((y.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("parts", PARTS)
def test_definition_and_steps(parts):
    """Rounded once: 1.66e-3 is the floor. Step after step seen: up to 2.9e-3."""
    wanted, args = operands(parts)
    assert rel(fused.fp8_linear_fused_reference(**args), wanted) <= 2.0e-3
    assert rel(fused.fp8_linear_fused_eager(**args), wanted) <= 3.5e-3
    assert rel(kernels.fp8_linear_fused(**args), wanted) <= 3.5e-3


@pytest.mark.interpreted
@pytest.mark.parametrize("parts", PARTS)
def test_in_one_pass(parts, monkeypatch):
    """Seen: 1.7e-3."""
    found = tune.Found("block", Tile(32, 32, 64, 4, 2), 1.2)
    monkeypatch.setattr(tune, "found", lambda *_: found)
    wanted, args = operands(parts)
    if "residual" in args:  # as a part of wider rows, and as columns
        args["residual"] = torch.cat((args["residual"],) * 2, 1)[:, :N]
    if "up" in args:
        args["up"] = args["up"].T.contiguous().T
    assert rel(fused.fp8_linear_fused_own(**args), wanted) <= 2.0e-3


def test_it_is_off_until_measured(monkeypatch):
    monkeypatch.setattr(table, "architecture", lambda device: "sm_120")
    monkeypatch.setattr(scaled, "triton_missing", lambda: None)
    asked = []

    def found(op, *_):
        asked.append(op)
        return tune.Found("fp16", Tile(128, 128, 64, 4, 3), 1.2) if len(asked) > 1 else None

    monkeypatch.setattr(tune, "found", found)
    dtypes, widths, rows = fused.FUSED.typical
    case = table.Case(torch.device("cuda", 0), dtypes, widths, rows)
    chosen, refused = fused.FUSED.resolve(case)
    assert chosen.name == "eager" and "bench tune" in dict(refused)["triton"]
    for rank, narrow, add in ((0, 1, 1), (0, 1, 0), (16, 0, 1), (16, 1, 1)):
        given = case._replace(widths=(*widths[:3], rank, narrow, add))
        assert fused.FUSED.resolve(given)[0].name == "triton"
    names = ("fused", "fused_narrow", "narrow", "lora", "lora_narrow")
    assert asked == [f"fp8_linear_{name}" for name in names]
    assert set(asked) < set(tune.FORMS)
    wide = case._replace(dtypes=(dtypes[0], torch.float32))
    assert "16 bits" in dict(fused.FUSED.resolve(wide)[1])["triton"]


@pytest.mark.parametrize("parts", PARTS)
def test_operation_holds_together(parts):
    _, args = operands(parts)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    order = ("codes", "scale", "weight", "weight_scale", "residual", "gate", "low", "up")
    positional = [args.get(name) for name in order]
    torch.library.opcheck(kernels.fp8_linear_fused, positional, test_utils=tests)


@pytest.mark.parametrize(
    "wrong",
    [
        {"residual": torch.zeros(M, N - 1)},
        {"gate": torch.zeros(M - 1, N)},
        {"up": None},
        {"low": torch.zeros(M, 3, dtype=BF16)},
        {"scale": torch.ones(1, 1)},
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused(wrong):
    _, args = operands("residual gate lora")
    with pytest.raises(Flux2Error, match="do not fit together"):
        kernels.fp8_linear_fused(**args | wrong)


@pytest.mark.interpreted
def test_narrow_codes_sum_in_float16(monkeypatch):
    found = tune.Found("fp16", Tile(32, 32, 64, 4, 2), 1.2)
    monkeypatch.setattr(tune, "found", lambda *_: found)
    wanted, args = operands("residual")
    top = gemm.ACTIVATION_MAX[64]
    args["codes"] = (args["codes"].float() * (top / 448)).to(torch.float8_e4m3fn)
    gemm.rebase(args["weight"])
    args["scale"], args["weight_scale"] = args["scale"] * (448 / top), args["weight_scale"] * 16
    y = fused.fp8_linear_fused_own(**args, narrow=True)
    assert rel(y, fused.fp8_linear_fused_reference(**args).double()) <= 2.5e-3
    assert rel(y, wanted) <= 0.03  # these codes were rounded twice


@pytest.mark.parametrize("who", ["reference", "eager", "own"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_no_rows(who, pictures, monkeypatch):
    """The text of references that are computed alone."""
    found = tune.Found("block", Tile(32, 32, 64, 4, 2), 1.2)
    monkeypatch.setattr(tune, "found", lambda *_: found)
    _, args = operands("residual gate lora")
    rows = ("codes", "scale", "residual", "low")
    none = args | {name: args[name][:0] for name in rows} | {"gate": torch.ones(pictures, N)}
    made = getattr(fused, f"fp8_linear_fused_{who}")(**none)
    assert made.shape == (0, N) and made.dtype == BF16
    assert kernels.fp8_linear_fused(**none).shape == (0, N)
