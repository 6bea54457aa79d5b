"""Prompts in parts: prose, JSON and back, and advice about what FLUX.2 reads badly."""

import json
import random

import pytest

from flux2_pack.flux2_core.configs import VARIANTS
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.nano.world import BACKGROUNDS, COLORS
from flux2_pack.flux2_core.prompt_lint import advice, unconnected
from flux2_pack.flux2_core.prompt_nano import in_words, nearest, unknown
from flux2_pack.flux2_core.prompting import (
    Color,
    Lettering,
    Prompt,
    from_json,
    positive,
    prose,
    read_palette,
    to_json,
)

WORDS = [
    "an old lighthouse", "a woman in a raincoat", 'a sign that says "OPEN"', "watercolour on rough paper",
    "fog over the harbour; dawn", "85 mm, f/1.8", "läuft im Regen", "灯台", "line one\nline two",
    "back\\slash and {braces}", "a 'quoted' word", "50 % gray",
]  # fmt: skip


def some(r: random.Random) -> Prompt:
    def maybe():
        return r.choice(WORDS) if r.random() < 0.6 else ""

    palette = tuple(
        Color(f"#{r.randrange(1 << 24):06x}", r.choice(("", "crimson")), maybe())
        for _ in range(r.randrange(4))
    )
    lettering = tuple(Lettering(r.choice(WORDS), maybe(), maybe()) for _ in range(r.randrange(3)))
    texts = [maybe() for _ in range(7)]
    return Prompt(*texts, palette, lettering, maybe(), maybe(), maybe())


@pytest.mark.parametrize("seed", range(200))
def test_json_and_back(seed):
    prompt = some(random.Random(seed))
    assert from_json(to_json(prompt)) == prompt
    assert from_json(to_json(prompt, indent=None)) == prompt


@pytest.mark.parametrize("seed", range(200))
def test_prose_says_every_part(seed):
    prompt = some(random.Random(seed))
    text = prose(prompt)
    for part in (prompt.subject, prompt.style, prompt.setting, prompt.light, prompt.camera):
        assert not part or part[1:] in text
    for color in prompt.palette:
        assert color.hex in text
    for wanted in prompt.lettering:
        assert f'"{wanted.text}"' in text


def test_a_prompt_as_people_write_it():
    prompt = Prompt(
        subject="a vintage car",
        action="parked at the kerb",
        place="left",
        style="film photograph",
        light="low evening sun",
        palette=(Color("#dc2828", "red", "car"), Color("#2850dc", "blue", "door")),
        lettering=(Lettering("GARAGE", "bold stencil letters", "top"),),
        avoid="people",
    )
    assert prose(prompt) == (
        "A vintage car in red (color #dc2828) parked at the kerb on the left. "
        'The text "GARAGE" in bold stencil letters at the top. Film photograph. Low evening sun. '
        "The door in blue (color #2850dc). An empty, deserted scene."
    )
    found = json.loads(to_json(prompt))
    assert found["subjects"] == [
        {"description": "a vintage car", "action": "parked at the kerb", "position": "left"}
    ]
    assert found["color_palette"][0] == {"hex": "#dc2828", "name": "red", "object": "car"}


@pytest.mark.parametrize(
    ("subject", "palette", "said"),
    [
        ("a cup and a car", "#112233: car\n#445566 grey: the cup", "A cup in grey (color #445566) and a car in color #112233."),
        ("a carpet", "#112233: car", "A carpet. The car in color #112233."),
        ("a Car", "#112233: the car", "A Car in color #112233."),
        ("a flag", "#112233: flag\n#445566: flag", "A flag in color #112233 and color #445566."),
        ("a flag", "#112233 navy", "A flag. Palette of navy (color #112233)."),
    ],
)  # fmt: skip
def test_a_colour_stands_at_its_object(subject, palette, said):
    assert prose(Prompt(subject=subject, palette=read_palette(palette))) == said


@pytest.mark.parametrize("of", ["text", "the lettering", "OPEN", '"open"'])
def test_a_colour_of_the_lettering(of):
    prompt = Prompt(palette=(Color("#112233", "", of),), lettering=(Lettering("Open", "neon"),))
    assert prose(prompt) == 'The text "Open" in neon in color #112233.'


def test_an_edit_says_what_stays():
    prompt = Prompt(change="make the sky stormy", keep="the boat and its crew")
    assert prose(prompt) == "Make the sky stormy; keep the boat and its crew unchanged."


