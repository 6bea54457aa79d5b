"""Key, address and gateway come together, from a private place; the key shows nowhere and goes to
the API's host alone."""

import copy
import json
import os
import pickle
from decimal import Decimal

import pytest

from flux2_pack.flux2_core.hosted import HostedError, read_settings
from flux2_pack.flux2_core.hosted.addresses import (
    check_result_url,
    check_task_url,
    is_public,
)

KEY = "sk-0123456789-SECRET"
OFFICIAL = "https://api.bfl.ai"
GATE = "http://127.0.0.1:8080"


def refused(*words, region="global", **environ):
    with pytest.raises(HostedError) as caught:
        read_settings(region, environ)
    assert caught.value.code == "settings" and KEY not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.fixture
def file(tmp_path):
    """-> write(values, mode) -> an environment that names the file."""

    def write(values, mode=0o600):
        path = tmp_path / "hosted.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
        path.chmod(mode)
        return {"FLUX2KIT_HOSTED_SETTINGS": str(path)}

    return write


def only(**environ):
    """An environment without a settings file."""
    return {"FLUX2KIT_HOSTED_SETTINGS": "", **environ}


@pytest.mark.parametrize(
    ("region", "base"),
    [
        ("global", OFFICIAL),
        ("eu", "https://api.eu.bfl.ai"),
        ("us", "https://api.us.bfl.ai"),
    ],
)
def test_a_region_is_one_of_three(region, base):
    settings = read_settings(region, only(BFL_API_KEY=KEY))
    assert settings.base == settings.origin == base and not settings.gateway
    assert (settings.per_run, settings.per_day) == (100, 1000)


@pytest.mark.parametrize("region", ["", "EU", "https://evil.example", "../eu", "127.0.0.1"])
def test_a_workflow_can_choose_nothing_else(region):
    refused("no such region", region=region, **only(BFL_API_KEY=KEY))


def test_the_file_gives_all_of_it(file, tmp_path):
    values = {"key": KEY, "gateway": GATE + "/", "per_run": 12.5, "per_day": "50"}
    settings = read_settings(environ={**file(values), "FLUX2KIT_HOSTED_STATE": str(tmp_path)})
    assert settings.key.reveal() == KEY and settings.base == GATE and settings.gateway
    assert (settings.per_run, settings.per_day) == (Decimal("12.5"), 50)
    assert settings.folder == tmp_path


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o660, 0o777])
def test_a_file_that_others_may_read_or_change_is_refused(file, mode):
    refused("chmod 600", f"{mode:o}", **file({"key": KEY}, mode))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root can give away")
def test_a_file_of_another_user_is_refused(file):
    environ = file({"key": KEY})
    os.chown(environ["FLUX2KIT_HOSTED_SETTINGS"], 12345, -1)
    refused("another user", **environ)


def test_two_sources_are_never_mixed(file):
    """Who can set one variable must not be able to send the file's key elsewhere, or the reverse."""
    environ = file({"key": KEY})
    refused("two places", "FLUX2KIT_HOSTED_GATEWAY", **environ, FLUX2KIT_HOSTED_GATEWAY=GATE)
    refused("two places", "FLUX2KIT_HOSTED_ADDRESS", **environ, FLUX2KIT_HOSTED_ADDRESS=OFFICIAL)
    refused("two places", "BFL_API_KEY", **file({"gateway": GATE}), BFL_API_KEY=KEY)
    refused("two places", **environ, FLUX2KIT_HOSTED_PER_DAY="100000")
    refused("no key", **only(FLUX2KIT_HOSTED_GATEWAY=GATE))
    refused("no key", **file({"gateway": GATE}))


