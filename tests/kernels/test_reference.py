"""The definitions, against float64 and against what the formats themselves say; and the eager
implementations, whose codes are the definitions'."""

import pytest
import torch
import torch.nn.functional as F

from flux2_pack.flux2_core import positions
from flux2_pack.flux2_core.kernels import eager, reference, scaled
from flux2_pack.tests.core.toys import decibels

E4M3 = reference.E4M3
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def bits(x):
    return x.view(torch.uint8)


def same(made, right):
    """Codes bit for bit, all else number for number, NaN equal to NaN."""
    for a, b in zip(made, right, strict=True):
        if a.dtype == E4M3:
            assert torch.equal(bits(a), bits(b))
        else:
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(0), b.nan_to_num(0))


# -------------------------------------------------------------------------------------- quantising


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_the_nearest(dtype):
    """In float64: no code is nearer to x / scale than the chosen one."""
    x = torch.randn(16, 300).to(dtype) * torch.logspace(-4, 3, 16)[:, None].to(dtype)
    codes, scale = reference.quantize_rows(x)
    every = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    every = torch.cat((-every.flip(0), every))
    wanted = x.double() / scale.double()
    nearest = (wanted[..., None] - every).abs().amin(-1)
    # as near, but for the rounding of x * (448 / amax) in float32
    assert ((codes.double() - wanted).abs() <= nearest + 1e-6 * wanted.abs()).all()
    assert (codes.double().abs().amax(-1) == 448).all()


def test_scale_is_the_largest_magnitude_over_448():
    x = torch.randn(8, 64)
    scale = reference.quantize_rows(x)[1]
    assert torch.equal(scale, x.abs().amax(-1, keepdim=True) * (torch.ones(1) / 448))
    assert scale.dtype == torch.float32


def test_a_row_of_zeros_and_rows_of_all_magnitudes():
    x = torch.tensor([[0.0, -0.0], [1e-30, -1e-31], [3e38, 1e38], [1e-12, 1e-12]])
    codes, scale = reference.quantize_rows(x)
    assert bits(codes[0]).tolist() == [0, 0x80]
    assert scale.isfinite().all() and (scale > 0).all()
    assert codes.float()[2].tolist() == [448, 144]  # 149.33 lies between 144 and 160


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("make", [reference.quantize_rows, eager.quantize_rows])
def test_nan_and_infinity_spoil_their_row_alone(make, value):
    x = torch.randn(3, 8)
    x[1, 2] = value
    codes, scale = make(x)
    assert (bits(codes[1]) == 0x7F).all() and scale[1].isnan()
    assert codes.float()[::2].isfinite().all() and scale[::2].isfinite().all()
    product = reference.fp8_linear(codes, scale, torch.ones(4, 8).to(E4M3), torch.ones(()))
    assert product.isnan().all(1).tolist() == [False, True, False]


# observed: 31.5 to 31.6 dB, the format's own
def test_fused_definitions_against_float64():
    x, y = torch.randn(2, 2, 5, 384).bfloat16()
    gate, shift, scale = (torch.randn(3, 2, 1, 384) * 0.3).bfloat16()
    wide = [t.double() for t in (x, y, gate, shift, scale)]
    new = wide[0] + wide[2] * wide[1]
    normal = (new - new.mean(-1, keepdim=True)) / (new.var(-1, False, keepdim=True) + 1e-6).sqrt()
    right = (normal * (1 + wide[4]) + wide[3]).flatten(0, 1)
    made, codes, s = reference.gated_modulate_quantize(x, y, gate, shift, scale)
    assert made.dtype == x.dtype and decibels(made, new) >= 55
    assert decibels(codes.double() * s.double(), right) >= 31.3
    assert decibels(reference.modulated(new, wide[3], wide[4]).flatten(0, 1), right) >= 200

    mlp, attention = torch.randn(7, 2 * 96).bfloat16(), torch.randn(7, 32).bfloat16()
    a, b = mlp.double().chunk(2, -1)
    right = torch.cat((attention.double(), a / (1 + (-a).exp()) * b), -1)
    codes, s = reference.swiglu_quantize(mlp, attention)
    assert decibels(codes.double() * s.double(), right) >= 31.3
    assert torch.equal(reference.activated(mlp)[0], reference.activated(mlp, attention)[0, 32:])


