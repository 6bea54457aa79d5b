"""The interpreter that proves the kernels, itself held to PyTorch and to float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from flux2_pack.flux2_core.kernels.jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

pytestmark = pytest.mark.interpreted

KINDS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@kernel
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n).to(y.dtype.element_ty)
    tl.store(y + i, value, mask=i < n)


def cast(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=kind)
    cast_kernel[(-(-x.numel() // 65536),)](x, y, x.numel(), BLOCK=65536)
    return y


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def all_of(kind: torch.dtype) -> torch.Tensor:
    """Every number, infinity and NaN of a type of 8 or 16 bits."""
    if kind.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(kind)
    return torch.arange(-32768, 32768, dtype=torch.int16).view(kind)


def expected(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """PyTorch's cast; to fp8 saturating, which PyTorch before 2.12 does not."""
    if kind.itemsize == 1:
        top = torch.finfo(kind).max
        return x.float().clamp(-top, top).to(kind)
    return x.to(kind)


PAIRS = [(s, t) for s in KINDS for t in KINDS if s not in (t, "fp32")]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_casts_of_every_number(source, target):
    x, kind = all_of(KINDS[source]), KINDS[target]
    y, right = cast(x, kind), expected(x, kind)
    nan = x.float().isnan()
    assert torch.equal(bits(y)[~nan], bits(right)[~nan])
    assert y.float()[nan].isnan().all()
    if target == "fp8e4nv":
        assert (bits(y)[nan] == 0x7F).all()


@pytest.mark.parametrize("target", ["bf16", "fp16", "fp8e4nv", "fp8e5"])
def test_casts_of_float32(target):
    """Random numbers of all magnitudes, every number of the target, the midpoints between them and
    their neighbours."""
    kind = KINDS[target]
    g = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(torch.int32)
    exact = all_of(kind).float()
    exact = exact[exact.isfinite()].sort().values
    middle = (exact[1:].double() + exact[:-1].double()).div(2).float()
    ties = torch.cat((exact, middle))
    near = torch.cat((ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(-ties - 1)))
    x = torch.cat((random.view(torch.float32), ties, near))
    y, right = cast(x, kind), expected(x, kind)
    number = ~x.isnan()
    assert torch.equal(bits(y)[number], bits(right)[number])
    assert y.float()[~number].isnan().all()


def test_casts_to_integers_saturate():
    x = torch.tensor([1e20, -1e20, 2.9, -2.9, float("nan"), 7.0])
    assert cast(x, torch.int32).tolist() == [2**31 - 1, -(2**31), 2, -2, 0, 7]
    assert cast(x.bfloat16(), torch.int32).tolist()[2:] == [2, -2, 0, 7]
    assert cast(torch.tensor([257, -3], dtype=torch.int32), torch.bfloat16).tolist() == [256, -3]


@kernel
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[None, :] * K + k[:, None])
    z = tl.dot(x, y, out_dtype=c.dtype.element_ty)
    tl.store(c + m[:, None] * N + n[None, :], z)


# observed: 2.6e-8 to 3.1e-8 in float32, 1.9e-4 to 2.2e-4 in float16
@pytest.mark.parametrize(("out", "most"), [(torch.float32, 6e-8), (torch.float16, 4e-4)])
@pytest.mark.parametrize("source", ["bf16", "fp16", "fp8e4nv", "fp8e5"])
def test_dot(source, out, most):
    torch.manual_seed(0)
    a, b = (torch.randn(n, 64).to(KINDS[source]) for n in (32, 16))
    c = torch.full((32, 16), torch.nan, dtype=out)
    dot_kernel[(1,)](a, b, c, M=32, N=16, K=64)
    right = a.double() @ b.double().T
    assert (c.double() - right).norm() / right.norm() < most


