"""Plain fp8 codes as MXFP8: scales of rows as those of blocks. No card here multiplies them: what the
library is given is read back with its definition."""

import pytest
import torch

from flux2_pack.flux2_core.formats import unswizzle
from flux2_pack.flux2_core.kernels import blocks, ops, reference, replicated, scaled, table, tune
from flux2_pack.flux2_core.kernels.tiles import Tile

BF16 = torch.bfloat16
CARD = torch.device("cuda", 0)


def operands(rows=37, columns=96, depth=160):
    torch.manual_seed(0)
    x = torch.randn(rows, depth) * torch.logspace(-4, 3, rows)[:, None]
    return *reference.quantize_rows(x), *reference.quantize_rows(torch.randn(columns, depth) * 0.1)


def test_a_scale_is_a_power_of_two_and_the_rest():
    scale = torch.tensor([1.0, 2.0, 0.75, 3e-15, 448.0, 1.9999999, torch.nan, torch.inf])[:, None]
    exponents, rest = replicated.powers(scale)
    made = torch.exp2(exponents.double() - 127) * rest
    assert torch.equal(made[:6], scale[:6].double())
    assert ((rest[:6] >= 1) & (rest[:6] < 2)).all() and (exponents[6:] == 255).all()


@pytest.mark.parametrize(("rows", "depth"), [(1, 32), (37, 160), (300, 96)])
def test_each_block_of_a_row_has_its_power(rows, depth):
    exponents = torch.randint(100, 150, (rows, 1), dtype=torch.uint8)
    mine, theirs = replicated.containers(exponents, 96, depth)
    each = unswizzle(mine, rows, depth // 32)
    assert torch.equal(each, exponents.expand(-1, depth // 32))
    assert (unswizzle(theirs, 96, depth // 32) == 127).all()
    for container, lines in ((mine, rows), (theirs, 96)):
        assert blocks._scales_fit(container, torch.empty(lines, depth), 32)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("one", [True, False])
def test_it_means_what_fp8_linear_means(one, dtype):
    """By the definition of MXFP8's product. Rounded three times: seen 2.5e-3."""
    codes, scale, weight, weight_scale = operands()
    weight_scale = weight_scale.mean() if one else weight_scale
    given = (codes, scale, weight, weight_scale, dtype)
    wanted = reference.fp8_linear(*given[:4], torch.float32)
    for product in (blocks.mxfp8_reference, blocks.mxfp8_eager):
        y = replicated.fp8_linear(*given, product=product)
        assert y.dtype == dtype and y.shape == wanted.shape
        assert (y.float() - wanted).norm() <= 3.5e-3 * wanted.norm()


def test_what_the_library_is_given(monkeypatch):
    """Rows in multiples of 16, the weight's transpose as a view, scales flat and in whole tiles."""
    given = []

    def product(a, b, scale_a, recipe_a, scale_b, recipe_b, order_a, order_b, output_dtype):
        given.append((a, b, scale_a, recipe_a, scale_b, recipe_b, order_a, order_b))
        return torch.zeros(a.shape[0], b.shape[1], dtype=output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", product)
    codes, scale, weight, weight_scale = operands()
    assert replicated.fp8_linear(codes, scale, weight, weight_scale).shape == (37, 96)
    a, b, scale_a, recipe_a, scale_b, recipe_b, *orders = given[0]
    assert a.shape == (48, 160) and a.is_contiguous() and b.stride() == (1, 160)
    assert scale_a.numel() == scale_b.numel() == 128 * 8
    assert scale_a.dtype == scale_b.dtype == torch.float8_e8m0fnu
    assert recipe_a == recipe_b == torch.nn.functional.ScalingType.BlockWise1x32
    assert set(orders) == {torch.nn.functional.SwizzleType.SWIZZLE_32_4_4}


def test_tuning_alone_switches_it_on(monkeypatch):
    monkeypatch.setattr(scaled, "triton_missing", lambda: None)
    found = {"arch": "sm_120", "is": None}
    monkeypatch.setattr(table, "architecture", lambda device: found["arch"])
    monkeypatch.setattr(tune, "found", lambda *_: found["is"])
    dtypes, widths, rows = ops.FP8_LINEAR.typical
    case = table.Case(CARD, dtypes, widths, rows)

    def chosen():
        return ops.FP8_LINEAR.resolve(case)[0].name

    assert chosen() == "torch"
    found["is"] = tune.Found("mxfp8", None, 1.5)
    assert chosen() == "mxfp8"
    found["is"] = tune.Found("mxfp8", None, 1.05)
    assert chosen() == "torch"
    found["is"] = tune.Found("block", Tile(128, 128, 128, 8, 2), 1.5)
    assert chosen() == "triton"
    found.update({"arch": "sm_90", "is": tune.Found("mxfp8", None, 1.5)})
    assert chosen() == "torch"
