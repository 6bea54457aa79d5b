"""Our VAE object: nothing that a host may ask of it is missing."""

import pytest
import torch

from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.configs import AutoEncoderConfig
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def vae(host):
    toy.write_models(host.models)
    return host.call("Flux2KitVAELoader", vae="toy-vae.safetensors")[0]


def test_every_attribute_of_the_hosts_own(host, vae):
    """The host's constructor is skipped: what it would have set, we set, with its values."""
    import comfy.sd

    config = AutoEncoderConfig(128, 128, encoder_blocks=2, decoder_blocks=2)
    with torch.device("meta"):
        state = AutoEncoder(config).state_dict()
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    theirs = vars(comfy.sd.VAE(sd=state))
    assert theirs.keys() <= vars(vae).keys()
    for name, value in theirs.items():
        if value is None or isinstance(value, (bool, int, str, list, torch.dtype, torch.device)):
            assert name == "size" or vars(vae)[name] == value, name


def test_memory_estimates_follow_the_width(vae):
    """The host's figures for the released width; ours shrink with a narrower network."""
    shape, width = (1, 128, 64, 64), 16 / 128
    want = 2178 * 64 * 64 * 64 * 4 * 4 * width
    assert vae.memory_used_decode(shape, torch.float32) == pytest.approx(want)
    want = 1767 * 1024 * 1024 * 4 * width
    assert vae.memory_used_encode((1, 3, 1024, 1024), torch.float32) == pytest.approx(want)


def test_output_is_made_in_place(vae):
    """Newer hosts ignore what process_output returns, older ones use it."""
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0])
    out = vae.process_output(x)
    assert out is x and x.tolist() == [0.0, 0.0, 0.5, 1.0]


def test_odd_sizes_are_cropped(vae):
    with torch.inference_mode():
        assert vae.encode(toy.images(1, (70, 100))[0]).shape == (1, 128, 4, 6)


def test_statistics_stay_float32(host, vae):
    assert vae.first_stage_model.bn.running_mean.dtype == torch.float32


def test_out_of_memory_reaches_the_host(host, vae, monkeypatch):
    """The host answers it with tiled decoding: the exception must come out."""
    import comfy.model_management as memory

    def decode(x):
        if x.shape[-1] > 4:
            raise memory.OOM_EXCEPTION("CUDA out of memory")
        return torch.zeros(1, 3, 16 * x.shape[2], 16 * x.shape[3])

    monkeypatch.setattr(vae.first_stage_model, "decode", decode)
    monkeypatch.setattr(vae, "decode_tiled_", lambda samples: torch.full((1, 3, 96, 96), 0.25))
    with torch.inference_mode():
        assert vae.decode(torch.zeros(1, 128, 6, 6)).unique().tolist() == [0.25]


def test_reload_factory(host, vae):
    if not hasattr(vae.patcher, "cached_patcher_init"):
        pytest.skip("this ComfyUI does not reload")
    make, values = vae.patcher.cached_patcher_init[:2]
    again = make(*values, disable_dynamic=True)
    assert again.model is not vae.first_stage_model


def test_the_plain_patcher_where_the_host_asks_for_it(host, monkeypatch):
    """Newer hosts keep weights in files, and now and then want a VAE or CLIP that does not."""
    import comfy.model_patcher

    from flux2_pack.nodes import host_text, host_vae

    plain = comfy.model_patcher.ModelPatcher
    monkeypatch.setattr(
        comfy.model_patcher, "CoreModelPatcher", type("Dynamic", (plain,), {}), raising=False
    )
    for load in (host_vae.load_vae, host_text.load_clip):
        kinds = [type(load("nano", disable_dynamic=off).patcher) for off in (False, True)]
        assert kinds == [comfy.model_patcher.CoreModelPatcher, plain]
