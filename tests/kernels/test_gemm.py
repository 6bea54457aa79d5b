"""Our matrix product in the repaired interpreter, against float64; re-based weights; the bound that
keeps sums in float16."""

import math

import pytest
import torch

from flux2_pack.flux2_core.kernels import gemm, reference
from flux2_pack.flux2_core.kernels.tiles import TILES, Tile

interpreted = pytest.mark.interpreted

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
SMALL = Tile(32, 64, 64, 4, 3)
DEEP = Tile(64, 32, 128, 4, 3)
SIZES = [(1, 16, 64), (33, 80, 160), (70, 96, 128)]  # M, N, K: none, some, all ragged in each tile
FORMS = {"fp32": 448.0, "block": 448.0, "fp16": gemm.ACTIVATION_MAX[64]}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Results start as NaN: what a kernel leaves out shows."""
    new_empty = torch.Tensor.new_empty

    def poison(*args, **kwargs):
        out = new_empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def quantised(rows: int, columns: int, top: float = 448.0, seed: int = 0):
    """Gaussian numbers as codes up to `top`, and the scale of each row."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale = x.abs().amax(1, keepdim=True) / top
    return (x / scale).clamp(-top, top).to(E4M3), scale


def exact(codes, scale, weight, weight_scale):
    return (codes.double() * scale.double()) @ (weight.double() * weight_scale.double()).T


def rel(y, wanted) -> float:
    return ((y.double() - wanted).norm() / wanted.norm()).item()


def sqnr(y, wanted) -> float:
    return -20 * math.log10(rel(y, wanted))


def operands(m: int, n: int, k: int, form: str, tile: Tile = SMALL):
    top = gemm.ACTIVATION_MAX[tile.k] if form == "fp16" else FORMS[form]
    weights = float(gemm.WEIGHT_MAX) if form == "fp16" else 448.0
    return *quantised(m, k, top), *quantised(n, k, weights, seed=1)


@interpreted
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_product(form, size):
    """Contract 2.0e-3; the rounding to bfloat16 alone gives 1.66e-3. Seen: 1.7e-3."""
    a, sa, b, sb = operands(*size, form)
    assert rel(gemm.fp8(a, sa, b, sb, SMALL, form), exact(a, sa, b, sb)) <= 2.0e-3


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_product_in_float32(form):
    """Seen: 4e-8; in float16 slices 2.0e-4, a rounding for each slice."""
    a, sa, b, sb = operands(33, 80, 160, form)
    y = gemm.fp8(a, sa, b, sb, SMALL, form, torch.float32)
    assert rel(y, exact(a, sa, b, sb)) <= (5e-4 if form == "fp16" else 1e-6)


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_rows_with_gaps_and_one_scale(form):
    """Codes as part of a wider buffer, the weight's scale one for all."""
    a, sa, b, sb = operands(33, 80, 128, form)
    wide_a = torch.full((33, 256), 0x7F, dtype=torch.uint8)  # NaN all around
    wide_b = torch.full((80, 192), 0x7F, dtype=torch.uint8)
    wide_a[:, 64:192], wide_b[:, :128] = a.view(torch.uint8), b.view(torch.uint8)
    a_view, b_view = wide_a.view(E4M3)[:, 64:192], wide_b.view(E4M3)[:, :128]
    y = gemm.fp8(a_view, sa, b_view, sb[3, 0], SMALL, form)
    assert rel(y, exact(a, sa, b, sb[3])) <= 2.0e-3


