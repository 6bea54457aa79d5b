"""Quantised weights inside the host: drawn, patched, offloaded, restored."""

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import Packed, encode
from flux2_pack.tests.core.toys import decibels
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4", "mxfp8")
BLOCKS = (
    "qkv.weight",
    "proj.weight",
    "mlp.0.weight",
    "mlp.2.weight",
    "linear1.weight",
    "linear2.weight",
)


def quantised(state, form):
    return {k: encode(v, form) if k.endswith(BLOCKS) else v for k, v in state.items()}


def plain(state):
    return {k: v.decode() if isinstance(v, Packed) else v for k, v in state.items()}


@pytest.fixture(scope="module", params=FORMATS)
def pair(request, host):
    """(our MODEL of plain weights, ours of the quantised weights that stand for the same)."""
    state = quantised(toy.transformer(toy.KLEIN, 1), request.param)
    return toy.ours(toy.KLEIN, plain(state)), toy.ours(toy.KLEIN, state)


def codes(model):
    return {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}


def same_bytes(a, b):
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def with_lora(model, strength=1.0):
    import comfy.sd

    lora = toy.lora(toy.transformer(toy.KLEIN, 1))
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def free():
    import comfy.model_management as memory

    memory.unload_all_models()


def test_the_same_picture(pair):
    whole, packed = (toy.sampled(model) for model in pair)
    assert toy.difference(packed, whole) < 1e-5  # observed 0


def test_the_hosts_lora_is_never_added_onto_codes(pair):
    """Loaded whole: the patched layers stand in for the file's, and its codes come back after."""
    before = codes(pair[1])
    whole, packed = (toy.sampled(with_lora(model)) for model in pair)
    if pair[1].model.diffusion_model.single_blocks[0].linear1.format == "float8_e4m3fn":
        assert decibels(packed, whole) > 35  # observed 42: codes again, rounded at random
    else:
        assert toy.difference(packed, whole) < 1e-4  # observed 0
    assert toy.difference(packed, toy.sampled(pair[1])) > 0.05
    free()
    after = codes(pair[1])
    assert after.keys() == before.keys()
    assert all(a.dtype == before[k].dtype and same_bytes(a, before[k]) for k, a in after.items())


@pytest.fixture
def fp8(host):
    free()
    yield toy.ours(toy.KLEIN, quantised(toy.transformer(toy.KLEIN, 1), "float8_e4m3fn"))
    free()


PATCHED = "single_blocks.1.linear1"  # one of toy.lora's


def merged_right(layer) -> torch.Tensor:
    """What the host's LoRA makes of a layer, in float64."""
    lora = {k: v.double() for k, v in toy.lora(toy.transformer(toy.KLEIN, 1)).items()}
    a, b = (lora[f"diffusion_model.{PATCHED}.lora_{part}.weight"] for part in "AB")
    return layer.packed.decode().double() + b @ a


def bytes_of(layer) -> int:
    return sum(t.numel() * t.element_size() for t in layer.state_dict().values())


def test_a_patched_fp8_layer_stays_fp8(fp8):
    """Half the memory of numbers, the same codes each time, and the file's own come back."""
    layer = fp8.model.diffusion_model.get_submodule(PATCHED)
    right, held, before = merged_right(layer), bytes_of(layer), codes(fp8)
    made = []
    for _ in range(2):
        model = with_lora(fp8)
        model.load(model.load_device, full_load=True)
        made.append(layer.packed)
        assert layer.weight.dtype == torch.float8_e4m3fn and bytes_of(layer) == held
        assert (
            decibels(layer.packed.decode(), right) > 28
        )  # observed 28.6; rounded to the nearest 31.6
        model.detach()
        after = codes(fp8)
        assert after.keys() == before.keys()
        assert all(same_bytes(after[k], v) for k, v in before.items())
    first, second = (packed.parts for packed in made)
    assert all(same_bytes(first[part], second[part]) for part in first)
    assert not same_bytes(first["weight"], before[f"{PATCHED}.weight"])


def test_rows_that_a_lora_leaves_alone_keep_their_codes(fp8):
    import comfy.sd

    lora = toy.lora(toy.transformer(toy.KLEIN, 1))
    lora[f"diffusion_model.{PATCHED}.lora_B.weight"][10:] = 0
    layer = fp8.model.diffusion_model.get_submodule(PATCHED)
    before = layer.packed.parts
    model = comfy.sd.load_lora_for_models(fp8, None, lora, 1.0, 0)[0]
    model.load(model.load_device, full_load=True)
    after = layer.packed.parts
    model.detach()
    assert torch.equal(after["weight_scale"][10:], before["weight_scale"].reshape(-1, 1)[10:])
    changed = after["weight"].view(torch.uint8) != before["weight"].view(torch.uint8)
    assert (
        changed[:10].float().mean() > 0.2 and changed[10:].float().mean() < 1e-4
    )  # seen 0.90, 2e-6


