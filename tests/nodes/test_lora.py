"""FLUX.2 LoRA in the host: on plain and quantised MODELs, ours and the host's own."""

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import Packed, encode
from flux2_pack.flux2_core.keymaps import TRANSFORMER, to_diffusers
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
CLOSE = 1e-4  # observed at most 5.1e-6
LAYERS = (
    "double_blocks.0.img_attn.qkv",
    "single_blocks.1.linear1",
    "final_layer.adaLN_modulation.1",
)
BLOCKS = (
    "qkv.weight",
    "proj.weight",
    "mlp.0.weight",
    "mlp.2.weight",
    "linear1.weight",
    "linear2.weight",
)


@pytest.fixture(scope="module")
def state(host):
    return toy.transformer(toy.KLEIN, 1)


def factors(state):
    generator = torch.Generator().manual_seed(5)
    out = {}
    for name in LAYERS:
        rows, columns = state[f"{name}.weight"].shape
        a, b = (torch.randn(s, generator=generator) * 0.1 for s in ((4, columns), (rows, 4)))
        out[name] = a, b
    return out


def changed(state, strength=1.0):
    """The weights with the change added."""
    out = {k: v.decode() if isinstance(v, Packed) else v for k, v in state.items()}
    for name, (a, b) in factors(out).items():
        out[f"{name}.weight"] = (
            out[f"{name}.weight"].double() + strength * b.double() @ a.double()
        ).float()
    return out


@pytest.fixture(scope="module")
def file(host, state):
    """In diffusers' names: split q, k, v and swapped halves."""
    tensors = {}
    for name, (a, b) in factors(state).items():
        for theirs, rows in to_diffusers({f"{name}.weight": b}, TRANSFORMER).items():
            theirs = "transformer." + theirs.removesuffix(".weight")
            tensors |= {
                f"{theirs}.lora_A.weight": a.clone(),
                f"{theirs}.lora_B.weight": rows.contiguous(),
            }
    path = host.models("loras") / "toy-style.safetensors"
    save_file(tensors, path)
    return path.name


def applied(host, model, file, strength=1.0):
    return host.call("Flux2KitLoRA", model=model, lora=file, strength=strength)


def test_on_plain_weights(host, state, file):
    model = toy.ours(toy.KLEIN, state)
    stock = toy.sampled(model)
    out, report = applied(host, model, file, 0.8)
    assert (
        toy.difference(toy.sampled(out), toy.sampled(toy.ours(toy.KLEIN, changed(state, 0.8))))
        < CLOSE
    )
    assert torch.equal(toy.sampled(model), stock)
    assert "10 tensors change 3 layers" in report and "they move these layers' weights by" in report