@kernel
def dot_scaled_kernel(
    a, sa, b, sb, c, FORM: tl.constexpr, PACK: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr
):
    m, n = tl.arange(0, 32), tl.arange(0, 16)
    k, s = tl.arange(0, K // PACK), tl.arange(0, K // VEC)
    x = tl.load(a + m[:, None] * (K // PACK) + k[None, :])
    y = tl.load(b + n[None, :] * (K // PACK) + k[:, None])
    p = tl.load(sa + m[:, None] * (K // VEC) + s[None, :])
    q = tl.load(sb + n[:, None] * (K // VEC) + s[None, :])
    z = tl.dot_scaled(x, p, FORM, y, q, FORM, tl.zeros((32, 16), tl.float32))
    tl.store(c + m[:, None] * 16 + n[None, :], z)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat((E2M1, -E2M1)).double()


def e2m1(packed):
    """The lower four bits of a byte come first."""
    pair = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    return E2M1[pair]


@pytest.mark.parametrize("form", ["e4m3", "e5m2", "e2m1 nv", "e2m1 mx"])
def test_dot_scaled(form):
    """Observed: 2.3e-8 to 2.8e-8."""
    torch.manual_seed(0)
    name, k = form.split()[0], 128
    vec, sides = 16 if form.endswith("nv") else 32, []
    for rows in (32, 16):
        if name == "e2m1":
            codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8)
            values = e2m1(codes)
        else:
            codes = torch.randn(rows, k).to(E4M3 if name == "e4m3" else E5M2)
            values = codes.double()
        if vec == 16:
            scale = (torch.rand(rows, k // vec) * 4 + 0.1).to(E4M3)
            factor = scale.double()
        else:
            scale = torch.randint(118, 132, (rows, k // vec), dtype=torch.uint8)
            factor = torch.pow(2.0, scale.double() - 127)
        sides.append((codes, scale, values * factor.repeat_interleave(vec, 1)))
    (a, sa, left), (b, sb, right) = sides
    c = torch.full((32, 16), torch.nan)
    pack = 2 if name == "e2m1" else 1
    dot_scaled_kernel[(1,)](a, sa, b, sb, c, FORM=name, PACK=pack, VEC=vec, K=k)
    product = left @ right.T
    assert (c.double() - product).norm() / product.norm() < 6e-8


@kernel
def add_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    tl.store(y + i, value + value, mask=i < n)


@kernel
def largest_kernel(x, y, LESS: tl.constexpr):
    value = tl.load(x + tl.arange(0, 4))
    tl.store(y + tl.arange(0, 4), tl.maximum(value, 1.0))
    tl.store(y + 4 + tl.arange(0, 4), (value != value).to(tl.float32))


@kernel
def assert_kernel(x, y):
    value = tl.load(x)
    tl.device_assert(value > 0, "negative")
    tl.store(y, value)


@kernel
def overlap_kernel(y):
    tl.store(y + tl.program_id(0) // 2, 1.0)


@pytest.mark.parametrize("kind", [torch.bfloat16, E4M3, E5M2])
def test_arithmetic_on_bit_patterns_is_refused(kind):
    x = torch.ones(8).to(kind)
    with pytest.raises(Exception, match="convert to float32 first"):
        add_kernel[(1,)](x, torch.empty_like(x), 8, BLOCK=8)


def test_nan_is_lost_in_a_maximum_and_unequal_to_itself():
    y = torch.empty(8)
    largest_kernel[(1,)](torch.tensor([np.nan, 0.5, 2.0, -np.inf]), y, LESS=True)
    assert y.tolist() == [1, 1, 2, 1, 1, 0, 0, 0]


def test_addresses_outside_the_tensors_are_refused():
    x = torch.ones(16)
    add_kernel[(1,)](x, torch.empty(7), 7, BLOCK=8)
    with pytest.raises(Exception, match=r"1 elements to store .* lie in no tensor"):
        add_kernel[(1,)](x, torch.empty(7), 8, BLOCK=8)
    with pytest.raises(Exception, match=r"1 elements to load .* lie in no tensor"):
        add_kernel[(1,)](x[:7], torch.empty(8), 8, BLOCK=8)


def test_a_second_store_is_refused():
    overlap_kernel[(1,)](torch.empty(1))
    with pytest.raises(Exception, match="1 elements were stored more than once"):
        overlap_kernel[(2,)](torch.empty(1))


def test_assertions_are_heard():
    assert_kernel[(1,)](torch.ones(1), torch.empty(1))
    with pytest.raises(Exception, match=r"device_assert in program \(0, 0, 0\): negative"):
        assert_kernel[(1,)](-torch.ones(1), torch.empty(1))


def test_autotune_takes_the_first_configuration():
    import triton

    tuned = triton.autotune([triton.Config({"BLOCK": n}) for n in (8, 16)], key=["n"])(
        add_kernel.jitted if hasattr(add_kernel, "jitted") else add_kernel
    )
    y = torch.empty(8)
    tuned[(1,)](torch.ones(8), y, 8)
    assert y.tolist() == [2] * 8
