"""References within a budget of tokens, and in another order."""

import random

import pytest
import torch

from flux2_pack.flux2_core.budget import fit, fullest, moments, order, tokens_of
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.references import Reference, plan


def blank(width: int, height: int, name: str = "", **controls) -> Reference:
    return Reference(torch.zeros(1, 1, 1).expand(height, width, 3), name, **controls)


def counts(references) -> list[int]:
    return [tokens_of(r, f) for r, f in zip(references, plan(references), strict=True)]


def test_with_room_for_all_nothing_changes():
    chain = (blank(1024, 1024), blank(3000, 2000, "car"), blank(64, 512))
    fitted, said = fit(chain, sum(counts(chain)))
    assert said == [] and all(a is b for a, b in zip(fitted, chain, strict=True))


def test_equals_shrink_alike_and_it_is_said():
    chain = (blank(1024, 1024), blank(1024, 1024, "hero"), blank(1024, 1024), blank(512, 512))
    fitted, said = fit(chain, 8000)
    assert counts(fitted) == [2304, 2304, 2304, 1024]
    assert fitted[3] is chain[3]  # smaller than its share: stays as it is
    assert len(said) == 3
    assert said[1] == (
        'Reference 2 ("hero"): 1024 x 1024 -> 768 x 768, 2,304 tokens, to stay within 8,000 tokens.'
    )


def test_own_megapixels_stay_a_limit():
    chain = (blank(1024, 1024, megapixels=0.1), blank(1024, 1024))
    fitted, said = fit(chain, 4000)
    assert counts(fitted) == [361, 3600] and len(said) == 1
    assert fitted[0] is chain[0]


def test_importance():
    chain = (blank(1024, 1024, importance=3), blank(1024, 1024))
    large, small = counts(fit(chain, 3000)[0])
    assert large / small == pytest.approx(3, rel=0.1)  # 3.06: sizes are whole patches


def test_what_one_leaves_goes_to_the_others():
    chain = (blank(64, 64, importance=5), blank(1024, 1024))
    assert counts(fit(chain, 2016)[0]) == [16, 1936]


@pytest.mark.parametrize("seed", range(30))
def test_any_references_and_budgets(seed):
    """Within the budget or refused; nothing enlarged, nothing below 64, every change said; and
    among equals the room is used: 16 pixels more a side for all would be too much."""
    rng = random.Random(seed)
    chain = tuple(
        blank(w := rng.randint(64, 2500), int(min(8 * w, max(64, w * rng.uniform(0.2, 5)))))
        for _ in range(rng.randint(1, 10))
    )
    chain = tuple(r for r in chain if max(r.image.shape[:2]) <= 8 * min(r.image.shape[:2]))
    own, budget = plan(chain), rng.randint(300, 20000)
    try:
        fitted, said = fit(chain, budget)
    except Flux2Error:
        return
    fits = plan(fitted)
    assert sum(counts(fitted)) <= budget
    changed = 0
    for before, now in zip(own, fits, strict=True):
        assert min(now.size) >= 64
        assert now.size[0] <= before.size[0] and now.size[1] <= before.size[1]
        changed += now.size != before.size
    assert len(said) == changed
    if changed:
        more = sum(
            min(b.tokens, (n.size[0] + 16) * (n.size[1] + 16) // 256)
            for b, n in zip(own, fits, strict=True)
        )
        assert more > 0.97 * budget


def test_a_budget_that_is_too_small():
    chain = [blank(1024, 1024)] * 10
    with pytest.raises(
        Flux2Error, match=r"into 100 tokens\. Seen: .* take 160 tokens, 60 too many"
    ):
        fit(chain, 100)
    assert counts(fit(chain, 160)[0]) == [16] * 10


def test_masked_patches_do_not_count():
    """Half of each picture is cut away: both keep twice the area."""
    mask = torch.zeros(1024, 1024)
    mask[:, :512] = 1
    fitted, _ = fit([blank(1024, 1024, mask=mask)] * 2, 2048)
    assert [f.size for f in plan(fitted)] == [(704, 704)] * 2
    assert sum(counts(fitted)) == 2 * 23 * 44


def test_a_mask_is_not_shrunk_to_nothing():
    mask = torch.zeros(1024, 1024)
    mask[509:518, 509:518] = 1  # at 64 x 64 no pixel of it is left
    speck, whole = fit([blank(1024, 1024, mask=mask), blank(1024, 1024)], 50)[0]
    assert sum(counts((speck, whole))) <= 50 and counts((speck, whole))[0] >= 1


def test_references_that_do_not_meet_share_no_room():
    """One in the first half of the run, one in the second, one off: each moment has the budget."""
    chain = (
        blank(1024, 1024, end=0.5),
        blank(1024, 1024, start=0.5),
        blank(1024, 1024, strength=0.0),
        blank(512, 512, start=0.5),
    )
    assert moments(chain) == [(0, 2), (1, 2, 3)]
    fitted, _ = fit(chain, 4096)
    assert counts(fitted) == [4096, 3025, 0, 1024]
    assert fitted[0] is chain[0]
    assert fullest(fitted, counts(fitted)) == (4096, 0)
    assert counts(fit(chain, 4096, together=True)[0]) == [1521, 1521, 0, 1024]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", [1, 2, 3]),
        (" ", [1, 2, 3]),
        ("2, 1, 3", [2, 1, 3]),
        ("hero, 1,Old-Car", [3, 1, 2]),
        ("@hero,image 1, 2", [3, 1, 2]),
    ],
)
def test_order(text, numbers):
    chain = (blank(64, 64), blank(64, 64, "old-car"), blank(64, 64, "Hero"))
    assert order(chain, text) == tuple(chain[n - 1] for n in numbers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2, 1", 'Seen: not named: Reference 3 ("Hero")'),
        ("1, 2, hero, 3", 'Seen: named twice: Reference 3 ("Hero").'),
        ("1, 2, 4", "names '4', which is no reference"),
        ("1, 2, bike", "the references are 1, old-car, Hero"),
        ("1,, 2", "has a gap"),
    ],
)
def test_orders_that_say_nothing_clear(text, words):
    chain = (blank(64, 64), blank(64, 64, "old-car"), blank(64, 64, "Hero"))
    with pytest.raises(Flux2Error) as error:
        order(chain, text)
    assert words in str(error.value)
