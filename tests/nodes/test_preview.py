"""Preview pictures at every step: which decoder makes them, and that they never break a run."""

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core import configs, taef2
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def model(host):
    return toy.ours(toy.KLEIN, toy.transformer(toy.KLEIN))


@pytest.fixture
def folder(host):
    """models/vae_approx, empty again afterwards."""
    from flux2_pack.nodes import host_preview

    place = host.models("vae_approx")
    yield place
    for path in place.glob("*"):
        path.unlink()
    host_preview._taef2.cache_clear()


def preview(model) -> torch.Tensor:
    from flux2_pack.nodes import host_preview

    return host_preview.picture(host_preview.decoder(model), toy.latents(1, (4, 6))[0])


def test_linear_colours_are_the_hosts(model, folder):
    """Without any file: the same picture as the host's latent2rgb preview."""
    import latent_preview

    form = model.model.latent_format
    theirs = latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
    ).decode_latent_to_preview(toy.latents(1, (4, 6))[0])
    ours = preview(model)
    assert ours.size == theirs.size == (12, 8)
    levels = zip(ours.tobytes(), theirs.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in levels) <= 1  # observed 1: we round, the host cuts off


def test_taef2(model, folder):
    """With TAEF2 in its folder: a picture of full size, the tiny decoder's."""
    net = taef2.decoder()
    save_file(net.state_dict(), folder / "taef2_decoder.safetensors")
    with torch.inference_mode():
        want = taef2.decode(net, toy.latents(1, (4, 6))[0])
    image = preview(model)
    assert image.size == (96, 64)
    middle = torch.tensor(image.getpixel((48, 32)))
    assert (middle - (want[0, :, 32, 48] + 1) * 127.5).abs().max() <= 1  # observed 0.5


def test_a_wrong_file_costs_no_run(model, folder):
    save_file({"a": torch.zeros(1)}, folder / "taef2_decoder.safetensors")
    assert preview(model).size == (12, 8)


def test_a_broken_file_costs_no_run(model, folder):
    (folder / "taef2_decoder.safetensors").write_bytes(b"nothing")
    assert preview(model).size == (12, 8)


def test_nano_uses_its_own_decoder(host, folder):
    nano = configs.VARIANTS["nano"]
    model = toy.ours(nano.transformer, toy.transformer(nano.transformer), nano)
    assert preview(model).size == (96, 64)
