"""VAE Encode and Decode: memory, any size, small decoders, TAEF2."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_pack.flux2_core import taef2
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def vae(host):
    toy.write_models(host.models)
    return host.call("Flux2KitVAELoader", vae="toy-vae.safetensors")[0]


@pytest.fixture
def folder(host):
    """models/vae and models/vae_approx, without what a test puts there."""
    places = [host.models("vae"), host.models("vae_approx")]
    before = {path for place in places for path in place.glob("*")}
    yield places
    for place in places:
        for path in set(place.glob("*")) - before:
            path.unlink()


@pytest.fixture
def ways(monkeypatch):
    """How each call went: Streaming, or None for whole."""
    from flux2_pack.flux2_core.vae_memory import Memory

    seen, stock = [], Memory.choose

    def choose(*args, **kw):
        seen.append(stock(*args, **kw))
        return seen[-1]

    monkeypatch.setattr(Memory, "choose", choose)
    return seen


def test_a_target_streams_with_the_same_result(host, vae, ways):
    image = toy.images(1, (128, 160))[0]
    whole = host.call("Flux2KitVAEEncode", image=image, vae=vae)[0]
    drawn = host.call("Flux2KitVAEDecode", samples=whole, vae=vae)[0]
    assert ways == [None, None]
    tight = {"vae": vae, "memory": 0.005}
    encoded = host.call("Flux2KitVAEEncode", image=image, **tight)[0]
    decoded = host.call("Flux2KitVAEDecode", samples=whole, **tight)[0]
    assert ways[2] is not None and ways[3] is not None
    # These weights amplify rounding; tests/core/test_vae_stream.py has the tight bounds.
    assert toy.difference(encoded["samples"], whole["samples"]) < 3e-5  # observed 9.1e-6
    assert toy.difference(decoded, drawn) < 3e-5  # observed 1.0e-5
    host.call("Flux2KitVAEDecode", samples=whole, vae=vae)
    assert ways[4] is None  # the target was for that one call


def test_the_host_makes_no_more_room_than_the_target(vae):
    from flux2_pack.nodes import host_vae

    shape = (1, 128, 128, 128)
    whole = vae.memory_used_decode(shape, torch.float32)
    with host_vae.bounded(vae, 0.25):
        assert vae.memory_used_decode(shape, torch.float32) == 2**28 < whole
    assert vae.memory_used_decode(shape, torch.float32) == whole


def test_out_of_memory_goes_on_strip_by_strip(host, vae, monkeypatch):
    """Before the host's answer, tiles."""
    import comfy.model_management as memory

    from flux2_pack.flux2_core.autoencoder import AutoEncoder

    latent = {"samples": toy.latents(1, (4, 6))[0]}
    want = host.call("Flux2KitVAEDecode", samples=latent, vae=vae)[0]

    def decode(*_):
        raise memory.OOM_EXCEPTION("CUDA out of memory")

    monkeypatch.setattr(AutoEncoder, "decode", decode)
    monkeypatch.setattr(vae, "decode_tiled_", None)
    got = host.call("Flux2KitVAEDecode", samples=latent, vae=vae)[0]
    assert toy.difference(got, want) < 3e-5  # observed 7.2e-6


def test_a_vae_of_another_node_takes_no_target(host, vae, monkeypatch):
    monkeypatch.setattr(vae, "first_stage_model", torch.nn.Identity())
    latent = {"samples": toy.latents(1, (4, 6))[0]}
    with pytest.raises(Flux2Error, match="cannot be bounded"):
        host.call("Flux2KitVAEDecode", samples=latent, vae=vae, memory=1.0)


@pytest.mark.parametrize("height, width", [(70, 100), (64, 65), (5, 90)])
def test_any_size_comes_back(host, vae, height, width):
    image = toy.images(1, (height, width))[0]
    latent = host.call("Flux2KitVAEEncode", image=image, vae=vae)[0]
    assert latent["samples"].shape == (1, 128, -(-height // 16), -(-width // 16))
    drawn = host.call("Flux2KitVAEDecode", samples=latent, vae=vae)[0]
    assert drawn.shape == (1, height, width, 3)


def test_a_size_that_fits_is_not_noted(host, vae):
    latent = host.call("Flux2KitVAEEncode", image=toy.images(1, (64, 96))[0], vae=vae)[0]
    assert latent.keys() == {"samples", "downscale_ratio_spacial"}


def test_large_canvases_warn(host, vae, caplog):
    model = host.call("Flux2KitModelLoader", model="toy-klein.safetensors")[0]
    host.call("Flux2KitEmptyLatent", model=model, width=2048, height=2048)
    assert not caplog.text
    host.call("Flux2KitEmptyLatent", model=model, width=4096, height=512)
    assert "4000 pixels a side" in caplog.text


def test_a_decoder_alone_takes_the_encoder_beside_it(host, vae, folder):
    state = load_file(folder[0] / "toy-vae.safetensors")
    decoder = {n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")}
    save_file(decoder, folder[0] / "small_decoder.safetensors")
    made = host.call("Flux2KitVAELoader", vae="small_decoder.safetensors")[0]
    image = toy.images(1, (32, 48))[0]
    with torch.inference_mode():
        assert torch.equal(made.encode(image), vae.encode(image))
        assert torch.equal(made.decode(made.encode(image)), vae.decode(vae.encode(image)))
    # Other tests have put autoencoders of their own beside it: none of them may be there.
    others = [f for f in folder[0].glob("*.safetensors") if f.name != "small_decoder.safetensors"]
    for file in others:
        file.rename(file.with_suffix(".away"))
    try:
        with pytest.raises(Flux2Error, match="decoder alone"):
            host.call("Flux2KitVAELoader", vae="small_decoder.safetensors")
    finally:
        for file in others:
            file.with_suffix(".away").rename(file)


def test_taef2(host, folder):
    nets = {"encoder": taef2.encoder(), "decoder": taef2.decoder()}
    for side, net in nets.items():
        save_file(net.state_dict(), folder[1] / f"taef2_{side}.safetensors")
    made = host.call("Flux2KitVAELoader", vae="TAEF2")[0]
    image = toy.images(1, (40, 48))[0]
    latent = host.call("Flux2KitVAEEncode", image=image, vae=made)[0]
    drawn = host.call("Flux2KitVAEDecode", samples=latent, vae=made)[0]
    assert latent["samples"].shape == (1, 128, 3, 3) and drawn.shape == (1, 40, 48, 3)
    pixels = image[:, :32].movedim(-1, 1)
    with torch.inference_mode():
        want = taef2.decode(nets["decoder"], taef2.encode(nets["encoder"], 2 * pixels - 1))
        got = made.decode(made.encode(image[:, :32]))
    assert toy.difference(got, (want.movedim(1, -1) + 1) / 2) < 1e-5  # observed 0
    with pytest.raises(Flux2Error, match="cannot be bounded"):
        host.call("Flux2KitVAEDecode", samples=latent, vae=made, memory=1.0)


def test_taef2_is_offered_where_both_files_are(host, folder):
    from flux2_pack.nodes import loaders

    def offered():
        return "TAEF2" in loaders._vae_input().options

    assert not offered()
    save_file(taef2.encoder().state_dict(), folder[1] / "taef2_encoder.safetensors")
    assert not offered()
    save_file({"a": torch.zeros(1)}, folder[1] / "taef2_decoder.safetensors")
    assert offered()
    with pytest.raises(Flux2Error, match="not TAEF2"):
        host.call("Flux2KitVAELoader", vae="TAEF2")