def test_a_patched_fp8_layer_that_is_offloaded_and_loaded_again(fp8):
    """The file's codes go out, the patch is made at use; loaded again, the codes are the same."""
    layer = fp8.model.diffusion_model.get_submodule(PATCHED)
    right, before = merged_right(layer), codes(fp8)
    x = torch.randn(3, layer.shape[1])
    model = with_lora(fp8)
    model.load(model.load_device, full_load=True)
    whole = layer.packed.parts
    model.partially_unload(model.offload_device, 1e12)
    assert all(same_bytes(v, before[k]) for k, v in codes(fp8).items())
    assert layer._changes()
    with torch.inference_mode():
        assert toy.difference(layer(x), x @ right.float().T) < 1e-5  # observed 7e-7
    model.detach()
    model.load(model.load_device, full_load=True)
    again = layer.packed.parts
    assert all(same_bytes(whole[part], again[part]) for part in whole)
    model.detach()


def test_products_of_patched_codes_are_products_of_codes(fp8):
    from flux2_pack.flux2_core import kernels

    layer = fp8.model.diffusion_model.get_submodule(PATCHED)
    x = torch.randn(5, layer.shape[1])
    model = with_lora(fp8)
    model.load(model.load_device, full_load=True)
    with kernels.use("reference"), torch.inference_mode():
        assert layer.takes_codes(x)
        drawn, wanted = layer(x), x @ layer.packed.decode().T
    model.detach()
    assert decibels(drawn, wanted) > 28  # observed 31.5: x in codes too


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4"])
def test_loras_that_come_and_go_during_a_picture(host, form):
    """The host writes these over the codes and copies those back: the scale stays the file's."""
    import comfy.hooks

    free()
    state = quantised(toy.transformer(toy.KLEIN, 1), form)
    packed, whole = toy.ours(toy.KLEIN, state), toy.ours(toy.KLEIN, plain(state))
    lora, before = toy.lora(toy.transformer(toy.KLEIN, 1)), codes(packed)

    def drawn(model):
        hooks = [comfy.hooks.create_hook_lora(lora, strength, 0) for strength in (1.0, -0.5)]
        return toy.sampled(model, hooks=hooks)

    if form != "float8_e4m3fn":
        with pytest.raises(Flux2Error, match="comes and goes"):
            drawn(packed)
        return
    stock, right = toy.sampled(whole), drawn(whole)
    assert toy.difference(right, stock) > 0.05
    assert decibels(drawn(packed), right) > 28  # observed 33
    free()
    assert all(same_bytes(v, before[k]) for k, v in codes(packed).items())


def test_offloaded_layers_are_patched_at_use(pair, monkeypatch):
    """With room for a part of the weights only."""
    import comfy.model_patcher as patcher

    free()
    seen = []
    stock = patcher.LowVramPatch.__call__
    spy = lambda self, weight: seen.append(self.key) or stock(self, weight)  # noqa: E731
    monkeypatch.setattr(patcher.LowVramPatch, "__call__", spy)
    model = with_lora(pair[1])
    model.load(model.load_device, lowvram_model_memory=1)
    with torch.inference_mode():
        kwargs = {"transformer_options": {}, "guidance": None}
        x, context = toy.latents(3, (8, 8))[0], torch.randn(1, 32, 384)
        net = model.model.diffusion_model
        offloaded = net(x, torch.ones(1), context, **kwargs)
        assert {key.rsplit(".", 2)[-2] for key in seen} >= {"qkv", "linear1"}
        model.detach()
        other = with_lora(pair[0])
        other.load(other.load_device, full_load=True)
        wanted = other.model.diffusion_model(x, torch.ones(1), context, **kwargs)
        other.detach()
    assert toy.difference(offloaded, wanted) < 1e-4  # observed 0


def test_what_is_held_is_what_the_file_holds(pair):
    form = pair[1].model.diffusion_model.single_blocks[0].linear1.format
    share = pair[1].model_size() / pair[0].model_size()
    assert share < (0.45 if form == "nvfp4" else 0.55)  # the rest stays in float32


def test_gguf(host):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    state = toy.transformer(toy.KLEIN, 1)
    for name in [name for name in state if name.endswith(BLOCKS)]:
        rows = gguf.quants.quantize(state[name].numpy(), gguf.GGMLQuantizationType.Q8_0)
        shape = tuple(state[name].shape)
        state[name] = Packed("gguf Q8_0", shape, {"weight": torch.from_numpy(rows)})
    whole, packed = toy.ours(toy.KLEIN, plain(state)), toy.ours(toy.KLEIN, state)
    assert toy.difference(toy.sampled(packed), toy.sampled(whole)) < 1e-5  # observed 0
    ours, theirs = (toy.sampled(with_lora(model)) for model in (packed, whole))
    assert toy.difference(ours, theirs) < 1e-4  # observed 0


