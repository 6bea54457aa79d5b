"""What may be asked of which hosted model, and the price before. Nothing is dropped in silence."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.hosted import (
    ENDPOINTS,
    TABLE_DATE,
    Request,
    Upload,
    estimate,
    make_request,
)
from flux2_pack.flux2_core.references import Reference
from flux2_pack.tests.hosted.harness import client_for, money, plain, run

PRO, FLEX, KLEIN = "flux-2-pro", "flux-2-flex", "flux-2-klein-9b"


def refused(*words, **more):
    with pytest.raises(Flux2Error) as caught:
        make_request(more.pop("model", PRO), more.pop("prompt", "a fox"), **more)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_every_endpoint_is_where_the_api_has_it():
    assert {e.path for e in ENDPOINTS.values()} == {
        "/v1/flux-2-pro",
        "/v1/flux-2-pro-preview",
        "/v1/flux-2-max",
        "/v1/flux-2-flex",
        "/v1/flux-2-klein-4b",
        "/v1/flux-2-klein-9b",
        "/v1/flux-2-klein-9b-preview",
    }


@pytest.mark.parametrize("model", ENDPOINTS)
def test_only_flex_takes_steps_and_guidance(model):
    endpoint = ENDPOINTS[model]
    for name, value in (("steps", 20), ("guidance", 3.0)):
        if model == FLEX:
            assert make_request(model, "a", **{name: value}).fields[name] == value
        else:
            assert not endpoint.takes(name)
            refused(f"takes no {name}", "choose Flex", model=model, **{name: value})


@pytest.mark.parametrize("model", ENDPOINTS)
@pytest.mark.parametrize("wanted", [True, False])
def test_upsampling_has_the_models_own_field(model, wanted):
    if "klein" in model:
        refused("takes no prompt upsampling", model=model, prompt_upsampling=wanted)
        return
    fields = make_request(model, "a", prompt_upsampling=wanted).fields
    expected = {"prompt_upsampling": wanted} if model == FLEX else {"disable_pup": not wanted}
    assert {k: v for k, v in fields.items() if "pup" in k or "upsampling" in k} == expected


def test_what_is_not_given_is_not_sent():
    assert set(make_request(FLEX, "a").fields) == {
        "prompt", "width", "height", "seed", "output_format"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "flux-2-dev"}, ["no such hosted model", "flux-2-pro"]),
        ({"prompt": " \n"}, ["prompt is empty"]),
        ({"prompt": "x" * 200_000}, ["too long"]),
        ({"model": FLEX, "steps": 51}, ["steps", "1 to 50"]),
        ({"model": FLEX, "steps": 0}, ["steps"]),
        ({"model": FLEX, "steps": 2.5}, ["steps", "whole"]),
        ({"model": FLEX, "guidance": 1.4}, ["guidance", "1.5 to 10"]),
        ({"model": FLEX, "guidance": 10.1}, ["guidance"]),
        ({"model": FLEX, "guidance": float("nan")}, ["guidance"]),
        ({"safety_tolerance": 6}, ["safety tolerance", "0 to 5"]),
        ({"safety_tolerance": -1}, ["safety tolerance"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**64}, ["seed"]),
        ({"seed": True}, ["seed"]),
        ({"output_format": "gif"}, ["gif", "png"]),
        ({"width": 100, "height": 100}, ["100 x 100", "multiples of 16"]),
        ({"width": 48, "height": 64}, ["48 x 64"]),
        ({"width": 2064, "height": 2048}, ["2064 x 2048", "4 megapixels"]),
        ({"width": 512}, ["belong together"]),
        ({"references": [plain()] * 9}, ["at most 8", "Remove 1"]),
        ({"model": KLEIN, "references": [plain()] * 5}, ["at most 4", "Remove 1"]),
        ({"references": [plain(8, 8)]}, ["too small"]),
        ({"references": [plain(name="a"), plain(name="A")]}, ["same name"]),
        ({"references": [plain(name="a")], "prompt": "@b"}, ["No reference is called @b"]),
    ],
)
def test_refuses_with_what_was_seen_and_what_to_do(more, words):
    refused(*words, **more)


@pytest.mark.parametrize(
    ("control", "word"),
    [
        ({"strength": 0.5}, "strength"),
        ({"strength": 0.0}, "strength"),
        ({"start": 0.2}, "step range"),
        ({"end": 0.8}, "step range"),
        ({"mask": torch.ones(64, 64)}, "mask"),
        ({"region": torch.ones(64, 64)}, "region"),
    ],
)
def test_controls_of_local_references_are_refused(control, word):
    refused("Reference 2", word, references=[plain(), Reference(torch.rand(64, 64, 3), **control)])


def test_a_batch_as_a_reference_is_refused():
    refused("batch", references=[Reference(torch.rand(2, 64, 64, 3))])
    assert make_request(PRO, "a", references=[Reference(torch.rand(1, 64, 64, 3))]).pictures


def test_references_are_sent_whole_in_order_and_without_loss():
    pixels = torch.randint(0, 256, (96, 128, 3)) / 255
    request = make_request(
        PRO, "the @hat of image 1", references=[Reference(pixels), plain(80, 64, name="hat")]
    )
    body = json.loads(request.body())
    assert body["prompt"] == "the image 2 of image 1"
    with Image.open(io.BytesIO(base64.b64decode(body["input_image"]))) as picture:
        sent = torch.from_numpy(np.array(picture)).long()
        assert picture.format == "PNG" and torch.equal(sent, (pixels * 255).round().long())
    assert Image.open(io.BytesIO(base64.b64decode(body["input_image_2"]))).size == (80, 64)
    assert request.size == (body["width"], body["height"]) == (128, 96)  # the first one's


def test_references_follow_the_local_rule_of_size():
    alone = make_request(PRO, "a", references=[plain(2400, 1800)])
    assert alone.size == alone.pictures[0].size == (2336, 1744)
    two = make_request(PRO, "a", references=[plain(1200, 1000), plain()])
    assert two.pictures[0].size == (1120, 928)
    capped = Reference(torch.rand(1200, 1200, 3), megapixels=0.25)
    assert make_request(PRO, "a", references=[capped]).pictures[0].size == (496, 496)


def test_pro_has_a_limit_for_picture_and_references_together():
    eight = [plain(1024, 1024)] * 8
    refused("together", "9.3", width=1344, height=1024, references=eight)
    small = [plain(256, 256)] * 8
    assert make_request(PRO, "a", width=2048, height=2048, references=small).pictures


def test_equal_inputs_and_only_they_have_the_same_fingerprint():
    here = "https://api.example.com"

    one = (plain(),)

    def of(model=PRO, prompt="a fox", references=one, where=here, **more):
        return make_request(model, prompt, references=references, **more).fingerprint(where)

    first = of()
    assert first == of() == of(references=[plain(name="n")])  # a name is not sent
    others = [
        of(seed=1),
        of(prompt="a fix"),
        of(model="flux-2-max"),
        of(width=64, height=80),
        of(safety_tolerance=2),
        of(output_format="jpeg"),
        of(references=[plain(shade=0.6)]),
        of(references=[plain(), plain()]),
        of(references=()),
        of(where="https://api.eu.example.com"),
    ]
    assert len({first, *others}) == len(others) + 1


EXAMPLES = [  # the examples of the published table
    ("flux-2-klein-4b", 1, 0, "1.4"),
    ("flux-2-klein-4b", 1, 1, "1.5"),
    ("flux-2-klein-9b", 1, 1, "1.7"),
    ("flux-2-pro", 1, 0, "3"),
    ("flux-2-pro", 1, 1, "4.5"),
    ("flux-2-flex", 1, 1, "10"),
    ("flux-2-max", 1, 1, "10"),
    ("flux-2-flex", 4, 8, "60"),
    ("flux-2-max", 4, 8, "40"),
]


@pytest.mark.parametrize(("model", "out", "references", "cents"), EXAMPLES)
def test_published_examples_of_prices(model, out, references, cents):
    side = {1: 1024, 4: 2048}[out]
    pictures = (Upload(b"", (1024, 1024), "", ""),) * references
    price = estimate(Request(ENDPOINTS[model], {"width": side, "height": side}, pictures))
    assert price.cents == money(cents)
    assert (price.output_megapixels, price.input_megapixels) == (out, references)
    assert TABLE_DATE in price.text and "¢" in price.text


CASES = [
    (model, size, references)
    for model in ENDPOINTS
    for size, references in (
        ((64, 64), []),
        ((1040, 1024), [(64, 64)]),
        ((1920, 1072), [(300, 200), (64, 64), (128, 64)]),
        ((2048, 2048), [(64, 80), (80, 64)]),
    )
] + [("flux-2-flex", (1024, 1024), [(1200, 1000)]), ("flux-2-max", (528, 528), [(1040, 1024)])]


@pytest.mark.parametrize(("model", "size", "sizes"), CASES)
def test_the_estimate_is_what_the_service_reports(server, tmp_path, model, size, sizes):
    """30 cases; the server has a table and a rule of its own."""
    server.paint = lambda fields: _small(fields)
    references = [plain(*s, shade=i / 9) for i, s in enumerate(sizes)]
    request = make_request(model, "a", width=size[0], height=size[1], references=references)
    before = estimate(request)
    result = run(client_for(server, tmp_path), request)
    assert result.cost == before.cents
    assert result.cost_text == f"cost {before.text.split(':')[0]}"


def _small(_fields) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 90)).save(out, "PNG")
    return out.getvalue()
