"""fp8 linears through PyTorch's scaled product and through bfloat16, against the definition; which
of them serves which card, and why not."""

import pytest
import torch

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.kernels import reference, scaled, table, tune
from flux2_pack.flux2_core.kernels.tiles import Tile

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
SIZES = [(1, 48, 64), (37, 96, 160), (512, 64, 256)]  # M, N, K


def operands(m: int, n: int, k: int, one_scale: bool = False):
    draw = torch.Generator().manual_seed(m)
    a = reference.quantize_rows(torch.randn(m, k, generator=draw))
    w = torch.randn(n, k, generator=draw) * 0.02
    b, scale = reference.quantize_rows(w)
    return *a, b, scale.max() if one_scale else scale


def rel(y, wanted) -> float:
    return ((y.double() - wanted.double()).norm() / wanted.double().norm()).item()


def exact(codes, scale, weight, weight_scale):
    weights = weight.double() * weight_scale.double().reshape(-1, 1)
    return (codes.double() * scale.double()) @ weights.T


# ------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scaled_mm(size, one_scale):
    """Contract 2.0e-3, the rounding to bfloat16 is 1.66e-3. Seen: 1.7e-3."""
    args = operands(*size, one_scale)
    assert rel(scaled.scaled_mm(*args), exact(*args)) <= 2.0e-3
    assert rel(scaled.scaled_mm(*args), reference.fp8_linear(*args)) <= 1e-3