def test_the_default_file_is_looked_for_in_the_users_configuration(tmp_path):
    folder = tmp_path / "flux2-kit"
    folder.mkdir()
    (folder / "hosted.json").write_text(json.dumps({"key": KEY}))
    (folder / "hosted.json").chmod(0o600)
    name = "APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME"
    assert read_settings(environ={name: str(tmp_path)}).key.reveal() == KEY
    refused("no key", "BFL_API_KEY", "hosted.json", **{name: str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{" + KEY, "not JSON"),
        (json.dumps([KEY]), "curly brackets"),
        (json.dumps({"key": KEY, "keys": KEY}), "mean nothing"),
        (json.dumps({"key": [KEY]}), "quotation marks"),
        (json.dumps({"key": KEY, "per_day": "much"}), "ceiling per day"),
        (json.dumps({"key": KEY, "per_run": -1}), "ceiling per run"),
        (json.dumps({"key": KEY, "per_run": float("nan")}), "ceiling per run"),
        (json.dumps({"key": KEY + "\n x"}), "not one"),
        (json.dumps({"key": "short"}), "not one"),
        (json.dumps({"key": KEY, "address": OFFICIAL, "gateway": GATE}), "one place"),
        ("x" * 70_000, "small file"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_without_what_is_in_it(file, text, word):
    refused(word, **file(text))


def test_a_missing_or_strange_file_is_told(tmp_path):
    refused("no such settings file", FLUX2KIT_HOSTED_SETTINGS=str(tmp_path / "no"))
    refused("not a small file", FLUX2KIT_HOSTED_SETTINGS=str(tmp_path))


@pytest.mark.parametrize(
    "address",
    [
        "http://api.example.com",
        "ftp://api.example.com",
        "api.example.com",
        "https://",
        "https://user:word@api.example.com",
        "https://api.example.com?x=1",
        "https://api.example.com#x",
        "https://api.example.com:99999",
        "https://api.example.com\\@evil.example",
        "https://api.exa mple.com",
        "https://127.0.0.1",
        "https://localhost",
        "https://10.0.0.8",
        "https://[::1]",
        "https://169.254.169.254",
    ],
)
def test_an_address_is_a_plain_public_one_over_https(address):
    refused("address", **only(BFL_API_KEY=KEY, FLUX2KIT_HOSTED_ADDRESS=address))


@pytest.mark.parametrize("gateway", ["http://10.0.0.8:80", "http://gate.example.com"])
def test_a_gateway_elsewhere_needs_https(gateway):
    refused("unencrypted", **only(BFL_API_KEY=KEY, FLUX2KIT_HOSTED_GATEWAY=gateway))


@pytest.mark.parametrize(
    ("gateway", "base"),
    [
        ("http://localhost:8080/", "http://localhost:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://10.0.0.8/bfl/", "https://10.0.0.8/bfl"),
        ("HTTPS://Gate.Example.com:443", "https://gate.example.com"),
    ],
)
def test_a_gateway_may_be_private(gateway, base):
    settings = read_settings(environ=only(BFL_API_KEY=KEY, FLUX2KIT_HOSTED_GATEWAY=gateway))
    assert settings.base == base and settings.gateway


def test_a_region_and_a_place_of_ones_own_exclude_each_other():
    refused("EU", region="eu", **only(BFL_API_KEY=KEY, FLUX2KIT_HOSTED_GATEWAY=GATE))
    refused("US", region="us", **only(BFL_API_KEY=KEY, FLUX2KIT_HOSTED_ADDRESS=OFFICIAL))


def test_the_key_does_not_show_and_cannot_be_stored():
    settings = read_settings(environ=only(BFL_API_KEY=KEY))
    shown = [repr(settings), str(settings), f"{settings.key!r} {settings.key} {settings.key:>9}"]
    shown += [repr(vars(settings)), "%s" % settings.key]  # noqa: UP031
    assert KEY not in "".join(shown)
    with pytest.raises(TypeError):
        json.dumps(settings.key)
    for store in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError):
            store(settings.key)
    assert settings.key.scrub(f"a {KEY} b {KEY.lower()}") == "a (the key) b (the key)"


@pytest.mark.parametrize(
    ("url", "base", "good"),
    [
        ("https://api.bfl.ai/v1/get_result?id=1", OFFICIAL, True),
        ("https://api.eu2.bfl.ai/v1/get_result?id=1", OFFICIAL, True),
        ("https://api.bfl.ai:443/x", OFFICIAL, True),
        ("https://api.bfl.ai:8443/x", OFFICIAL, False),
        ("http://api.bfl.ai/x", OFFICIAL, False),
        ("https://bfl.ai.evil.com/x", OFFICIAL, False),
        ("https://evilbfl.ai/x", OFFICIAL, False),
        ("https://api.bfl.ai@evil.com/x", OFFICIAL, False),
        ("https://api.bfl.ai\\@evil.com/x", OFFICIAL, False),
        ("https://evil.com#.bfl.ai/", OFFICIAL, False),
        ("https://evil.com?.bfl.ai/", OFFICIAL, False),
        ("https://api.bfl.ai%2eevil.com/", OFFICIAL, False),
        ("https://\u0430pi.bfl.ai/", OFFICIAL, False),
        ("//api.bfl.ai/x", OFFICIAL, False),
        ("https:api.bfl.ai/x", OFFICIAL, False),
        ("javascript:1", OFFICIAL, False),
        ("https://api.bfl.ai/\nx", OFFICIAL, False),
        ("https://127.0.0.1/x", OFFICIAL, False),
        ("http://127.0.0.1:8080/x", OFFICIAL, False),
        ("https://api.corp.com/x", "https://api.corp.com", True),
        ("https://eu.api.corp.com/x", "https://api.corp.com", True),
        ("https://other.com/x", "https://api.corp.com", False),
        ("https://evil.github.io/x", "https://mine.github.io", False),
        ("", OFFICIAL, False),
        (None, OFFICIAL, False),
        ("https://a" + "a" * 300 + ".bfl.ai/", OFFICIAL, False),
        ("https://api.bfl.ai/" + "a" * 9000, OFFICIAL, False),
    ],
)
def test_the_key_goes_to_the_same_domain_only(url, base, good):
    if good:
        assert check_task_url(url, base, gateway=False).startswith("https://")
        return
    with pytest.raises(HostedError) as caught:
        check_task_url(url, base, gateway=False)
    assert caught.value.code == "address"


@pytest.mark.parametrize(
    ("url", "good"),
    [
        (GATE + "/x", True),
        ("http://127.0.0.1:8081/x", False),
        ("http://127.0.0.2:8080/x", False),
        ("http://localhost:8080/x", False),
        ("https://127.0.0.1:8080/x", False),
        ("https://api.bfl.ai/x", False),
    ],
)
def test_through_a_gateway_the_key_goes_to_it_alone(url, good):
    try:
        assert check_task_url(url, GATE, gateway=True) == url and good
    except HostedError as error:
        assert error.code == "address" and not good


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("https://delivery-eu1.bfl.ai/r/1.png?sig=a%2Fb", False),
        ("https://8.8.8.8/x", False),
        (GATE + "/r/1", True),
        ("http://delivery.bfl.ai/x", None),
        ("http://127.0.0.1:9999/x", None),
        ("https://127.0.0.1/x", None),
        ("https://localhost/x", None),
        ("https://10.1.2.3/x", None),
        ("https://192.168.0.1/x", None),
        ("https://169.254.169.254/latest", None),
        ("https://[::1]/x", None),
        ("https://[fe80::1]/x", None),
        ("https://[::ffff:127.0.0.1]/x", None),
        ("https://[64:ff9b::7f00:1]/x", None),
        ("https://0.0.0.0/x", None),
        ("file:///etc/passwd", None),
        ("data:image/png;base64,AAAA", None),
    ],
)
def test_results_come_from_public_addresses_or_the_gateway(url, own):
    if own is None:
        with pytest.raises(HostedError) as caught:
            check_result_url(url, GATE, gateway=True)
        assert caught.value.code == "address"
    else:
        assert check_result_url(url, GATE, gateway=True) == (url, own)
        if own:  # without being the gateway it is one more private address
            with pytest.raises(HostedError):
                check_result_url(url, OFFICIAL, gateway=False)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("172.16.5.5", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.1.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("fc00::1", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_which_addresses_belong_to_the_internet(address, public):
    assert is_public(address) is public
