"""The segment algebra against softmax(q k' / sqrt(D) + log w) written out in float64."""

import pytest
import torch

from flux2_pack.flux2_core import attention
from flux2_pack.flux2_core.attention import attend, attend_lse, attend_segments, explicit, table

LENGTHS = (7, 20, 5, 11)
ALL = sum(LENGTHS)


def qkv(queries=ALL, keys=ALL, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, 32, generator=generator).to(dtype) for n in (queries, keys, keys)]


def dense(queries, keys, weight):
    """The table written out: log w for every query and key."""
    rows = []
    for a, n in enumerate(queries):
        row = []
        for b, m in enumerate(keys):
            w = weight(a, b)
            w = w.double() if isinstance(w, torch.Tensor) else torch.full((n,), float(w)).double()
            row.append(w[:, None].expand(n, m))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows).log()


def error(weight, queries=LENGTHS, keys=LENGTHS, dtype=torch.float32):
    q, k, v = qkv(sum(queries), sum(keys), dtype)
    got = attend_segments(q, k, v, table(queries, keys, weight))
    q, k, v = (x.double() for x in (q, k, v))
    wanted = attention.joined(explicit(q, k, v, dense(queries, keys, weight))[0])
    return ((got - wanted).abs().max() / wanted.std()).item()


def grid(numbers):
    return lambda a, b: numbers[a][b]


def test_all_ones_is_one_stock_call_bit_for_bit():
    q, k, v = qkv()
    made = table(LENGTHS, LENGTHS, lambda a, b: 1.0)
    assert made.stock
    assert torch.equal(attend_segments(q, k, v, made), attend(q, k, v))


def test_numbers():
    weights = [[1, 1, 0.5, 2], [1, 1, 0.5, 2], [1, 1, 1, 0], [0.25, 0, 3, 1]]
    assert error(grid(weights)) < 5e-6  # seen 1.4e-6


def test_soft_edges():
    edge = torch.linspace(0, 1, LENGTHS[1])
    weights = [[1, 1, 0, 2], [1, 1, edge, edge.flip(0) * 3], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert error(grid(weights)) < 5e-6  # seen 1.5e-6


def test_soft_edges_in_bfloat16():
    edge = torch.linspace(0, 1, LENGTHS[1])
    weights = [[1, 1, 0, 2], [1, 1, edge, edge], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert error(grid(weights), dtype=torch.bfloat16) < 0.04  # seen 0.015


def test_fewer_queries_than_keys():
    weights = [[1, 1, 0.5, 2], [1, 1, 1, 0]]
    assert error(grid(weights), queries=LENGTHS[:2]) < 5e-6  # seen 1.6e-6


def test_a_weight_that_all_keys_share_changes_nothing():
    q, k, v = qkv()
    made = table(LENGTHS, LENGTHS, lambda a, b: 3.0)
    assert torch.equal(attend_segments(q, k, v, made), attend(q, k, v))


def test_unseen_keys_are_not_computed():
    q, k, v = qkv()
    made = table(LENGTHS, LENGTHS, lambda a, b: 0.0 if b == 2 else 1.0)
    out = attend_segments(q, k, v, made)
    k[:, :, 27:32], v[:, :, 27:32] = torch.nan, torch.nan
    assert torch.equal(attend_segments(q, k, v, made), out)


def test_neighbours_of_equal_sight_are_one_call():
    weights = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    made = table(LENGTHS, LENGTHS, grid(weights))
    assert [len(g.parts) for g in made.groups] == [1, 1]
    assert [g.rows for g in made.groups] == [slice(0, 27), slice(27, 43)]
    assert made.groups[1].parts[0].keys == (slice(27, 43),)


def test_the_kernel_is_called_for_keys_of_one_weight():
    calls = []

    def kernel(q, k, v):
        calls.append((q.shape[2], k.shape[2]))
        return attend(q, k, v)

    weights = [[1, 1, 1, 1], [1, 1, 0.5, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    attend_segments(*qkv(), table(LENGTHS, LENGTHS, grid(weights)), kernel)
    assert calls == [(7, 43), (16, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_of_this_device(dtype):
    q, k, v = qkv(dtype=dtype)
    out, lse = attend_lse(q, k, v)
    wanted, wanted_lse = explicit(*(x.double() for x in (q, k, v)))
    assert lse.dtype == torch.float32
    limit = 1e-5 if dtype == torch.float32 else 2e-2  # seen 4.4e-7, 3.7e-3
    assert (lse - wanted_lse).abs().max() < limit
    assert (out - wanted).abs().max() < limit


def test_explicit_in_pieces_is_explicit_at_once():
    q, k, v = qkv(dtype=torch.float64)
    for a, b in zip(explicit(q, k, v, rows=6), explicit(q, k, v), strict=True):
        assert torch.allclose(a, b, atol=1e-14)