def test_heads_are_normalised_and_turned():
    """Against RMSNorm and complex numbers in float64; the table is the model's own."""
    rope = positions.rope(positions.sequence_ids(3, (2, 2)), (8, 8, 8, 8), 2000)
    qkv, text = torch.randn(2, 4, 3 * 5 * 32), torch.randn(2, 3, 3 * 5 * 32)
    weights = torch.rand(4, 32) + 0.5
    made = reference.qk_norm_rope(
        *(t.double() for t in (qkv, *weights[:2], *rope, text, *weights[2:]))
    )
    whole = torch.cat((text, qkv), 1).double().view(2, 7, 3, 5, 32).permute(2, 0, 3, 1, 4)
    angles = torch.complex(*(t.double() for t in rope))
    for i in range(2):
        x = F.rms_norm(whole[i], (32,), eps=1e-6)
        x = torch.cat((x[:, :, :3] * weights[2 + i], x[:, :, 3:] * weights[i]), 2)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angles
        assert decibels(made[i], torch.view_as_real(turned).flatten(-2)) >= 200
    assert torch.equal(made[2], whole[2])
    once = reference.qk_norm_rope(qkv.bfloat16(), *weights[:2], *(t[3:] for t in rope))
    assert once[0].dtype == torch.bfloat16 and decibels(once[0], made[0][:, :, 3:]) >= 47


# --------------------------------------------------------------------------- stochastic rounding


def test_random_bits_are_philox():
    """The known answers of the generator's own test vectors (Random123, kat_vectors)."""
    zero = reference.random_bits(4, 0, torch.device("cpu"))
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [n & 0xFFFFFFFF for n in zero.tolist()] == expected
    assert torch.equal(
        reference.random_bits(21, 5, torch.device("cpu"), 8),
        reference.random_bits(29, 5, torch.device("cpu"))[8:],
    )


@pytest.mark.parametrize("value", [1.03, -0.0101, 300.0, 0.3, 0.00099, -17.77])
def test_rounding_at_random_is_unbiased(value):
    """The two codes around a number, on average the number: within 4 sigma."""
    count = 1 << 16
    codes = reference.requantize(torch.full((1, count), value), torch.ones(()), 11).float()
    around = codes.unique()
    assert len(around) == 2 and around[0] < value < around[1]
    sigma = (around[1] - around[0]) / 2 / count**0.5
    assert (codes.double().mean() - torch.tensor(value)).abs() < 4 * sigma
    again = reference.requantize(torch.full((1, count), value), torch.ones(()), 11)
    other = reference.requantize(torch.full((1, count), value), torch.ones(()), 12)
    assert torch.equal(again.float(), codes) and not torch.equal(other.float(), codes)


def test_codes_stay_what_they_are():
    every = torch.arange(256, dtype=torch.uint8)
    every[[0x7F, 0xFF]] = 0
    made = reference.requantize(every.view(E4M3).float()[None] * 0.25, torch.tensor(0.25), 3)
    assert torch.equal(bits(made[0]), every)
    broken = torch.tensor([[torch.nan, torch.inf, -1e30, 448.0]])
    made = reference.requantize(broken, torch.ones(1, 1), 3)
    assert bits(made[0]).tolist() == [0x7F, 0x7E, 0xFE, 0x7E]


# ---------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("rows", [True, False])
def test_products_against_float64(rows):
    """Observed: 1.66e-3, bfloat16's own; 4e-8 in float32."""
    x, w = torch.randn(9, 256), torch.randn(40, 256)
    codes, scale = reference.quantize_rows(x)
    weight, weight_scale = reference.quantize_rows(w)
    weight_scale = weight_scale if rows else torch.tensor(0.02)
    right = (codes.double() * scale.double()) @ (weight.double() * weight_scale.double()).T
    for dtype, most in ((torch.bfloat16, 2e-3), (torch.float32, 5e-7)):
        made = reference.fp8_linear(codes, scale, weight, weight_scale, dtype)
        assert made.dtype == dtype and (made.double() - right).norm() / right.norm() < most
    right = x.double() @ (weight.double() * weight_scale.double()).T
    made = reference.fp8_weight_linear(x, weight, weight_scale)
    assert (made.double() - right).norm() / right.norm() < 5e-7


# -------------------------------------------------------------------------------- plain and in parts


