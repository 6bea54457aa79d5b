"""Size rules, order, names and refusals of reference pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_pack.flux2_core import references
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.references import (
    Fit,
    Reference,
    active,
    keep,
    lint,
    on_grid,
    pixels,
    plan,
    resolve,
)


def blank(width: int, height: int, name: str = "") -> Reference:
    return Reference(torch.zeros(1, 1, 1).expand(height, width, 3), name)


@pytest.mark.parametrize(
    ("size", "alone", "among"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        # 2024 is no multiple of 16; 2024 * sqrt(1024^2 / 2024^2) falls just below 1024, there as here
        ((2024, 2024), (2016, 2016), (1008, 1008)),
        ((2048, 2048), (2016, 2016), (1024, 1024)),
        ((4000, 3000), (2336, 1744), (1168, 880)),  # scaled to 2337 x 1752 and 1182 x 886
        ((100, 70), (96, 64), (96, 64)),  # never enlarged
        ((64, 512), (64, 512), (64, 512)),
    ],
)
def test_sizes(size, alone, among):
    """Alone up to 2024^2 pixels, among others up to 1024^2, never enlarged, multiples of 16."""
    assert plan([blank(*size)])[0].size == alone
    assert [fit.size for fit in plan([blank(*size)] * 2)] == [among] * 2


def test_scaling_is_the_reference_implementations():
    """floor(side * sqrt(limit / area)), then the middle."""
    (fit,) = plan([blank(4000, 3000)])
    shrink = math.sqrt(2024**2 / 12e6)
    assert fit.scaled == (int(4000 * shrink), int(3000 * shrink)) == (2337, 1752)
    assert fit.tokens == fit.size[0] * fit.size[1] / 256


def test_own_cap():
    (fit,) = plan([Reference(torch.zeros(1000, 1000, 3), megapixels=0.25)])
    assert fit.size == (496, 496)


def test_the_middle_is_kept():
    image = torch.zeros(70, 100, 3)
    image[3:67, 2:98] = 1  # the rows and columns that stay: 3 off above, 2 off on the left
    reference = Reference(image)
    out = pixels(reference, *plan([reference]))
    assert out.shape == (1, 3, 64, 96) and out.min() == 1


def test_shrinking_is_pillows_lanczos():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1400, 1200, 3), generator=generator).float() / 255
    reference = Reference(image)
    fit = plan([reference] * 2)[0]
    picture = Image.fromarray((image * 255).round().to(torch.uint8).numpy())
    picture = picture.resize(fit.scaled, Image.Resampling.LANCZOS)
    left, top = ((a - b) // 2 for a, b in zip(fit.scaled, fit.size, strict=True))
    want = np.array(picture)[top : top + fit.size[1], left : left + fit.size[0]]
    got = ((pixels(reference, fit)[0].movedim(0, -1) + 1) / 2 * 255).round().numpy()
    assert np.array_equal(got, want)


def test_pixels_that_fit_are_not_touched():
    image = torch.rand(64, 64, 3)
    assert torch.equal(
        pixels(Reference(image), *plan([Reference(image)]))[0].movedim(0, -1), image * 2 - 1
    )


def test_alpha_is_dropped():
    image = torch.rand(64, 64, 4)
    assert pixels(Reference(image), *plan([Reference(image)])).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ([blank(64, 64)] * 11, "at most 10 reference images. Seen: 11. Remove 1"),
        ([blank(63, 64)], "Reference 1 is too small to be a reference. Seen: 63 x 64 pixels"),
        ([blank(64, 64), blank(70, 600, "tower")], 'Reference 2 ("tower") is too narrow'),
    ],
)
def test_refused(chain, words):
    with pytest.raises(Flux2Error) as error:
        plan(chain)
    assert words in str(error.value)


def test_ten_are_taken():
    assert len(plan([blank(64, 64)] * 10)) == 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_numbers(bad):
    image = torch.zeros(64, 64, 3)
    image[5, 6, 0] = bad
    with pytest.raises(Flux2Error, match=r"Reference 1 holds values that are not numbers"):
        pixels(Reference(image), *plan([Reference(image)]))


def test_files(tmp_path, monkeypatch):
    Image.new("RGBA", (64, 80), (255, 0, 0, 128)).save(tmp_path / "hero.png")
    reference = references.read(tmp_path / "hero.png")
    assert reference.name == "hero" and reference.image.shape == (80, 64, 3)

    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Flux2Error, match=r"text.png cannot be opened"):
        references.read(tmp_path / "text.png")

    # A picture beyond Pillow's limit: the limit is lowered, a real one would have 179 million.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Flux2Error, match=r"hero.png is too large to be opened"):
        references.read(tmp_path / "hero.png")


def test_names():
    chain = [blank(64, 64, "Hero"), blank(64, 64), blank(64, 64, "old-car")]
    assert resolve("@hero in @old-car.", chain) == "image 1 in image 3."
    assert resolve("mail me @home", []) == "mail me @home"
    with pytest.raises(
        Flux2Error, match=r"No reference is called @bike. Seen: the names are @hero"
    ):
        resolve("@bike", chain)


@pytest.mark.parametrize(
    ("names", "words"),
    [(["my hat"], "must be one word. Seen: 'my hat'"), (["hat", "", "Hat"], "the same name")],
)
def test_names_that_no_prompt_could_use(names, words):
    references.check_names([blank(64, 64, name) for name in ("hero", "", "", "old-car")])
    with pytest.raises(Flux2Error) as error:
        references.check_names([blank(64, 64, name) for name in names])
    assert words in str(error.value)


def test_names_and_numbers_are_the_same_text():
    chain = [blank(64, 64, "hero"), blank(64, 64, "car")]
    by_number = "the shape of image 2 in the color of image 1"
    assert resolve("the shape of @car in the color of @HERO", chain) == by_number
    assert resolve(by_number, chain) == by_number


@pytest.mark.parametrize(
    ("text", "count", "said"),
    [
        ("image 1 and Image 2", 2, []),
        ("image 3", 0, []),
        ("make it night", 1, []),  # an edit of the only picture needs no number
        ("image 3 and image 1", 1, ["speaks of image 3, but 1 reference is connected."]),
        ("image 1, image 7, image 8, image 9, image 2", 2, ["image 7, image 8 and image 9, but"]),
        ("image 2", 3, ["never speaks of image 1 (@hero) and image 3."]),
        ("make it night", 2, ["never speaks of image 1 (@hero) and image 2."]),
        ("image 12", 2, ["speaks of image 12, but 2 references are", "never speaks of image 1"]),
    ],
)
def test_lint(text, count, said):
    """Numbers that no reference has, and references that nobody speaks of."""
    chain = [blank(64, 64, "hero"), blank(64, 64), blank(64, 64)][:count]
    warnings = lint(text, chain)
    assert len(warnings) == len(said)
    assert all(words in warning for words, warning in zip(said, warnings, strict=True))


def test_plan_changes_nothing():
    chain = (blank(3000, 2000, "a"),)
    assert (
        plan(chain)
        == plan(chain)
        == (Fit('Reference 1 ("a")', (3000, 2000), (2478, 1652), (2464, 1648)),)
    )


BLACK = torch.zeros(64, 64)


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"strength": -0.1}, "strength of Reference 1 is out of range"),
        ({"strength": 3.1}, "Use 0 (absent) to 3"),
        ({"start": 0.5, "end": 0.5}, "would act in no step"),
        ({"start": -0.1}, "would act in no step"),
        ({"end": 1.5}, "would act in no step"),
        ({"importance": 0.0}, "importance of Reference 1"),
        ({"mask": BLACK}, "mask of Reference 1 is black everywhere"),
        ({"region": BLACK}, "region of Reference 1 is black everywhere"),
        ({"mask": torch.ones(1, 64, 64)}, "is not a mask"),
        ({"region": torch.full((4, 4), torch.nan)}, "is not a mask"),
    ],
)
def test_a_control_out_of_range_is_refused(control, words):
    with pytest.raises(Flux2Error) as error:
        plan([Reference(torch.rand(64, 64, 3), **control)])
    assert words in str(error.value)


def test_a_mask_keeps_every_patch_that_it_touches():
    mask = torch.zeros(64, 96)
    mask[20, 40] = 1  # one pixel: row 1, column 2 of the patches
    reference = Reference(torch.rand(64, 96, 3), mask=mask)
    kept = keep(reference, *plan([reference]))
    assert kept.shape == (4, 6) and kept.nonzero().tolist() == [[1, 2]]


def test_a_mask_is_cut_and_shrunk_with_its_picture():
    """White where the picture is white: the patches kept are those that hold white."""
    image = torch.zeros(70, 100, 3)
    image[3:19, 2:18] = 1  # the first patch of what stays after the cut
    for size in ((70, 100), (140, 200)):  # a mask of another size is stretched
        mask = torch.nn.functional.interpolate(image[None, None, ..., 0], size)[0, 0]
        reference = Reference(image, mask=mask)
        assert keep(reference, *plan([reference])).nonzero().tolist()[:1] == [[0, 0]]
        assert not keep(reference, *plan([reference]))[2:].any()
    large = Reference(torch.zeros(3000, 3000, 3), mask=torch.ones(30, 30))
    (fit,) = plan([large])
    assert keep(large, fit).shape == (fit.size[1] // 16, fit.size[0] // 16)


def test_a_mask_that_only_the_cut_leaves_black_is_refused():
    mask = torch.zeros(70, 100)
    mask[:2] = 1  # above the rows that are used
    reference = Reference(torch.rand(70, 100, 3), mask=mask)
    with pytest.raises(Flux2Error, match="leaves nothing"):
        keep(reference, *plan([reference]))


def test_a_region_on_the_grid_is_the_mean_of_each_patch():
    region = torch.zeros(64, 64)
    region[:, :24] = 1
    assert torch.allclose(on_grid(region, (4, 4)), torch.tensor([1, 0.5, 0, 0]).expand(4, 4))
    assert on_grid(region, (2, 8)).shape == (2, 8)


def test_a_reference_acts_from_start_up_to_end():
    steps = [i / 4 for i in range(4)]
    assert [active(0.0, 1.0, s) for s in steps] == [True] * 4
    assert [active(0.0, 0.5, s) for s in steps] == [True, True, False, False]
    assert [active(0.5, 1.0, s) for s in steps] == [False, False, True, True]


def test_pictures_for_a_batch_are_one_reference():
    reference = Reference(torch.rand(3, 70, 100, 3))
    (fit,) = plan([reference])
    assert fit.seen == (100, 70)
    out = pixels(reference, fit)
    assert out.shape == (3, 3, 64, 96)
    alone = Reference(reference.image[1])
    assert torch.equal(out[1:2], pixels(alone, fit))
