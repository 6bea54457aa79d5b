"""The passes that give numbers, in Triton's interpreter, beside float64."""

import pytest
import torch

from flux2_pack.flux2_core.kernels import decode, producers, reference
from flux2_pack.tests.core.toys import decibels
from flux2_pack.tests.kernels.test_producers import poisoned_memory, sides  # noqa: F401

pytestmark = pytest.mark.interpreted

LEAST = {torch.bfloat16: 55, torch.float16: 73, torch.float32: 120}
SIZES = [
    (1, 521, 64, torch.bfloat16),
    (2, 131, 96, torch.bfloat16),
    (2, 3, 6144, torch.bfloat16),
    (2, 5, 3072, torch.float16),
    (1, 1, 4096, torch.float32),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def near(made, right):
    """observed: 55.4 dB and more in bfloat16, 73.5 in float16, 139 in float32"""
    assert made.is_contiguous() and decibels(made, right) >= LEAST[made.dtype]


@pytest.mark.parametrize(("batch", "rows", "width", "dtype"), SIZES)
def test_norm_and_gate(batch, rows, width, dtype):
    x, shift, scale, gate = sides(batch, rows, width, dtype)
    y = torch.randn(batch, rows, 2 * width).to(dtype)[..., width:]
    before, wide = x.clone(), [t.double() for t in (x, shift, scale)]
    near(producers.modulate(x, shift, scale), reference.modulated(*wide))
    right = x.double() + gate.double() * y.double()
    near(producers.gated_add(x, y, gate), right)
    new, normal = producers.gated_modulate(x, y, gate, shift, scale)
    near(new, right)
    near(normal, reference.modulated(new.double(), *wide[1:]))  # the norm is of what is stored
    assert torch.equal(x, before)


def test_gated_sums_are_pytorchs_own_bit_for_bit():
    """In float32 inside, rounded once: as torch.addcmul does it."""
    x, _, _, gate = sides(2, 33, 96)
    y = torch.randn(2, 33, 96).bfloat16()
    right = torch.addcmul(x.float(), gate.float(), y.float()).bfloat16()
    assert torch.equal(producers.gated_add(x, y, gate), right)


@pytest.mark.parametrize(
    ("rows", "n", "m"), [(521, 48, 32), (1, 96, 32), (3, 9216, 3072), (2, 18432, 6144), (4, 96, 0)]
)
def test_swiglu(rows, n, m):
    packed = torch.randn(rows, 3 * m + 2 * n).bfloat16()
    beside = torch.randn(rows, 2 * m).bfloat16()[:, m:] if m else None
    made = producers.swiglu(packed[:, 3 * m :], beside)
    near(
        made, reference.activated(packed[:, 3 * m :].double(), None if m == 0 else beside.double())
    )
    assert m == 0 or torch.equal(made[:, :m], beside)


def test_what_is_broken_stays_broken():
    x, shift, scale, gate = sides(1, 4, 64)
    x[0, 1, 5] = torch.nan
    made = producers.modulate(x, shift, scale)
    assert made[0, 1].isnan().all() and made[0, [0, 2, 3]].isfinite().all()
    assert producers.gated_add(x, x, gate)[0, 1, 5].isnan()
    assert producers.modulate(x[:, :0], shift, scale).shape == (1, 0, 64)


# -------------------------------------------------------------------------------- decoded weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7])
def test_decoded_weights_are_pytorchs_own_bit_for_bit(rows, dtype):
    """Every code, NaN too, with one scale and with one for each row."""
    every = torch.arange(256, dtype=torch.uint8).repeat(rows, 9)[:, 3:].contiguous()
    codes = every.view(torch.float8_e4m3fn)
    for scale in (torch.rand(rows, 1) * 0.03, torch.tensor(0.7)):
        right = (codes.float() * scale).to(dtype)
        assert torch.equal(
            decode.decoded(codes, scale, dtype).nan_to_num(7.25), right.nan_to_num(7.25)
        )
    assert decode.decoded(codes[:0], torch.ones(()), dtype).shape == (0, codes.shape[1])


def test_products_of_decoded_weights_are_those_of_a_plain_layer():
    x, codes = torch.randn(5, 64).bfloat16(), torch.randn(24, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(24, 1)
    plain = torch.nn.functional.linear(x, (codes.float() * scale).bfloat16())
    assert torch.equal(decode.weight_linear(x, codes, scale), plain)