@interpreted
@pytest.mark.parametrize("rank", [0, 4, 16, 40])
@pytest.mark.parametrize("parts", ["gate", "residual", "gate residual"])
def test_epilogue(parts, rank):
    """residual + gate (product + low up'), rounded once. Seen: 1.7e-3."""
    m, n, k = 70, 80, 128
    a, sa, b, sb = operands(m, n, k, "fp32")
    draw = torch.Generator().manual_seed(2)
    wide = torch.randn(m, n + 16, generator=draw).to(BF16)  # a residual with gaps between rows
    residual = wide[:, :n] if "residual" in parts else None
    gate = torch.randn(n, generator=draw).to(BF16) if "gate" in parts else None
    low = torch.randn(m, rank, generator=draw).to(BF16) if rank else None
    up = torch.randn(n, rank, generator=draw).to(BF16) if rank else None
    wanted = exact(a, sa, b, sb)
    if low is not None:
        wanted += low.double() @ up.double().T
    if gate is not None:
        wanted *= gate.double()
    if residual is not None:
        wanted += residual.double()
    y = gemm.fp8(a, sa, b, sb, SMALL, "fp32", BF16, gemm.Epilogue(residual, gate, low, up))
    assert rel(y, wanted) <= 2.0e-3


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_linear_keeps_28_decibels(form):
    """A linear layer from end to end, against float64 without quantisation. Seen: 28.4
    to 28.6 dB."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(64, 1024, generator=draw).to(BF16)
    w = torch.randn(64, 1024, generator=draw) * 0.02
    a, sa = reference.quantize_rows(x)
    b, sb = reference.quantize_rows(w)
    if form == "fp16":
        gemm.rebase(b)
        sb, top = sb * gemm.REBASE, gemm.ACTIVATION_MAX[64]
        sa = x.float().abs().amax(1, keepdim=True) / top
        a = (x.float() / sa).clamp(-top, top).to(E4M3)
    y = gemm.fp8(a, sa, b, sb, Tile(64, 64, 64, 4, 3), form)
    assert sqnr(y, x.double() @ w.double().T) >= 28.3


@interpreted
@pytest.mark.parametrize("tile", [SMALL, DEEP], ids=str)
def test_no_input_overflows_float16(tile):
    """The largest codes everywhere, and with them the exact result; with codes of full range the
    same product is infinite, which is what the maxima are for."""
    depth = 2 * tile.k
    full = [torch.full((32, depth), top).to(E4M3) for top in (gemm.ACTIVATION_MAX[tile.k], 28.0)]
    one = torch.ones(32, 1)
    y = gemm.fp8(full[0], one, full[1], one, tile, "fp16", torch.float32)
    assert (y == gemm.ACTIVATION_MAX[tile.k] * gemm.WEIGHT_MAX * depth).all()
    largest = torch.full((32, depth), 448.0).to(E4M3)
    assert gemm.fp8(largest, one, full[1], one, tile, "fp16", torch.float32).isinf().all()


def test_shipped_float16_tiles_have_a_safe_maximum():
    for (form, _), buckets in TILES.items():
        if form == "fp16":
            for tile in (t for bucket in buckets.values() for t in bucket):
                most = gemm.ACTIVATION_MAX[tile.k] * gemm.WEIGHT_MAX * tile.k
                # three roundings upwards, one after each instruction of depth 32
                assert most * (1 + 2**-11) ** (tile.k // 32) < torch.finfo(torch.float16).max


@pytest.mark.parametrize("depth", [64, 128])
def test_float16_slices_cost_next_to_nothing(depth):
    """An instruction of depth 32 exact, its sum rounded to float16, as the cards do: against the
    same codes in float32. Seen: 0.001 dB with both depths; 28.4 to 28.7 dB, as with full codes."""
    k = 3072
    draw = torch.Generator().manual_seed(4)
    x, w = torch.randn(128, k, generator=draw), torch.randn(128, k, generator=draw) * 0.02
    wanted = x.double() @ w.double().T

    def codes(v, top):
        scale = v.abs().amax(1, keepdim=True) / top
        return (v / scale).clamp(-top, top).to(E4M3).float(), scale

    (a, sa), (b, sb) = codes(x, gemm.ACTIVATION_MAX[depth]), codes(w, float(gemm.WEIGHT_MAX))
    acc = torch.zeros(128, 128)
    for start in range(0, k, depth):
        part = torch.zeros(128, 128, dtype=torch.float16)
        for i in range(start, start + depth, 32):
            part = (part.float() + a[:, i : i + 32] @ b[:, i : i + 32].T).half()
        acc += part.float()
    cost = sqnr(a @ b.T * sa * sb.T, wanted) - sqnr(acc * sa * sb.T, wanted)
    assert cost <= 0.01
    assert sqnr(acc * sa * sb.T, wanted) >= 28.3


# ------------------------------------------------------------------------------ weights alone


@interpreted
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_only(size):
    """Seen: up to 1.9e-3 (one row), the rounding to bfloat16."""
    m, n, k = size
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(5)).to(BF16)
    b, sb = quantised(n, k, seed=1)
    y = gemm.weight_only(x, b, sb, SMALL)
    assert rel(y, exact(x, torch.ones(()), b, sb)) <= 2.0e-3


@interpreted
def test_weight_only_decodes_every_code():
    """All 254 numbers of e4m3, subnormal ones too, come through unchanged."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(E4M3)
    weight = torch.zeros(254, 64).to(E4M3)
    weight.view(torch.uint8)[:, 5] = codes.view(torch.uint8)
    y = gemm.weight_only(torch.eye(64, dtype=BF16), weight, torch.ones(()), SMALL)
    assert torch.equal(y[5].float(), codes.float())


@interpreted
def test_weight_only_keeps_small_rows():
    """Activations of 1e-30: scaled at the end instead, the sums would leave float32."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(6)).mul(1e-30).to(BF16)
    b, sb = quantised(32, 64)
    y = gemm.weight_only(x, b, sb, SMALL)
    assert rel(y, exact(x, torch.ones(()), b, sb)) <= 2.0e-3


# ---------------------------------------------------------------------------------- re-basing


def every_code():
    return torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(E4M3)


def test_rebase_is_undone_bit_for_bit():
    codes = every_code()
    before, place = codes.view(torch.uint8).clone(), codes.data_ptr()
    undo = gemm.rebase(codes)
    assert not torch.equal(codes.view(torch.uint8), before)
    gemm.restore(codes, undo)
    assert torch.equal(codes.view(torch.uint8), before) and codes.data_ptr() == place


def test_rebase_divides_by_16():
    """Off by at most half of e4m3's finest step: 3.5e-5 of the largest. Gaussian weights are
    remembered at under 1 % of their places. Seen: 0.12 %."""
    codes = every_code()
    finite = codes.float().isfinite()
    wanted = codes.float() / gemm.REBASE
    gemm.rebase(codes)
    assert codes.float()[finite].abs().max() == gemm.WEIGHT_MAX
    error = (codes.float() - wanted)[finite].abs().max()
    assert error <= 3.5e-5 * gemm.WEIGHT_MAX
    weight = reference.quantize_rows(torch.randn(64, 3072))[0]
    assert gemm.rebase(weight).places.numel() < 0.01 * weight.numel()
