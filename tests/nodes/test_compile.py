"""The host's torch.compile node on our MODEL: the same picture, with LoRAs and fp8."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.kernels import table
from flux2_pack.flux2_core.kernels.reference import fp8_linear
from flux2_pack.flux2_core.precision import without_codes
from flux2_pack.tests.nodes import toy

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]
BLOCKS = ("qkv.weight", "proj.weight", "mlp.0.weight", "mlp.2.weight", "linear1.weight", "linear2.weight")  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def attention_of_a_gpu(host, monkeypatch):
    """PyTorch's: the host's choice for a CPU asks for free memory, which breaks every graph."""
    from comfy.ldm.modules.attention import attention_pytorch

    from flux2_pack.nodes import host_model

    monkeypatch.setattr(host_model, "optimized_attention", attention_pytorch)


def model_of(stored: str, config=toy.KLEIN):
    state = toy.transformer(config, 1)
    if stored != "plain":
        for name in [name for name in state if name.endswith(BLOCKS)]:
            state[name] = encode(state[name], "float8_e4m3fn")
    return toy.ours(config, state)


def changed(model, lora: str, tmp_path):
    """With a LoRA by our node's way or the host's own."""
    tensors = toy.lora(toy.transformer(toy.KLEIN, 1))
    if lora == "ours":
        from flux2_pack.nodes.host_lora import with_lora

        save_file(tensors, tmp_path / "toy.safetensors")
        return with_lora(model, str(tmp_path / "toy.safetensors"), 1.0)[0]
    if lora == "host":
        import comfy.sd

        return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)[0]
    return model


@pytest.mark.parametrize("lora", ["none", "ours", "host"])
@pytest.mark.parametrize("stored", ["plain", "fp8", "fp8 products"])
def test_one_graph(host, tmp_path, stored, lora):
    """As the host's node does it, with a compiler that counts."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    with kernels.use("eager" if stored == "fp8 products" else "auto"):
        model = changed(model_of(stored), lora, tmp_path)
        twin, counter = model.clone(), CompileCounterWithBackend("aot_eager")
        set_torch_compile_wrapper(twin, backend=counter)
        drawn = toy.sampled(twin)
        assert counter.frame_count == 1
        assert toy.difference(drawn, toy.sampled(model)) < 1e-5  # seen 0


@pytest.mark.parametrize("lora", ["ours", "host"])
def test_one_graph_of_offloaded_layers(host, tmp_path, lora):
    """With room for a part of the weights only."""
    model = changed(model_of("fp8"), lora, tmp_path)
    network, counter = model.model.diffusion_model, CompileCounterWithBackend("eager")
    run = torch.compile(network, backend=counter)
    x, context = toy.latents(3, (8, 8))[0], torch.randn(1, 512, 384)
    with torch.inference_mode():
        model.patch_model(load_weights=False)
        model.load(model.load_device, lowvram_model_memory=1)
        for time in (1.0, 0.5):
            given = x, torch.full((1,), time), context
            wanted = network(*given, transformer_options={})
            assert toy.difference(run(*given, transformer_options={}), wanted) < 1e-5  # seen 0
        model.detach()
    assert counter.frame_count == 1


@pytest.mark.parametrize("control", ["strength", "Flux2KitStepCache", "Flux2KitReferenceCache"])
def test_controls_break_the_graph_and_nothing_else(host, monkeypatch, control):
    """They read what stands in tensors: how far the run is, what is known from earlier steps."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    from flux2_pack.nodes.host_controls import EMPTY, STOCK

    model = model_of("plain")
    if control == "strength":
        kit = {**EMPTY, "references": [{**STOCK, "strength": 0.5}, dict(STOCK)]}
        stock = toy.conditioning

        def steered(*args, **options):
            return stock(*args, **options, **({"flux2_kit": kit} if options else {}))

        monkeypatch.setattr(toy, "conditioning", steered)
    else:
        model = host.call(control, model=model)[0]
    twin = model.clone()
    set_torch_compile_wrapper(twin, backend="eager")
    assert toy.difference(toy.sampled(twin), toy.sampled(model)) < 1e-5  # seen 0


def test_a_step_that_overflows_is_repeated(host, caplog):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model_of("fp8")
    shape = model.model.diffusion_model.single_blocks[0].linear1.shape
    with without_codes(model.model.diffusion_model):
        wanted = toy.sampled(model)
    op = table.OPS["fp8_linear"]
    before = list(op.candidates)

    def broken(codes, scale, weight, weight_scale, dtype=torch.bfloat16):
        out = fp8_linear(codes, scale, weight, weight_scale, dtype)
        return out * torch.nan if weight.shape == tuple(shape) else out

    kernels.register("fp8_linear", "broken", 1000, broken)
    twin = model.clone()
    set_torch_compile_wrapper(twin, backend="eager")
    try:
        with caplog.at_level(logging.WARNING):
            drawn = toy.sampled(twin)
    finally:
        op.candidates = before
        op.chosen.clear()
    assert torch.equal(drawn, wanted)
    assert "in single_blocks.0.linear1:" in caplog.text


@pytest.mark.slow
def test_the_hosts_own_node(host):
    """With the compiler that it offers: the smallest model, in fp8."""
    model = model_of("fp8", TransformerConfig(128, 384, 1, 1, guidance_embed=False))
    drawn = toy.sampled(host.call("TorchCompileModel", model=model, backend="inductor")[0])
    assert toy.difference(drawn, toy.sampled(model)) < 1e-4  # seen 4e-6