def test_the_loader_lists_and_loads_files_of_every_kind(host):
    """As files in models/diffusion_models, GGUF among them, through the node and a sampler."""
    from safetensors.torch import save_file

    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    state = toy.transformer(toy.KLEIN, 1)
    folder = host.models("diffusion_models")
    packed = quantised(state, "float8_e4m3fn")
    flat = {k: v for k, v in state.items() if not isinstance(packed[k], Packed)}
    for name, value in packed.items():
        if isinstance(value, Packed):
            layer = name.removesuffix("weight")
            flat |= {layer + part: tensor for part, tensor in value.parts.items()}
    save_file({k: v.contiguous() for k, v in flat.items()}, folder / "toy-klein-fp8.safetensors")
    writer = gguf.GGUFWriter(folder / "toy-klein-Q8_0.gguf", "flux")
    for name, tensor in state.items():
        form = gguf.GGMLQuantizationType["Q8_0" if name.endswith(BLOCKS) else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(state, folder / "toy-klein-whole.safetensors")
    toy.add_nodes(host)

    def drawn(file):
        return host.run(
            {
                "model": toy.node("Flux2KitModelLoader", model=file, variant="auto"),
                "prompt": toy.node("ToyPrompt", number=1),
                "empty": toy.node("EmptyFlux2LatentImage", width=128, height=128, batch_size=1),
                "sample": toy.node(
                    "Flux2KitSampler",
                    model=["model", 0],
                    positive=["prompt", 0],
                    latent=["empty", 0],
                    steps=2,
                    guidance=1.0,
                    seed=1,
                    denoise=1.0,
                ),
            },
            {"latent": ("sample", 0)},
        ).kept["latent"]["samples"]

    whole = drawn("toy-klein-whole.safetensors")
    observed = {"toy-klein-fp8.safetensors": 0.017, "toy-klein-Q8_0.gguf": 0.0038}
    for file, seen in observed.items():
        error = ((drawn(file) - whole).norm() / whole.norm()).item()
        assert 0 < error < 2 * seen


def test_weights_that_the_host_faults_in_lazily(host, monkeypatch):
    """Newer hosts keep weights in the file until they are used: codes and scales stay as they are."""
    from flux2_pack.nodes import host_objects

    memory = pytest.importorskip(
        "comfy.memory_management", reason="this ComfyUI keeps no weights in files"
    )
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this ComfyUI keeps no weights in files")
    state = quantised(toy.transformer(toy.KLEIN, 1), "nvfp4")
    whole = toy.ours(toy.KLEIN, plain(state))
    memory.aimdo_enabled = True
    monkeypatch.setattr(host_objects, "assign", lambda patcher: {"assign": True})
    try:
        model = toy.ours(toy.KLEIN, state)
    finally:
        memory.aimdo_enabled = False
    layer = model.model.diffusion_model.single_blocks[0].linear1
    stored = state["single_blocks.0.linear1.weight"].parts["weight"]
    assert layer.weight.data_ptr() == stored.data_ptr()
    assert toy.difference(toy.sampled(model), toy.sampled(whole)) < 1e-5  # observed 0


def test_codes_stay_on_the_device_between_steps(host, monkeypatch):
    """Newer hosts fault weights in at use, on a GPU: through their own layers, which ours are not. A
    MODEL of codes takes the older way, by which the host loads layers once."""
    import comfy.model_patcher as patcher

    from flux2_pack.nodes import host_objects

    class Dynamic(patcher.ModelPatcher):
        def is_dynamic(self):
            return True

    monkeypatch.setattr(patcher, "CoreModelPatcher", Dynamic, raising=False)
    monkeypatch.setattr(host_objects, "assign", lambda patcher: {})
    state = toy.transformer(toy.KLEIN, 1)
    assert toy.ours(toy.KLEIN, dict(state)).is_dynamic()
    packed = toy.ours(toy.KLEIN, quantised(state, "float8_e4m3fn"))
    assert not isinstance(packed, Dynamic)
    assert toy.clip().patcher.is_dynamic()
    assert not isinstance(toy.clip(change=coded_text).patcher, Dynamic)


def coded_text(state: dict) -> dict:
    """A text encoder's large matrices in fp8."""
    from flux2_pack.flux2_core.formats import encode

    big = {k for k, v in state.items() if v.ndim == 2 and "proj" in k}
    return {k: encode(v, "float8_e4m3fn") if k in big else v for k, v in state.items()}


def test_layers_that_the_host_makes_without_weights_are_filled(host):
    """As those hosts build a network, with a MODEL that is loaded at once."""
    memory = pytest.importorskip(
        "comfy.memory_management", reason="this ComfyUI keeps no weights in files"
    )
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this ComfyUI keeps no weights in files")
    state = quantised(toy.transformer(toy.KLEIN, 1), "float8_e4m3fn")
    memory.aimdo_enabled = True
    try:
        model = toy.ours(toy.KLEIN, state)
    finally:
        memory.aimdo_enabled = False
    whole = toy.ours(toy.KLEIN, plain(state))
    assert toy.difference(toy.sampled(model), toy.sampled(whole)) < 1e-5  # observed 0
