"""Ids and rotary tables. Against diffusers: test_transformer_parity.py."""

import math

import pytest
import torch

from flux2_pack.flux2_core.positions import (
    picture_ids,
    rope,
    rope_table,
    rotate,
    sequence_ids,
    text_ids,
)

AXES, THETA = (32, 32, 32, 32), 2000


def test_text_stands_on_the_last_axis():
    assert text_ids(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]


def test_pictures_go_row_by_row():
    assert picture_ids(2, 3, t=10).tolist() == [
        [10, 0, 0, 0], [10, 0, 1, 0], [10, 0, 2, 0],
        [10, 1, 0, 0], [10, 1, 1, 0], [10, 1, 2, 0],
    ]  # fmt: skip


def test_references_stand_at_10_20_30():
    ids = sequence_ids(2, (1, 2), ((1, 1), (2, 1), (1, 3)))
    assert ids.shape == (2 + 2 + 1 + 2 + 3, 4)
    assert ids[:, 0].tolist() == [0, 0, 0, 0, 10, 20, 20, 30, 30, 30]
    assert ids[5:7, 1].tolist() == [0, 1]  # each reference has its own grid from 0


def test_angles():
    ids = torch.tensor([[10, 3, 5, 7]])
    cos, sin = rope(ids, AXES, THETA)
    assert cos.shape == sin.shape == (1, 64)
    for axis, i in ((0, 0), (1, 3), (2, 15), (3, 8)):
        angle = ids[0, axis].item() * THETA ** (-2 * i / 32)
        assert cos[0, 16 * axis + i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert sin[0, 16 * axis + i].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_rotation_is_relative_and_keeps_lengths():
    """q at a times k at b depends on a - b alone: the same shift of both changes nothing."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 4, 128)
    ids = torch.randint(0, 50, (4, 4))
    moved = ids + torch.tensor([20, 7, 3, 11])
    a, b = (rope(i, AXES, THETA) for i in (ids, moved))
    assert torch.allclose(rotate(q, *a).norm(dim=-1), q.norm(dim=-1), rtol=1e-6)
    here, there = (rotate(q, *t) @ rotate(k, *t).mT for t in (a, b))
    assert (here - there).abs().max() < 5e-5  # 3.8e-6, of products of about 11


def test_pairs_lie_side_by_side():
    x = torch.zeros(1, 128)
    x[0, 2] = 1
    cos, sin = rope(torch.tensor([[1, 0, 0, 0]]), AXES, THETA)
    y = rotate(x, cos, sin)
    assert y[0, 2] == cos[0, 1] and y[0, 3] == sin[0, 1]
    assert y.count_nonzero() == 2


def test_the_table_is_kept():
    args = (3, (2, 2), ((1, 1),), AXES, THETA, torch.device("cpu"))
    assert rope_table(*args)[0] is rope_table(*args)[0]
    assert torch.equal(rope_table(*args)[0], rope(sequence_ids(*args[:3]), AXES, THETA)[0])
