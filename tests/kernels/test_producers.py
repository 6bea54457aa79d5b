"""The fused Triton kernels against their definitions, in Triton's repaired interpreter.

What is not written is NaN: PyTorch fills new memory so. Lengths are the model's; of long ones some
rows are computed, and all others must stay as they were.
"""

import functools
import os
import random

import pytest
import torch

from flux2_pack.flux2_core.kernels import producers, reference
from flux2_pack.tests.core.toys import decibels

if os.environ.get("TRITON_INTERPRET") == "1":
    from flux2_pack.tests.kernels import shim

pytestmark = pytest.mark.interpreted

E4M3 = torch.float8_e4m3fn
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [4608, 4609, 520, 1]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is full of NaN (255 for whole numbers)."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    assert torch.empty(3, dtype=E4M3).float().isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def sample(rows):
    """Row numbers to compute: all of few, else the ends and some between."""
    if rows <= 24:
        return list(range(rows))
    between = random.Random(rows).sample(range(1, rows - 1), 12)
    return sorted({0, rows - 1, *between})


def untouched(codes, scale, rows):
    """No program writes outside its row."""
    rest = torch.ones(len(codes), dtype=torch.bool)
    rest[rows] = False
    return (bits(codes[rest]) == 0x7F).all() and scale[rest].isnan().all()


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def decoded(codes, scale):
    return codes.double() * scale.double()


def steps(a, b):
    """How many codes lie between two: in order of size, the sign on top."""
    whole = [x.view(torch.uint8).int() for x in (a, b)]
    ordered = [torch.where(x > 127, 128 - x, x) for x in whole]
    return (ordered[0] - ordered[1]).abs()


def close_to(codes, scale, values, least=31.3):
    """The contract of fused producers: `least` dB, at most 0.5 % of codes off, by one step."""
    right_codes, right_scale = reference.quantize_rows(values.float())
    assert decibels(decoded(codes, scale), values) >= least
    off = steps(codes, right_codes)
    assert off.max() <= 1
    assert (off > 0).double().mean() <= 0.005
    assert ((scale - right_scale).abs() <= 1e-5 * right_scale).all()


def strided(rows, width, dtype=torch.bfloat16, beside=40):
    """A view of some columns of a wider matrix, whose other columns are NaN."""
    wide = torch.full((rows, width + beside), torch.nan, dtype=dtype)
    view = wide[:, beside // 2 : beside // 2 + width]
    view.copy_(torch.randn(rows, width) * torch.logspace(-3, 3, rows)[:, None])
    return view


# -------------------------------------------------------------------------------------- quantising


@pytest.mark.parametrize("rows", LENGTHS)
def test_quantised_rows_are_identical(rows):
    x, some = strided(rows, 96), sample(rows)
    with shim.only(some):
        codes, scale = producers.quantize_rows(x)
    right, right_scale = reference.quantize_rows(x)
    assert torch.equal(bits(codes[some]), bits(right[some]))
    assert torch.equal(scale[some], right_scale[some]) and untouched(codes, scale, some)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 2, 3, 64, 100, 3072, 4096, 6144])
def test_quantised_rows_of_all_sizes_are_identical(width, dtype):
    x = (torch.randn(10, width) * torch.logspace(-6, 4, 10)[:, None]).to(dtype)
    x[3] = 0
    x[5, -1] = torch.finfo(dtype).max
    x[6, 0] = torch.finfo(dtype).tiny
    codes, scale = producers.quantize_rows(x)
    right, right_scale = reference.quantize_rows(x)
    assert torch.equal(bits(codes), bits(right)) and torch.equal(scale, right_scale)


@pytest.mark.parametrize("maximum", [448.0, 32.0, 16.0])
def test_a_smaller_maximum(maximum):
    """What sums in float16 ask for: no code above it, and every producer keeps to it."""
    x = (torch.randn(10, 100) * torch.logspace(-6, 4, 10)[:, None]).bfloat16()
    x[3], x[5, 2] = 0, torch.nan
    codes, scale = producers.quantize_rows(x, maximum)
    right, right_scale = reference.quantize_rows(x, maximum)
    assert torch.equal(bits(codes), bits(right)) and torch.equal(bits(scale), bits(right_scale))
    x, shift, scale, gate = sides(2, 6, 96)
    y, mlp = torch.randn(2, 6, 96).bfloat16(), torch.randn(12, 192).bfloat16()
    for made, wanted in (
        (producers.modulate_quantize, (x, shift, scale)),
        (producers.gated_modulate_quantize, (x, y, gate, shift, scale)),
        (producers.swiglu_quantize, (mlp, y.flatten(0, 1))),
        (producers.swiglu_quantize, (mlp, None)),
    ):
        codes, s = made(*wanted, maximum)[-2:]
        right, right_scale = getattr(reference, made.__name__)(*wanted, maximum)[-2:]
        assert codes.float().abs().max() == maximum
        assert (steps(codes, right) > 0).double().mean() <= 0.005  # seen 0
        assert ((s - right_scale).abs() <= 1e-5 * right_scale).all()


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_row_with_nan_or_infinity_shows(value):
    x = torch.randn(3, 100)
    x[1, 70] = value
    codes, scale = producers.quantize_rows(x)
    right, right_scale = reference.quantize_rows(x)
    assert (bits(codes[1]) == 0x7F).all() and scale[1].isnan()
    assert torch.equal(bits(codes), bits(right))
    assert torch.equal(scale[::2], right_scale[::2])