def test_scaled_mm_keeps_28_decibels():
    """Seen: 28.5 dB for Gaussian numbers, from end to end."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 3072, generator=draw), torch.randn(64, 3072, generator=draw)
    y = scaled.scaled_mm(*reference.quantize_rows(x), *reference.quantize_rows(w))
    assert rel(y, x.double() @ w.double().T) <= 10 ** (-28.3 / 20)


@pytest.mark.parametrize("public", [True, False])
def test_what_reaches_pytorch_is_legal_on_cuda(public, monkeypatch):
    """The CPU takes what CUDA refuses, so look at what is handed on: rows padded to 16, a row-major
    by a column-major matrix, scales (M, 1) and (1, N), float32, in one piece."""
    name = "scaled_mm" if public else "_scaled_mm"
    owner, seen = (torch.nn.functional, []) if public else (torch, [])
    if public and not hasattr(owner, name):
        pytest.skip("this PyTorch has only the older function")
    if not public:
        monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (seen.append((a, k)), function(*a, **k))[1])

    codes, scale, weight, weight_scale = operands(37, 96, 160, one_scale=True)
    wide = torch.zeros(37, 320, dtype=torch.uint8).view(E4M3)
    wide[:, 160:] = codes
    y = scaled.scaled_mm(wide[:, 160:], scale, weight.T.contiguous().T, weight_scale)

    (args, named) = seen[0]
    a, b = args[:2]
    scale_a, scale_b = args[2], args[4 if public else 3]
    assert a.shape == (48, 160) and a.stride() == (160, 1)
    assert b.shape == (160, 96) and b.stride() == (1, 160)
    assert scale_a.shape == (48, 1) and scale_b.shape == (1, 96)
    assert all(s.is_contiguous() and s.dtype == torch.float32 for s in (scale_a, scale_b))
    assert named["use_fast_accum"] is True
    assert y.shape == (37, 96) and rel(y, exact(codes, scale, weight, weight_scale)) <= 2.0e-3


def test_row_scales():
    assert scaled.row_scales(torch.tensor(2.0), 3).tolist() == [[2.0]] * 3
    rows = torch.rand(3, 1)
    assert torch.equal(scaled.row_scales(rows, 3), rows)


def test_decoded_is_exact():
    """All 254 numbers of e4m3, in matrices longer than one pass, with gaps between rows too."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(9000, 1).view(E4M3)
    assert torch.equal(scaled.decoded(codes).float(), codes.float())
    assert torch.equal(scaled.decoded(codes[:, 3:200]).float(), codes[:, 3:200].float())


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decoded_linear(size, one_scale):
    """Rounded to bfloat16 before and after the scales: 2.35e-3 is expected. Seen: 2.4e-3."""
    args = operands(*size, one_scale)
    assert rel(scaled.decoded_linear(*args), exact(*args)) <= 2.7e-3
    assert scaled.decoded_linear(*args, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_decoded_weight_linear(dtype):
    """Seen: bfloat16 2.2e-3, float16 3e-4, float32 2e-7."""
    x = torch.randn(37, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    *_, weight, weight_scale = operands(1, 96, 160)
    y = scaled.decoded_weight_linear(x, weight, weight_scale)
    bound = {BF16: 2.7e-3, torch.float16: 4e-4, torch.float32: 1e-6}[dtype]
    assert y.dtype == dtype
    assert rel(y, exact(x, torch.ones(()), weight, weight_scale)) <= bound


def test_float16_sums_stay_in_range():
    """Codes reach 448: unscaled, their sums would leave float16 although the result is small."""
    x = torch.full((1, 512), 2.0, dtype=torch.float16)
    weight, scale = torch.full((16, 512), 448.0).to(E4M3), torch.full((16, 1), 1e-4)
    y = scaled.decoded_weight_linear(x, weight, scale)
    assert rel(y, torch.full((1, 16), 2 * 448 * 512 * 1e-4)) < 1e-3


def test_ops_use_them():
    args = operands(37, 96, 160)
    assert torch.equal(kernels.fp8_linear(*args), scaled.decoded_linear(*args))
    x = torch.randn(37, 160).to(BF16)
    with kernels.use("eager"):
        y = kernels.fp8_weight_linear(x, *args[2:])
    assert torch.equal(y, scaled.decoded_weight_linear(x, *args[2:]))


# ----------------------------------------------------------------------------- who serves what


@pytest.fixture
def card(monkeypatch):
    """Pretend that cuda:0 is a card of some architecture, with what tuning found there."""

    def pretend(arch: str, found: tune.Found | None = None):
        monkeypatch.setattr(table, "architecture", lambda device: arch)
        monkeypatch.setattr(scaled, "triton_missing", lambda: None)
        monkeypatch.setattr(tune, "found", lambda *_: found)
        return torch.device("cuda", 0)

    return pretend


def chosen(op: str, device, dtypes, widths=(6144, 6144, 1)):
    candidate, refused = table.OPS[op].resolve(table.Case(device, dtypes, widths, 8192))
    return candidate.name, dict(refused)


CODES = (E4M3, E4M3, BF16)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_100", "sm_120"])
def test_cards_with_fp8_use_pytorch(arch, card):
    name, refused = chosen("fp8_linear", card(arch), CODES)
    assert name == "torch"
    assert "dev.py bench tune" in refused["triton"]


@pytest.mark.parametrize(
    ("arch", "dtypes", "widths", "why"),
    [
        ("sm_86", CODES, (6144, 6144, 1), "no fp8 instructions"),
        ("sm_89", (E4M3, E4M3, torch.float32), (6144, 6144, 1), "bfloat16 alone"),
        ("sm_89", CODES, (6144, 6152, 1), "multiples of 16"),
        ("sm_89", CODES, (6152, 6144, 1), "multiples of 16"),
    ],
)
def test_what_pytorch_does_not_serve(arch, dtypes, widths, why, card):
    name, refused = chosen("fp8_linear", card(arch), dtypes, widths)
    assert name == "eager" and why in refused["torch"]


def test_a_cpu_multiplies_in_bfloat16():
    name, refused = chosen("fp8_linear", torch.device("cpu"), CODES)
    assert name == "eager" and "CPU" in refused["torch"]


@pytest.mark.parametrize(
    ("op", "arch", "dtypes"),
    [("fp8_linear", "sm_120", CODES), ("fp8_weight_linear", "sm_86", (BF16, E4M3))],
)
def test_our_kernel_serves_from_a_tenth_faster_on(op, arch, dtypes, card):
    tile = Tile(128, 128, 128, 8, 2)
    assert chosen(op, card(arch, tune.Found("block", tile, 1.1)), dtypes)[0] == "triton"
    _, refused = chosen(op, card(arch, tune.Found("block", tile, 1.09)), dtypes)
    assert "1.09 x the speed" in refused["triton"]


def test_weights_in_fp8_take_no_result_in_float32():
    """On a GPU of 8 GB the result of dev's linear1 for one megapixel is half a gigabyte already."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from flux2_pack.tests.core.live_bytes import LiveBytes

    with FakeTensorMode(), torch.inference_mode():
        x = torch.empty(4608, 6144, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(55296, 6144, dtype=torch.float8_e4m3fn, device="cuda")
        scale = torch.empty(55296, 1, device="cuda")
        with LiveBytes() as counted:
            out = scaled.decoded_weight_linear(x, weight, scale)
    result, decoded = (2 * m * n for m, n in ((4608, 55296), (55296, 6144)))
    assert out.shape == (4608, 55296)
    assert counted.peak <= 1.01 * (result + decoded)  # the weight in bf16, and the result
