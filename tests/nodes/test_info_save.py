"""Checkpoint Info and Save Quantized in the host."""

import pytest
import torch
from safetensors.torch import load_file

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def model(host):
    toy.write_models(host.models)
    return host.call("Flux2KitModelLoader", model="toy-klein.safetensors")[0]


@pytest.fixture(autouse=True)
def output(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


def test_info(host, model):
    (said,) = host.call("Flux2KitCheckpointInfo", file="diffusion_models/toy-klein.safetensors")
    assert "Layout: Black Forest Labs." in said and "of weights" not in said
    assert "are free; it needs" in said
    (said,) = host.call("Flux2KitCheckpointInfo", file="vae/toy-vae.safetensors")
    assert "FLUX.2's VAE" in said
    (said,) = host.call("Flux2KitCheckpointInfo", file="diffusion_models/nano (built in)")
    assert "nano" in said


@pytest.mark.parametrize("form", ["fp8", "int8", "nvfp4", "mxfp8"])
def test_what_is_saved_is_what_is_loaded(host, model, output, form):
    import shutil

    (path,) = host.call("Flux2KitSaveQuantized", model=model, format=form, name=f"sub/toy-{form}")
    assert path == str(output / "sub" / f"toy-{form}_00001.safetensors")
    shutil.copy(path, host.models("diffusion_models") / f"saved-{form}.safetensors")
    (loaded,) = host.call("Flux2KitModelLoader", model=f"saved-{form}.safetensors")
    whole, packed = toy.sampled(model), toy.sampled(loaded)
    error = ((packed - whole).norm() / whole.norm()).item()
    assert 0 < error < {"nvfp4": 0.2}.get(form, 0.05)
    # saved again from the quantised model: the very same codes
    (again,) = host.call("Flux2KitSaveQuantized", model=loaded, format=form, name=f"sub/toy-{form}")
    assert again.endswith("_00002.safetensors")
    a, b = load_file(path), load_file(again)
    assert a.keys() == b.keys()
    assert all(
        torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8)) for k in a
    )


@torch.inference_mode()  # as the host runs everything
def test_the_hosts_own_loader_reads_fp8(host, model, output):
    import comfy.sd
    import comfy.utils

    (path,) = host.call("Flux2KitSaveQuantized", model=model, format="fp8", name="for-the-host")
    state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    with toy.heads_from_width():
        try:
            theirs = comfy.sd.load_diffusion_model_state_dict(state, {}, metadata=metadata)
        except TypeError:  # older hosts find what they need in the state dict
            theirs = comfy.sd.load_diffusion_model_state_dict(state, {})
    whole = toy.sampled(model)
    error = ((toy.sampled(theirs) - whole).norm() / whole.norm()).item()
    assert 0 < error < 0.05


def test_refusals(host, model, output):
    for name in ("../out", "/etc/out", "", "a/../../b"):
        with pytest.raises(Flux2Error, match="below ComfyUI's output folder"):
            host.call("Flux2KitSaveQuantized", model=model, format="fp8", name=name)
    import comfy.sd

    lora = toy.lora(toy.transformer(toy.KLEIN, 1))
    changed = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
    with pytest.raises(Flux2Error, match="carries a LoRA"):
        host.call("Flux2KitSaveQuantized", model=changed, format="fp8", name="x")
    with pytest.raises(Flux2Error, match="Only models of this pack"):
        native = toy.native(toy.transformer(toy.KLEIN, 1))
        host.call("Flux2KitSaveQuantized", model=native, format="fp8", name="x")
    assert not list(output.rglob("*.safetensors"))
