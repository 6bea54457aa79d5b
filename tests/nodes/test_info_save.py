"""Checkpoint Info and Save Quantized in the host."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.quantised import ALIASES
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


@pytest.mark.parametrize("form", ["fp8", "fp8_rows", "int8", "nvfp4", "mxfp8"])
def test_what_is_saved_is_what_is_loaded(host, model, output, form):
    (path,) = host.call("Flux2KitSaveQuantized", model=model, format=form, name=f"sub/toy-{form}")
    assert path == str(output / "sub" / f"toy-{form}_00001.safetensors")
    (loaded,) = host.call("Flux2KitModelLoader", model=_placed(host, path, form))
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


@pytest.mark.parametrize("stored", ["plain", "fp8", "nvfp4"])
def test_a_lora_that_is_in_use_elsewhere_is_not_saved(host, model, output, stored):
    """A clone with a LoRA shares its layers with the bare MODEL, and may be the one that is loaded."""
    import comfy.sd

    if stored != "plain":
        (path,) = host.call("Flux2KitSaveQuantized", model=model, format=stored, name="bare")
        (model,) = host.call("Flux2KitModelLoader", model=_placed(host, path, f"bare-{stored}"))
    form = stored if stored != "plain" else "fp8"
    (bare,) = host.call("Flux2KitSaveQuantized", model=model, format=form, name="before")
    lora = toy.lora(toy.transformer(toy.KLEIN, 1))
    changed = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
    changed.load(changed.load_device, full_load=True)
    (again,) = host.call("Flux2KitSaveQuantized", model=model, format=form, name="while")
    changed.detach()
    a, b = load_file(bare), load_file(again)
    assert a.keys() == b.keys()
    assert all(
        torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8)) for k in a
    )


def test_the_loader_says_what_it_took_a_file_for(host, model, caplog):
    with caplog.at_level(logging.INFO):
        host.call("Flux2KitModelLoader", model="toy-klein.safetensors")
        host.call("Flux2KitModelLoader", model="nano (built in)")
    assert "toy-klein.safetensors is FLUX.2 (custom), a size that no release has." in caplog.text
    assert "nano is nano (built in), told by its metadata;" in caplog.text


@torch.inference_mode()  # as the host runs everything
@pytest.mark.parametrize("form", ["fp8", "fp8_rows", "int8", "nvfp4", "mxfp8"])
def test_the_hosts_own_loader_reads_it(host, model, output, form):
    import comfy.utils
    from comfy import quant_ops

    if form not in ("fp8", "fp8_rows") and ALIASES.get(form, form) not in quant_ops.QUANT_ALGOS:
        pytest.skip(f"this host has no {form}")
    (path,) = host.call("Flux2KitSaveQuantized", model=model, format=form, name="for-the-host")
    state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    with toy.heads_from_width():
        theirs = _load(state, metadata)
    (ours,) = host.call("Flux2KitModelLoader", model=_placed(host, path, form))
    whole, other, mine = toy.sampled(model), toy.sampled(theirs), toy.sampled(ours)
    scale = whole.norm()
    assert 0 < ((other - whole).norm() / scale).item() < {"nvfp4": 0.2}.get(form, 0.05)
    # both decode alike: 2e-6 apart; the host's int8 rounds activations too: 0.017
    assert ((other - mine).norm() / scale).item() < {"int8": 0.04}.get(form, 1e-4)


def _load(state, metadata):
    import comfy.sd

    try:
        return comfy.sd.load_diffusion_model_state_dict(state, {}, metadata=metadata)
    except TypeError:  # older hosts find what they need in the state dict
        return comfy.sd.load_diffusion_model_state_dict(state, {})


def _placed(host, path, form) -> str:
    name = f"placed-{form}.safetensors"
    shutil.copy(path, host.models("diffusion_models") / name)
    return name


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