def test_values_that_fill_every_code_and_every_tie():
    """Numbers half way between two codes go to the even one."""
    every = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).float()
    middle = (every[1:] + every[:-1]) / 2
    x = torch.cat((every, middle, -middle, middle.nextafter(torch.tensor(0.0))))[None]
    codes, scale = producers.quantize_rows(x)
    right, right_scale = reference.quantize_rows(x)
    assert torch.equal(bits(codes), bits(right)) and torch.equal(scale, right_scale)


# ---------------------------------------------------------------------------------- norm, modulation


def sides(batch, rows, width, dtype=torch.bfloat16):
    """A picture's rows out of a longer sequence, and modulation as six chunks of one vector."""
    whole = (torch.randn(batch, rows + 3, width) * 2 + 0.5).to(dtype)
    vector = (torch.randn(batch, 6 * width) * 0.3).to(dtype)
    shift, scale, gate, *_ = vector[:, None].chunk(6, -1)
    return whole[:, 2 : 2 + rows], shift, scale, gate


# observed: 31.5 to 31.6 dB, up to 0.1 % of codes off by one
@pytest.mark.parametrize(
    ("batch", "rows", "width"),
    [(1, 4608, 64), (1, 4609, 96), (2, 260, 128), (1, 1, 3072), (3, 5, 4096), (2, 3, 6144)],
)
def test_modulate_quantize(batch, rows, width):
    x, shift, scale, _ = sides(batch, rows, width)
    some = sample(batch * rows)
    with shim.only(some):
        codes, s = producers.modulate_quantize(x, shift, scale)
    wide = [t.double() for t in (x, shift, scale)]
    close_to(codes[some], s[some], reference.modulated(*wide).flatten(0, 1)[some])
    assert untouched(codes, s, some)


@pytest.mark.parametrize(
    ("batch", "rows", "width", "dtype"),
    [
        (1, 4609, 64, torch.bfloat16),
        (2, 260, 96, torch.bfloat16),
        (2, 3, 6144, torch.bfloat16),
        (2, 9, 3072, torch.float16),
        (1, 1, 4096, torch.float32),
    ],
)
def test_gated_modulate_quantize(batch, rows, width, dtype):
    x, shift, scale, gate = sides(batch, rows, width, dtype)
    y = torch.randn(batch, rows, 2 * width).to(dtype)[..., width:]
    before = x.clone()
    some = sample(batch * rows)
    with shim.only(some):
        new, codes, s = producers.gated_modulate_quantize(x, y, gate, shift, scale)
    right = (x.double() + gate.double() * y.double()).flatten(0, 1)[some]
    least = {torch.bfloat16: 55, torch.float16: 73, torch.float32: 140}[dtype]
    assert decibels(new.flatten(0, 1)[some], right) >= least
    assert new.dtype == dtype and torch.equal(x, before)
    wide = [t.double() for t in (new, shift, scale)]
    close_to(codes[some], s[some], reference.modulated(*wide).flatten(0, 1)[some])
    assert untouched(codes, s, some)


def test_a_broken_activation_shows_behind_the_norm():
    x, shift, scale, gate = sides(1, 4, 96)
    y = torch.randn(1, 4, 96).bfloat16()
    y[0, 2, 5] = torch.inf
    _, codes, s = producers.gated_modulate_quantize(x, y, gate, shift, scale)
    assert s.isnan().flatten().tolist() == [False, False, True, False]
    assert (bits(codes[2]) == 0x7F).all()


# ---------------------------------------------------------------------------------------- SwiGLU


# observed: 31.5 to 31.6 dB, no code off
@pytest.mark.parametrize(
    ("rows", "n", "m"),
    [
        (4609, 48, 32),
        (520, 64, 24),
        (1, 96, 32),
        (3, 9216, 3072),
        (2, 12288, 4096),
        (2, 18432, 6144),
    ],
)
def test_swiglu_quantize(rows, n, m):
    """Both halves read out of the projection that also holds q, k and v."""
    packed = torch.randn(rows, 3 * m + 2 * n).bfloat16()
    mlp, attention = packed[:, 3 * m :], torch.randn(rows, 2 * m).bfloat16()[:, m:]
    some = sample(rows)
    with shim.only(some):
        codes, scale = producers.swiglu_quantize(mlp, attention)
    right = reference.activated(mlp.double(), attention.double())
    close_to(codes[some], scale[some], right[some])
    assert untouched(codes, scale, some)