def test_on_the_hosts_own_model(host, state, file):
    out, _ = applied(host, toy.native(state), file)
    assert toy.difference(toy.sampled(out), toy.sampled(toy.native(changed(state)))) < CLOSE


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4"])
def test_beside_quantised_weights(host, state, file, form):
    """Codes stay as they are, in use too; offloaded layers are no different."""
    packed = {k: encode(v, form) if k.endswith(BLOCKS) else v for k, v in state.items()}
    model = toy.ours(toy.KLEIN, packed)
    layer = model.model.diffusion_model.single_blocks[1].linear1
    stock, dtype = toy.sampled(model), layer.weight.dtype
    wanted = toy.sampled(toy.ours(toy.KLEIN, changed(packed)))
    out, _ = applied(host, model, file)
    seen = []
    spy = layer.register_forward_hook(lambda *_: seen.append(layer.weight.dtype))
    assert toy.difference(toy.sampled(out), wanted) < CLOSE
    assert set(seen) == {dtype}

    def squeeze(patcher):
        patcher.load(patcher.load_device, lowvram_model_memory=patcher.model_size() // 3)
        return patcher

    assert toy.difference(toy.sampled(out, prepare=squeeze), wanted) < CLOSE
    spy.remove()
    assert torch.equal(toy.sampled(model), stock)


@pytest.mark.parametrize("form", ["", "float8_e4m3fn", "nvfp4"])
def test_weights_are_read_as_they_were_loaded(host, state, form):
    """For DoRA's norms and for the report: a clone with another LoRA, which shares the layers, may be in
    use at the moment."""
    import comfy.sd

    packed = {k: encode(v, form) if form and k.endswith(BLOCKS) else v for k, v in state.items()}
    model, tensors = toy.ours(toy.KLEIN, packed), {}
    for name, (a, b) in factors(state).items():
        norms = state[f"{name}.weight"].norm(dim=1, keepdim=True) * 1.1
        parts = {"lora_A.weight": a, "lora_B.weight": b, "dora_scale": norms}
        tensors |= {f"diffusion_model.{name}.{part}": t for part, t in parts.items()}
    save_file(tensors, host.models("loras") / "toy-dora.safetensors")
    wanted, said = applied(host, model, "toy-dora.safetensors")
    drawn = toy.sampled(wanted)
    other = comfy.sd.load_lora_for_models(model, None, toy.lora(state), 5.0, 0)[0]
    wanted.detach()
    other.load(other.load_device, full_load=True)
    again, told = applied(host, model, "toy-dora.safetensors")
    other.detach()
    assert told == said
    assert torch.equal(toy.sampled(again), drawn)


def test_several_add_up(host, state, file):
    packed = {k: encode(v, "float8_e4m3fn") if k.endswith(BLOCKS) else v for k, v in state.items()}
    for weights in (state, packed):
        model = toy.ours(toy.KLEIN, weights)
        once, _ = applied(host, model, file, 1.5)
        twice, _ = applied(host, once, file, -0.5)
        wanted = toy.sampled(toy.ours(toy.KLEIN, changed(weights)))
        assert toy.difference(toy.sampled(twice), wanted) < CLOSE


def test_strength_0_is_stock_bit_for_bit(host, state, file):
    model = toy.ours(toy.KLEIN, state)
    out, _ = applied(host, model, file, 0.0)
    assert torch.equal(toy.sampled(out), toy.sampled(model))


def test_a_lora_of_another_size(host, state):
    path = host.models("loras") / "toy-of-9b.safetensors"
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(2, 4096),
        f"{key}.lora_B.weight": torch.ones(12288, 2),
    }
    save_file(tensors, path)
    with pytest.raises(Flux2Error, match=r"was made for FLUX\.2 klein 9B"):
        applied(host, toy.ours(toy.KLEIN, state), path.name)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("form", [None, "float8_e4m3fn"])
def test_dora(host, state, form, vector):
    """Norms of the weight after the change, as trainers have it; PEFT writes the scale as a vector."""
    if form:
        state = {k: encode(v, form) if k.endswith(BLOCKS) else v for k, v in state.items()}
    wanted, name = changed(state, 0.0), LAYERS[1]
    a, b = factors(wanted)[name]
    weight = wanted[f"{name}.weight"].double()
    moved, size = weight + b.double() @ a.double(), 1.1 * weight.norm(dim=1, keepdim=True)
    delta = moved * size / moved.norm(dim=1, keepdim=True) - weight
    wanted[f"{name}.weight"] = (weight + 0.6 * delta).float()
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if vector:
        tensors[f"{name}.lora_magnitude_vector"] = size.flatten().float()
    else:
        tensors[f"{name}.dora_scale"] = size.float()
    path = host.models("loras") / f"toy-dora-{form}-{vector}.safetensors"
    save_file(tensors, path)
    out, _ = applied(host, toy.ours(toy.KLEIN, state), path.name, 0.6)
    assert toy.difference(toy.sampled(out), toy.sampled(toy.ours(toy.KLEIN, wanted))) < CLOSE


def test_the_report_says_on_how_many_layers_it_measured(host, state):
    """Reading every weight of a large model would take long: some are read."""
    tensors = {}
    for name in (key.removesuffix(".weight") for key in state if key.endswith(BLOCKS)):
        rows, columns = state[f"{name}.weight"].shape
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.ones(2, columns)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.ones(rows, 2)
    path = host.models("loras") / "toy-of-all-blocks.safetensors"
    save_file(tensors, path)
    _, report = applied(host, toy.ours(toy.KLEIN, state), path.name)
    count = len(tensors) // 2
    assert f"measured on {len(range(0, count, count // 8))} of the changes" in report
    assert report.startswith("toy-of-all-blocks.safetensors (ai-toolkit): ")
