"""A chat endpoint as writer, against a local server; its key and address stay where they belong."""

import base64
import io
import json

import pytest
from PIL import Image

from flux2_pack.flux2_core.chat_endpoint import chat_writer, read_chat_settings
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.upsample import Answer, Ask, upsample
from flux2_pack.tests.core.chat_server import KEY, ChatServer

pytest.importorskip("aiohttp", reason="pip install aiohttp")
PICTURES = (Image.new("RGB", (2000, 1000), "red"), Image.new("RGB", (20, 30), "blue"))


@pytest.fixture(scope="module")
def running():
    with ChatServer() as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


def write(server, ask=None, check=None, **more):
    settings = read_chat_settings(server.environ(**more))
    return chat_writer(settings, check)(ask or Ask("a cat"))


def test_what_is_sent_and_what_comes_back(server):
    answer = write(server, Ask("a cat", seed=7, temperature=0.3))
    assert answer == Answer("A long prompt.")
    ((headers, body, path),) = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "toy" and body["seed"] == 7 and body["temperature"] == 0.3
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == "a cat" and KEY not in json.dumps(body)


def test_pictures_go_only_where_they_are_seen(server):
    ask = Ask("make it blue", "edit", 2, pictures=PICTURES)
    write(server, ask)
    write(server, ask, sees="0")
    seen, blind = (body["messages"][1]["content"] for _, body, _ in server.seen)
    assert isinstance(blind, str)
    urls = [part["image_url"]["url"] for part in seen[:2]]
    shown = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert shown[0].size[0] * shown[0].size[1] <= 768 * 768 + 2000 and shown[1].size == (20, 30)
    assert shown[0].convert("RGB").getpixel((5, 5))[0] > 200 and "image 2" in seen[2]["text"]


def test_no_key_is_needed_here(server):
    write(server, key="")
    assert "Authorization" not in server.seen[0][0]


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_an_answer_that_broke_off_is_known(server, finish):
    server.finish = finish
    assert write(server).ended == (finish == "stop")


def test_a_refusal_is_asked_again(server):
    server.answers = ["A cat.", 'A cat with a sign that says "OPEN".']
    settings = read_chat_settings(server.environ())
    out = upsample(chat_writer(settings), 'a cat, sign "OPEN"', seed=3)
    assert out.text == server.answers[1] and [b["seed"] for _, b, _ in server.seen] == [3, 4]


@pytest.mark.parametrize(
    ("status", "raw", "says"),
    [
        (401, b'{"error": {"message": "bad key sk-a-key-for-tests-only"}}', "bad key .the key"),
        (429, b"{}", "no more requests"),
        (500, b"<html>", "fails"),
        (302, b"", "refuses"),
        (200, b"{}", "no text in it"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "no text in it"),
        (200, b"[1]", "no text in it"),
    ],
)
def test_what_goes_wrong_is_said_without_the_key(server, status, raw, says):
    server.status, server.raw = status, raw
    server.headers = {"Location": "http://127.0.0.1:9/"}
    with pytest.raises(Flux2Error, match=says) as caught:
        write(server)
    assert KEY not in str(caught.value) and len(server.seen) == 1


def test_a_key_said_back_goes_nowhere(server):
    server.answers = [f"The key is {KEY}."]
    assert KEY not in write(server).text


def test_a_server_that_is_not_there():
    environ = {"FLUX2KIT_CHAT_ADDRESS": "http://127.0.0.1:9/v1", "FLUX2KIT_CHAT_MODEL": "x"}
    settings = read_chat_settings(environ | {"FLUX2KIT_CHAT_SETTINGS": ""})
    with pytest.raises(Flux2Error, match=r"does not answer.*http://127\.0\.0\.1:9"):
        chat_writer(settings)(Ask("a cat"))


def test_interrupt(server):
    server.delay = 2

    def check():
        if server.seen:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write(server, check=check)


# ---------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"address": ""}, "address is missing.*FLUX2KIT_CHAT_ADDRESS"),
        ({"model": ""}, "model is missing"),
        ({"address": "http://192.168.1.5/v1"}, "cannot be used"),
        ({"address": "https://user:secret@example.com"}, "cannot be used"),
        ({"address": "ftp://example.com"}, "cannot be used"),
        ({"key": "short"}, "not one"),
        ({"sees": "perhaps"}, "not said clearly"),
        ({"settings": "/nowhere/chat.json"}, "no such settings file"),
    ],
)
def test_settings_that_cannot_be_used(server, more, says):
    with pytest.raises(Flux2Error, match=says) as caught:
        read_chat_settings(server.environ(**more))
    assert "secret" not in str(caught.value)


def test_the_settings_file(server, tmp_path):
    """It serves alone, and only if nobody else can read it."""
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"address": server.url, "model": "toy", "key": KEY, "sees": True}))
    path.chmod(0o600)
    alone = {"FLUX2KIT_CHAT_SETTINGS": str(path)}
    settings = read_chat_settings(alone)
    assert settings.sees and settings.model == "toy" and KEY not in repr(settings)
    with pytest.raises(Flux2Error, match="two places"):
        read_chat_settings(alone | {"FLUX2KIT_CHAT_MODEL": "other"})
    path.chmod(0o644)
    with pytest.raises(Flux2Error, match="chmod 600"):
        read_chat_settings(alone)