@pytest.mark.parametrize("chunk", [1, 700, 1 << 18])
def test_eager_codes_are_the_definitions(monkeypatch, chunk):
    monkeypatch.setattr(eager, "CPU_CHUNK", chunk)
    x, y = torch.randn(2, 2, 9, 200).bfloat16()
    x[1, 3, 7] = torch.inf
    gate, shift, scale = (torch.randn(3, 2, 1, 200) * 0.3).bfloat16()
    for dtype in FLOATS:
        rows = (torch.randn(40, 333) * torch.logspace(-6, 3, 40)[:, None]).to(dtype)[:, 3:]
        rows[2], rows[3, 0] = 0, torch.nan
        same(eager.quantize_rows(rows), reference.quantize_rows(rows))
    sides = (shift, scale)
    same(eager.modulate_quantize(x, *sides), reference.modulate_quantize(x, *sides))
    sides = (y, gate, *sides)
    same(eager.gated_modulate_quantize(x, *sides), reference.gated_modulate_quantize(x, *sides))
    packed, attention = torch.randn(11, 400).bfloat16(), torch.randn(11, 60).bfloat16()
    mlp = packed[:, 100:350]
    same(eager.swiglu_quantize(mlp), reference.swiglu_quantize(mlp))
    same(eager.swiglu_quantize(mlp, attention), reference.swiglu_quantize(mlp, attention))
    weight, s = torch.randn(9, 50), torch.rand(9, 1) * 0.01
    assert torch.equal(
        bits(eager.requantize(weight, s, 5)), bits(reference.requantize(weight, s, 5))
    )


def test_eager_of_no_rows_at_all():
    """References that are computed alone stand beside an empty text and picture."""
    x, part = torch.randn(2, 0, 32), torch.randn(2, 1, 32)
    made = eager.modulate_quantize(x, part, part)
    assert [tuple(t.shape) for t in made] == [(0, 32), (0, 1)]
    made = eager.gated_modulate_quantize(x, x, part, part, part)
    assert [tuple(t.shape) for t in made] == [(2, 0, 32), (0, 32), (0, 1)]


def test_eager_heads_are_the_definitions(monkeypatch):
    monkeypatch.setattr(eager, "CPU_CHUNK", 1000)
    qkv, text = (torch.randn(2, n, 3 * 4 * 16 + 8)[..., :192].bfloat16() for n in (7, 5))
    weights, rope = torch.rand(4, 16).bfloat16(), torch.rand(2, 12, 8)
    arguments = (qkv, *weights[:2], *rope, text, *weights[2:])
    made, right = eager.qk_norm_rope(*arguments), reference.qk_norm_rope(*arguments)
    assert all(a.stride() == b.stride() for a, b in zip(made, right, strict=True))
    assert all(a.transpose(1, 2).is_contiguous() for a in made)  # a token's heads stand together
    assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(1, 300), (37, 640), (600, 64)])
@pytest.mark.parametrize("by_row", [True, False])
def test_weights_decoded_on_a_cpu(monkeypatch, rows, columns, by_row):
    """Observed: 2.3e-3, rounded twice."""
    monkeypatch.setattr(eager, "WEIGHT_CHUNK", 1 << 15)
    x = torch.randn(rows, 96).bfloat16()
    weight, scale = reference.quantize_rows(torch.randn(columns, 96))
    scale = scale if by_row else torch.tensor(0.01)
    made = eager.cpu_weight_linear(x, weight, scale)
    right = x.double() @ (weight.double() * scale.double()).T
    assert (made.double() - right).norm() / right.norm() < 3e-3


def test_every_code_is_decoded_exactly():
    """Through the product itself: matrix instructions take tiny numbers for zero."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)[:, None]
    memory = torch.empty(256, 1, dtype=torch.int16)
    values, scale = eager.decode(every, memory, torch.ones(256, 1))
    finite = ~every.float().isnan()
    assert finite.sum() == 254 and values.dtype == torch.bfloat16
    assert torch.equal(values[finite].float(), every.float()[finite])
    assert torch.equal(scale.isnan(), ~finite)
    x = torch.eye(32).bfloat16()
    weight = every.repeat(1, 32).contiguous()
    made = eager.cpu_weight_linear(x, weight, torch.ones(()))
    right = every.float().T.repeat(32, 1)
    assert torch.equal(made.float().nan_to_num(9e9), right.nan_to_num(9e9))


def test_other_eager_products():
    x = torch.randn(5, 64).bfloat16()
    weight, scale = reference.quantize_rows(torch.randn(30, 64))
    right = reference.fp8_weight_linear(x.double(), weight, scale.double())
    made = scaled.decoded_weight_linear(x, weight, scale)
    assert (made.double() - right).norm() / right.norm() < 3e-3
