"""Guidance over time, against plain loops in float64; constants are stock, bit for bit."""

import pytest
import torch

from flux2_pack.flux2_core import schedule
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.guidance import Course, cfg, rescaled, velocity
from flux2_pack.flux2_core.sampling import denoise

SIGMAS = schedule.sigmas(8, width=256, height=256)
POSITIVE, NEGATIVE = torch.full((1, 2, 4), 1.0), torch.full((1, 2, 4), -1.0)
COURSES = {
    "constant": Course(4.0),
    "interval": Course(4.0, "interval", 1.0, 0.25, 0.75),
    "ramp up": Course(5.0, "ramp up", 1.5),
    "ramp down": Course(5.0, "ramp down", 1.0, 0.2, 0.8),
    "curve": Course(4.0, "curve", points=(1.0, 6.0, 2.0)),
}


class Field:
    """Stands for a model: its velocity depends on x, time, text and the embedded value."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context, guidance, references, controls):
        self.calls.append((float(context.mean()), None if guidance is None else float(guidance[0])))
        extra = 0.0 if guidance is None else 0.1 * guidance.to(x)[:, None, None, None]
        return (0.3 * x + context.mean().to(x)) * t.to(x)[:, None, None, None] + extra


def noise(seed=0):
    return torch.randn(2, 128, 2, 3, generator=torch.Generator().manual_seed(seed))


def wanted(name: str, step: int) -> float:
    """The courses as people would say them."""
    n = 8
    return {
        "constant": 4.0,
        "interval": 4.0 if 2 <= step < 6 else 1.0,
        "ramp up": 1.5 + 3.5 * step / (n - 1),
        "ramp down": 5.0 - 4.0 * min(max((step / (n - 1) - 0.2) / 0.6, 0), 1),
        "curve": (1 + 10 * step / (n - 1)) if step <= 3.5 else (6 - 8 * (step / (n - 1) - 0.5)),
    }[name]


@pytest.mark.parametrize("name", COURSES)
def test_values_step_by_step(name):
    strength = COURSES[name].over(SIGMAS)
    for i in range(8):
        got = strength(float(SIGMAS[i])) if callable(strength) else strength
        assert got == pytest.approx(wanted(name, i), abs=1e-12)


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_cfg_over_time_against_a_float64_loop(name, rescale):
    field = Field()
    v = velocity(
        field, POSITIVE, negative=NEGATIVE, scale=COURSES[name].over(SIGMAS), rescale=rescale
    )
    got = denoise(v, noise(), SIGMAS)
    x = noise().double()
    for i in range(8):
        now, after = (SIGMAS[i + k].double() for k in (0, 1))
        plus, minus = (0.3 * x + 1.0) * now, (0.3 * x - 1.0) * now
        w = wanted(name, i)
        guided = minus + w * (plus - minus)
        if rescale and w != 1:
            spread = plus.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = rescale * guided * spread + (1 - rescale) * guided
        x = x + (after - now) * guided
    assert ((got - x).abs().max() / x.std()) < 1e-5  # seen 1.1e-6


@pytest.mark.parametrize("name", COURSES)
def test_an_embedded_value_over_time(name):
    field = Field()
    denoise(velocity(field, POSITIVE, embedded=COURSES[name].over(SIGMAS)), noise(), SIGMAS)
    assert [value for _, value in field.calls] == pytest.approx([wanted(name, i) for i in range(8)])


def test_one_forward_where_the_scale_is_one():
    field = Field()
    strength = COURSES["interval"].over(SIGMAS)
    denoise(velocity(field, POSITIVE, negative=NEGATIVE, scale=strength), noise(), SIGMAS)
    assert len(field.calls) == 8 + 4


@pytest.mark.parametrize("value", [1.0, 3.5])
def test_a_constant_is_stock_bit_for_bit(value):
    stock = denoise(velocity(Field(), POSITIVE, negative=NEGATIVE, scale=value), noise(), SIGMAS)
    flat = [
        Course(value).over(SIGMAS),
        Course(value, "interval", 1.0, 0.0, 1.0).over(SIGMAS),
        Course(value, "ramp up", value).over(SIGMAS),
        Course(value, "ramp down", value).over(SIGMAS),
        Course(0.0, "curve", points=(value, value, value)).over(SIGMAS),
    ]
    for strength in flat:
        v = velocity(Field(), POSITIVE, negative=NEGATIVE, scale=strength, rescale=0.0)
        assert torch.equal(denoise(v, noise(), SIGMAS), stock)


def test_zero_init_leaves_out_the_first_step():
    field = Field()
    v = velocity(field, POSITIVE, negative=NEGATIVE, scale=3.0, zero_above=float(SIGMAS[0]))
    got = denoise(v, noise(), SIGMAS)
    rest = denoise(velocity(Field(), POSITIVE, negative=NEGATIVE, scale=3.0), noise(), SIGMAS[1:])
    assert torch.equal(got, rest)
    assert len(field.calls) == 2 * 7


def test_rescale_gives_the_spread_of_the_positive():
    plus, minus = noise(1), noise(2)
    guided = cfg(plus, minus, 6.0)
    full = rescaled(guided, plus, 1.0)
    assert torch.allclose(full.std((1, 2, 3)), plus.std((1, 2, 3)), rtol=1e-5)
    assert torch.equal(rescaled(guided, plus, 0.0), guided)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Course(4.0, "wave"), "no such course"),
        (lambda: Course(4.0, "interval", 1.0, 0.6, 0.4), "begin before it ends"),
        (lambda: Course(4.0, "curve", points=(1.0,)), "at least two numbers"),
    ],
)
def test_sentences(make, said):
    with pytest.raises(Flux2Error, match=said):
        make()