def test_hand_written_json():
    prompt = from_json(
        '{"scene": "a bay", "color_palette": ["#112233"], "camera": {"angle": "low", "lens": "35 mm"}}'
    )
    assert prompt.palette == (Color("#112233"),)
    assert prompt.camera == "angle low, lens 35 mm"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "object of its parts"),
        ('{"mood": "x"}', "does not know"),
        ('{"subjects": [{}, {}]}', "one subject"),
        ('{"scene": 4}', "cannot be read"),
        ('{"color_palette": ["red"]}', "no colour"),
        ('{"color_palette": [3]}', "cannot be read"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_json_with_faults_is_one_sentence(text, said):
    with pytest.raises(Flux2Error, match=said):
        from_json(text)


def test_palettes_as_typed():
    assert read_palette("#dc2828 red: the car\n#2850DC, #000000 black") == (
        Color("#dc2828", "red", "the car"),
        Color("#2850DC"),
        Color("#000000", "black"),
    )
    with pytest.raises(Flux2Error, match="no colour"):
        read_palette("red: the car")


def test_what_is_not_wanted_becomes_what_is():
    assert positive("no people, text and watermark") == (
        "an empty, deserted scene, plain surfaces and blank signs and a clean, unmarked image"
    )
    assert positive("without llamas") == "a scene free of llamas"
    assert positive("") == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a street with no cars", "an empty street"),
        ("a street without people, evening", "deserted"),
        (" ".join(f"color #{i}0000" for i in range(10, 70, 10)), "6 hex colours"),
        ("a car in #dc2828", "stands alone"),
        ("a car, color #f00", "short colour code"),
        ('a sign: "we are open from nine to five every day"', "lettering of up to four words"),
        ("a (red:1.3) car", "no weights"),
        ("girl, red hair, forest, night, 8k, masterpiece, detailed", "list of tags"),
    ],
)
def test_advice(text, said):
    found = advice(text)
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A red car parked in front of a bakery at dawn, photographed from a low angle.",
        'A poster with the text "NO PARKING" in bold letters.',  # to be written, not meant
        "The knot of the rope lies on a wooden table.",
        "The car in red (color #dc2828), the door in blue (color #2850dc).",
        "It's a dog's life, said the painter's model.",
    ],
)
def test_no_advice_where_nothing_is_wrong(text):
    assert advice(text) == []


def test_advice_for_the_model_at_hand():
    short = "A red ring."
    assert "40 to 70 words" in advice(short, VARIANTS["klein-4b"])[0]
    assert advice(short, VARIANTS["dev"]) == []
    assert advice(short, VARIANTS["nano"]) == []
    assert "klein was trained on prose" in advice('{"scene": "a bay"}', VARIANTS["klein-9b"])[0]
    assert "nano does not know: car." in advice('A red car, "open".', VARIANTS["nano"])[0]
    assert advice("image 1 with a blue car", VARIANTS["klein-4b"]) == []  # an edit is short
    long = "word " * 301
    for name in ("dev", "klein-4b"):
        assert "301 words" in advice(long, VARIANTS[name])[0]


def test_pictures_that_nobody_has_seen_yet():
    assert unconnected("a red ring") == []
    assert "image 1: FLUX.2 Apply References needs picture" in unconnected("image 1 in red")[0]
    assert "needs 3 pictures" in unconnected("image 3 with the hat of image 1")[0]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a ring in dark red (color #8b0000) left", "a ring in red left"),
        ("a ring in red (color #dc2828) and a cross in color #2850dc", "a ring in red and a cross in blue"),
        ("a ring in the middle and a cross (color #dc2828)", "a ring in the middle and a cross red"),
        ("palette of crimson (color #e02020) and sky blue (color #40c8d0)", "palette of red and cyan"),
        ("a ring on color #d0b080 background", "a ring on tan background"),
        ("a ring, #f5f5f5 background", "a ring, white background"),
        ('The text "CAT" in red', 'the word "CAT" in red'),
        ('text "K" at the top', "a letter K at the top"),
        ("a red ring left on tan background", "a red ring left on tan background"),
        ('{"mood": "x"}', '{"mood": "x"}'),
    ],
)  # fmt: skip
def test_in_nanos_words(prompt, words):
    assert in_words(prompt)[0] == words


def test_nano_reads_json_as_its_prose():
    prompt = Prompt(subject="a ring", place="left", palette=(Color("#dc2828", "red", "ring"),))
    text, said = in_words(to_json(prompt))
    assert text == in_words(prose(prompt))[0] == "A ring in red on the left."
    assert len(said) == 2 and "no JSON" in said[0] and "#dc2828 as red" in said[1]
    assert unknown(text) == []


def test_nanos_colours_are_their_own_nearest():
    for palette in (COLORS, BACKGROUNDS):
        for name, levels in palette.items():
            assert nearest("#{:02x}{:02x}{:02x}".format(*levels), palette) == name