@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu_quantize_alone(dtype):
    """The double blocks' form: nothing beside it. Large numbers neither overflow nor vanish."""
    mlp = torch.randn(37, 2 * 100).to(dtype)
    mlp[0, :4] = torch.tensor([-200.0, 200.0, -90.0, 0.0]).to(dtype)
    codes, scale = producers.swiglu_quantize(mlp)
    close_to(codes, scale, reference.activated(mlp.double()))


def test_swiglu_shows_what_is_broken_on_either_side():
    mlp, attention = torch.randn(4, 200), torch.randn(4, 60)
    mlp[1, 150], attention[2, 59] = torch.nan, torch.inf
    _, scale = producers.swiglu_quantize(mlp, attention)
    assert scale.isnan().flatten().tolist() == [False, True, True, False]


# ------------------------------------------------------------------------------------------- heads


def heads_of(batch, rows, heads, dim, dtype=torch.bfloat16):
    """q | k | v out of the single block's projection, with weights of their own."""
    packed = (torch.randn(batch, rows, 3 * heads * dim + 32) * 2).to(dtype)
    weights = ((1 + 0.2 * torch.randn(2, dim)).to(dtype)).unbind(0)
    return packed[..., : 3 * heads * dim], *weights


def table(rows, dim):
    angle = torch.rand(rows, dim // 2) * 6.28
    return angle.cos(), angle.sin()


# observed: 55.4 to 55.6 dB, which is bfloat16's own
@pytest.mark.parametrize(
    ("batch", "rows", "heads", "dim"),
    [(1, 4608, 16, 32), (1, 4609, 5, 64), (2, 260, 24, 16), (1, 1, 24, 128), (2, 3, 12, 128)],
)
def test_qk_norm_rope(batch, rows, heads, dim):
    qkv, q_weight, k_weight = heads_of(batch, rows, heads, dim)
    rope, some = table(rows, dim), sample(batch * rows)
    with shim.only(some):
        made = producers.qk_norm_rope(qkv, q_weight, k_weight, *rope)
    wide = [t.double() for t in (qkv, q_weight, k_weight)]
    right = reference.qk_norm_rope(*wide, *rope)
    assert all(x.shape == (batch, heads, rows, dim) for x in made)
    assert all(x.transpose(1, 2).is_contiguous() for x in made)
    made, right = ([t.transpose(1, 2).flatten(0, 1) for t in both] for both in (made, right))
    assert all(decibels(x[some], y[some]) >= 55 for x, y in zip(made[:2], right[:2], strict=True))
    assert torch.equal(made[2][some].double(), right[2][some])
    rest = torch.ones(batch * rows, dtype=torch.bool)
    rest[some] = False
    assert all(x[rest].isnan().all() for x in made)


@pytest.mark.parametrize(("text", "rows"), [(9, 6), (0, 5), (5, 0)])
def test_text_and_picture_jointly(text, rows):
    qkv, *weights = heads_of(2, rows, 12, 32)
    words, *text_weights = heads_of(2, text, 12, 32)
    rope = table(text + rows, 32)
    made = producers.qk_norm_rope(qkv, *weights, *rope, words, *text_weights)
    wide = [t.double() for t in (qkv, *weights, *rope, words, *text_weights)]
    right = reference.qk_norm_rope(*wide)
    for x, y in zip(made[:2], right[:2], strict=True):
        assert x.shape == (2, 12, text + rows, 32) and decibels(x, y) >= 55
    assert torch.equal(made[2].double(), right[2])


# --------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize(
    ("dtype", "seed"),
    [*zip(FLOATS, (0, 1, 2**31 + 5), strict=True), (FLOATS[0], 2**62), (FLOATS[2], -7)],
)
def test_requantised_codes_are_identical(dtype, seed):
    weight = (torch.randn(5, 4100) * torch.logspace(-5, 0, 5)[:, None]).to(dtype)
    weight[0, :6] = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e4])
    for scale in (torch.tensor(2e-3), torch.logspace(-6, -2, 5)[:, None]):
        made = producers.requantize(weight, scale, seed)
        assert torch.equal(bits(made), bits(reference.requantize(weight, scale, seed)))


# ----------------------------------------------------------------------------------- no rows at all


def test_no_rows():
    empty = functools.partial(torch.empty, dtype=torch.bfloat16)
    part = empty(1, 1, 64)
    assert producers.quantize_rows(empty(0, 64))[0].shape == (0, 64)
    assert producers.modulate_quantize(empty(1, 0, 64), part, part)[1].shape == (0, 1)
    assert producers.swiglu_quantize(empty(0, 64), empty(0, 8))[0].shape == (0, 40)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 3072, 4096, 6144, 9216, 12288, 18432])
def test_two_blocks_cover_a_row(n):
    a, b = producers.blocks(n)
    assert (a < n or n == 1) and a + b >= n and not a & (a - 1) and not b & (b - 1)
    if n in (3072, 4096, 6144, 9216, 12288, 18432):
        assert a + b == n  # no idle lanes at the model's widths
