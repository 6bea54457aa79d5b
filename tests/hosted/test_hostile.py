"""A hostile service, or a hostile link: refused, within bounds of size, time and memory, and the
key stays at home."""

import asyncio
import io
import socket
import struct
import time
import zlib
from asyncio import selector_events

import pytest
from aiohttp import web
from PIL import Image, ImageFile, PngImagePlugin

from flux2_pack.flux2_core.hosted import HostedError, Timing, download
from flux2_pack.tests.hosted.harness import ask, client_for, run
from flux2_pack.tests.hosted.server import Server, answer, paint

BRIEF = Timing(fetch=0.3, reply=0.3, attempts=2)


def refused(server, folder, *codes, timing=None):
    with pytest.raises(HostedError) as caught:
        run(client_for(server, folder, timing=timing))
    assert caught.value.code in codes, str(caught.value)
    return str(caught.value)


def chunk(name: bytes, data: bytes) -> bytes:
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that claims a size; its picture is a few zeros."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), *more, idat, chunk(b"IEND", b"")))


def packed_text() -> bytes:
    """A text chunk of a few kilobytes that unpacks to 64 megabytes."""
    return chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(64 << 20), 9))


GIF = io.BytesIO()
Image.new("RGB", (64, 64)).save(GIF, "GIF")
PICTURE = paint({"seed": 3, "width": 64, "height": 64, "output_format": "png"})
JPEG = paint({"seed": 3, "width": 64, "height": 64, "output_format": "jpeg"})
WEBP = paint({"seed": 3, "width": 64, "height": 64, "output_format": "webp"})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no PNG"),
        (b"<html>Please log in</html>", "no PNG"),
        (GIF.getvalue(), "no PNG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no PNG"),
        (PICTURE[: len(PICTURE) // 2], "damaged"),
        (PICTURE[:-14], "cut short"),
        (JPEG[: len(JPEG) * 3 // 4], "cut short"),
        (WEBP[:-6], "damaged"),
        (png(64, 64), "damaged"),
        (png(4096, 4096), "more than 8 megapixels"),
        (png(30_000, 30_000), "more than 8 megapixels"),
        (png(64, 64, packed_text()), "damaged"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_what_is_no_whole_picture_is_refused(server, tmp_path, monkeypatch, data, says, lenient):
    """Also in a host that tells Pillow to fill what is missing with gray, as ComfyUI does."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    server.paint = lambda fields: data
    text = refused(server, tmp_path, "download")
    same = {"damaged", "cut short"} if "megapixels" not in says else {says}
    assert any(words in text for words in same | {says}), text
    assert "cost nothing" in text
    assert server.paid == 1


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/json", "video/mp4"])
def test_another_type_is_refused_unread(server, tmp_path, kind):
    server.faults["result"].append(answer(200, PICTURE, Content_Type=kind))
    assert kind.split(";")[0] in refused(server, tmp_path, "download")


def test_a_body_that_says_it_is_huge_is_not_read(server, tmp_path):
    async def huge(request, _normal):
        part = web.StreamResponse(headers={"Content-Length": str(10 << 30)})
        await part.prepare(request)
        await part.write(PICTURE)
        await asyncio.sleep(5)
        return part

    server.faults["result"].append(huge)
    started = time.monotonic()
    assert "too large" in refused(server, tmp_path, "download")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("what", ["result", "poll"])
def test_a_body_without_end_is_cut_off(server, tmp_path, monkeypatch, what):
    monkeypatch.setattr(download, "MOST_BYTES", 1 << 20)
    sent = []

    async def endless(request, _normal):
        part = web.StreamResponse()
        await part.prepare(request)
        while sum(sent) < 64 << 20:  # a test that fails must end as well
            await part.write(bytes(1 << 16))
            sent.append(1 << 16)
        return part

    server.faults[what].append(endless)
    assert "too large" in refused(server, tmp_path, "download")
    assert sum(sent) < 16 << 20  # socket buffers hold some more


@pytest.mark.parametrize("what", ["result", "poll"])
def test_a_slow_drip_ends_at_the_deadline(server, tmp_path, what):
    async def drip(request, _normal):
        part = web.StreamResponse(headers={"Content-Length": "100000"})
        await part.prepare(request)
        for _ in range(200):
            await part.write(b"x")
            await asyncio.sleep(0.05)
        return part

    server.faults[what].extend([drip] * 2)
    started = time.monotonic()
    assert "no answer within 0.3 seconds" in refused(server, tmp_path, "network", timing=BRIEF)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("what", ["result", "poll"])
def test_a_packed_answer_is_not_unpacked(server, tmp_path, what):
    bomb = zlib.compress(bytes(32 << 20))
    server.faults[what].append(answer(200, bomb, Content_Encoding="deflate"))
    assert "packed" in refused(server, tmp_path, "download")


@pytest.mark.parametrize(
    "to",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/x",
        "https://[::1]/x",
        "http://example.com/x",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "//user:word@example.com/x",
    ],
)
@pytest.mark.parametrize("how", ["link", "redirect"])
def test_a_link_or_redirect_into_the_private_net_is_refused(server, tmp_path, to, how):
    if how == "link":
        server.link = to.replace("//user", "https://user")
    else:
        server.faults["result"].append(answer(302, Location=to))
    assert "address" in refused(server, tmp_path, "address")


def test_redirects_are_followed_a_few_times_only(server, tmp_path):
    async def on(request, _normal):
        return web.Response(status=302, headers={"Location": request.raw_path})

    server.faults["result"].extend([on] * 2)
    run(client_for(server, tmp_path))
    server.faults["result"].extend([on] * 50)
    assert "on and on" in refused(server, tmp_path, "download")
    assert len(server.of("result")) == 3 + 4


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("what", ["submit", "poll"])
def test_a_redirect_does_not_take_the_key_along(server, tmp_path, what, status):
    with Server() as thief:
        server.faults[what].append(answer(status, Location=f"{thief.url}/v1/flux-2-klein-4b"))
        refused(server, tmp_path, "service")
        assert not thief.seen


def test_a_polling_address_elsewhere_gets_no_key(server, tmp_path):
    with Server() as thief:
        said = {"id": "a1", "polling_url": f"{thief.url}/v1/get_result?id=a1", "cost": 1.4}
        server.faults["submit"].append(answer(200, said))
        assert "the key does not go there" in refused(server, tmp_path, "address")
        assert not thief.seen


class Net:
    """Names that lead where a test says, and a net in which port 443 is watched, not reached."""

    def __init__(self, monkeypatch, *answers):
        self.answers, self.asked, self.tried = list(answers), [], []
        real_lookup, real_connect = socket.getaddrinfo, self._loop_connect()

        def lookup(host, port, *rest, **more):
            if str(host).endswith(".example.com"):
                self.asked.append(host)
                found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                return [(2, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]
            return real_lookup(host, port, *rest, **more)

        async def connect(loop, sock, address):
            if address[1] == 443:
                self.tried.append(address[0])
                raise ConnectionRefusedError
            return await real_connect(loop, sock, address)

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        monkeypatch.setattr(selector_events.BaseSelectorEventLoop, "sock_connect", connect)

    @staticmethod
    def _loop_connect():
        return selector_events.BaseSelectorEventLoop.sock_connect


PUBLIC, HOME = "93.184.216.34", "127.0.0.1"


@pytest.mark.parametrize("answers", [[HOME], [PUBLIC, HOME], ["10.0.0.3"], ["169.254.169.254"]])
def test_a_name_that_leads_home_is_not_connected_to(server, tmp_path, monkeypatch, answers):
    net = Net(monkeypatch, answers)
    server.link = "https://img.example.com/{task}"
    assert "private address" in refused(server, tmp_path, "address")
    assert net.asked == ["img.example.com"] and not net.tried


def test_a_name_that_changes_its_address_gains_nothing(server, tmp_path, monkeypatch):
    """What is connected to is what was checked: one look-up for each connection."""
    net = Net(monkeypatch, [PUBLIC], [HOME])
    server.link = "https://img.example.com/{task}"
    assert "private address" in refused(server, tmp_path, "address")
    assert net.tried == [PUBLIC] and len(net.asked) == 2


@pytest.mark.parametrize("name", ["0x7f.1", "2130706433", "127.1", "localhost.localdomain"])
def test_odd_spellings_of_home_are_looked_up_and_refused(server, tmp_path, monkeypatch, name):
    net = Net(monkeypatch, [HOME])
    server.link = f"https://{name}/x"
    refused(server, tmp_path, "address", "network")
    assert HOME not in net.tried


def test_the_key_is_not_sent_over_a_name_that_leads_home(tmp_path, monkeypatch):
    """Without a gateway the service itself must be on the internet."""
    from flux2_pack.flux2_core.hosted import Client, read_settings

    net = Net(monkeypatch, [HOME])
    settings = read_settings(
        environ={
            "BFL_API_KEY": "sk-0123456789",
            "FLUX2KIT_HOSTED_ADDRESS": "https://api.example.com",
            "FLUX2KIT_HOSTED_SETTINGS": "",
            "FLUX2KIT_HOSTED_STATE": str(tmp_path / "state"),
        }
    )
    client = Client(settings)
    with pytest.raises(HostedError) as caught:
        run(client, ask())
    assert caught.value.code == "address" and not net.tried
    assert client.spent().today == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 33)])
def test_whole_pictures_of_every_kind_pass(mode, size):
    """Observed: all of them; one byte less of pixels fails all of them."""
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    assert download.inspect(out.getvalue()) == ("png", *size)


@pytest.mark.parametrize("short", [0, 1])
def test_an_interlaced_picture_is_counted_in_passes(short):
    """5 x 3 pixels in gray: passes of 1, 1, 1, 3x1, 2x2 and 5x1 pixels, each row with a byte."""
    head = struct.pack(">IIBBBBB", 5, 3, 8, 0, 0, 0, 1)
    rows = bytes(2 + 2 + 2 + 4 + 2 * 3 + 6)
    data = b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            chunk(b"IDAT", zlib.compress(rows[short:])),
            chunk(b"IEND", b""),
        )
    )
    assert download._png_is_whole(data) is not bool(short)


def test_text_in_a_picture_is_kept_and_not_run(server, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", '{"1": {"class_type": "Evil"}}')
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 199)).save(out, "PNG", pnginfo=info)
    server.paint = lambda fields: out.getvalue()
    assert run(client_for(server, tmp_path)).data == out.getvalue()
