"""Our MODEL against the host's own FLUX.2, in all the ways that other nodes can bend it."""

import copy

import pytest
import torch

from flux2_pack.flux2_core import configs
from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host
CLOSE = 1e-4  # observed at most 6.4e-6: float32, two steps of Euler with CFG 4
CONFIGS = {"dev": toy.DEV, "klein": toy.KLEIN}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, host):
    """(the host's MODEL, ours) of the same random weights."""
    config = CONFIGS[request.param]
    state = toy.transformer(config)
    return toy.native(state), toy.ours(config, state)


def compare(pair, **how) -> float:
    theirs, ours = (toy.sampled(model, **how) for model in pair)
    assert theirs.std() > 0.1
    return toy.difference(ours, theirs)


@pytest.mark.parametrize("references", [0, 1, 2])
def test_same_latents(pair, references):
    assert compare(pair, references=references) < CLOSE


def test_batch_and_odd_size(pair):
    assert compare(pair, batch=2, size=(5, 9)) < CLOSE


@pytest.mark.parametrize("method", ["index", "offset", "uxo"])
def test_reference_methods(pair, method):
    assert compare(pair, method=method) < CLOSE


def needs(node: str):
    """Skip unless the host has this node (hosts before 0.33 lack some)."""
    import comfy_extras.nodes_flux as flux

    if node == "NAGuidance":
        module = pytest.importorskip(
            "comfy_extras.nodes_nag", reason="this ComfyUI has no NAGuidance"
        )
        return module.NAGuidance
    return getattr(flux, node, None) or pytest.skip(f"this ComfyUI has no {node}")


def test_index_timestep_zero(pair):
    """Without CFG on dev: the host's own dies there with two rows (a bug of ComfyUI 0.33)."""
    needs("FluxKVCache")
    cfg = 1.0 if pair[1].model.config.guidance_embed else 4.0
    assert compare(pair, method="index_timestep_zero", cfg=cfg) < CLOSE


def test_index_timestep_zero_on_dev_with_two_rows(host):
    """Ours does not die there: the first of two pictures is what it is alone."""
    net = toy.ours(toy.DEV, toy.transformer(toy.DEV)).model.diffusion_model
    x, context = torch.randn(2, 128, 4, 4), torch.randn(2, 512, 384)
    how = {
        "ref_latents": toy.latents(4, (4, 4)),
        "ref_latents_method": "index_timestep_zero",
        "transformer_options": {},
    }
    t, g = torch.tensor([0.5, 0.9]), torch.tensor([4.0, 2.0])
    with torch.inference_mode():
        both = net(x, t, context, guidance=g, **how)
        alone = net(x[:1], t[:1], context[:1], guidance=g[:1], **how)
    assert toy.difference(both[:1], alone) < 1e-5  # observed 1.3e-6


def test_kv_cache_node(pair):
    node = needs("FluxKVCache")
    cfg = 1.0 if pair[1].model.config.guidance_embed else 4.0
    how = {"prepare": lambda m: node.execute(m).args[0], "cfg": cfg, "negative": 24}
    assert compare(pair, **how) < CLOSE


def test_nag_node(pair):
    node = needs("NAGuidance")
    prepare = lambda m: node.execute(m, 5.0, 0.5, 1.5).args[0]  # noqa: E731
    plain = toy.sampled(pair[1])
    assert toy.difference(toy.sampled(pair[1], prepare=prepare), plain) > 0.01
    assert compare(pair, prepare=prepare) < CLOSE


def test_rope_options(pair):
    def stretch(model):
        model.set_model_rope_options(
            scale_x=1.2, shift_x=3.0, scale_y=0.8, shift_y=1.0, scale_t=1.0, shift_t=2.0
        )
        return model

    # 0.3.75 forgets the options for references, so without them.
    assert compare(pair, references=0, prepare=stretch) < CLOSE


def test_replaced_blocks(pair):
    def louder(args, extra):
        return {k: v * 1.01 for k, v in extra["original_block"](args).items()}

    def replace(model):
        model.set_model_patch_replace(louder, "dit", "double_block", 1)
        model.set_model_patch_replace(louder, "dit", "single_block", 1)
        return model

    assert toy.difference(toy.sampled(pair[1], prepare=replace), toy.sampled(pair[1])) > 1e-3
    assert compare(pair, prepare=replace) < CLOSE


def test_post_input_patch(pair):
    """A patch may move positions: the host's own reads the ids afterwards, and so do we."""

    def shift(inputs):
        inputs["img_ids"] = inputs["img_ids"] + 2
        inputs["img"] = inputs["img"] * 1.1
        return inputs

    def patch(model):
        model.set_model_post_input_patch(shift)
        return model

    assert toy.difference(toy.sampled(pair[1], prepare=patch), toy.sampled(pair[1])) > 1e-3
    assert compare(pair, prepare=patch) < CLOSE


def test_attention_override(pair):
    """The user's choice of attention reaches our blocks."""
    seen = []

    def override(attention, *args, **kw):
        seen.append(kw.get("transformer_options", {}).get("block_type"))
        return attention(*args, **kw)

    def choose(model):
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    assert compare(pair, prepare=choose) < CLOSE
    assert "double" in seen and "single" in seen


def test_attention_patches_see_what_the_hosts_own_gives(host):
    """Shapes, layout and options of attn1_patch and attn1_output_patch, on every host."""
    model = toy.ours(toy.KLEIN, toy.transformer(toy.KLEIN))
    seen = []

    def before(q, k, v, pe, attn_mask, extra_options):
        options = {key: extra_options[key] for key in ("block_type", "block_index", "img_slice")}
        seen.append((q.shape, k.shape, v.shape, pe.shape, options))
        return {}

    def after(out, extra_options):
        seen.append(out.shape)
        return out * 1.5

    def patch(m):
        m.model_options["transformer_options"]["patches"] = {
            "attn1_patch": [before],
            "attn1_output_patch": [after],
        }
        return m

    out = toy.sampled(model, cfg=1.0, steps=1, prepare=patch)
    assert toy.difference(out, toy.sampled(model, cfg=1.0, steps=1)) > 1e-3
    length = 512 + 64 + 48 + 32
    shape = (1, 2, length, 128)
    options = {"block_type": "double", "block_index": 0, "img_slice": [512, length]}
    assert seen[0] == (shape, shape, shape, (1, 1, length, 64, 2, 2), options)
    assert seen[1] == (1, length, 256)
    assert len(seen) == 2 * (toy.KLEIN.double_blocks + toy.KLEIN.single_blocks)


def test_control(pair):
    """What a control network adds lands where the host's own puts it."""
    net, theirs = (m.model.diffusion_model for m in (pair[1], pair[0]))
    x, context = torch.randn(1, 128, 4, 4), torch.randn(1, 9, 384)
    adds = {"input": [torch.randn(1, 16, 256)], "output": [None] * (net.config.single_blocks - 1)}
    adds["output"].append(torch.randn(1, 16, 256))
    options = {"guidance": torch.tensor([4.0]), "control": adds, "transformer_options": {}}
    with torch.inference_mode():
        a, b = (m(x, torch.tensor([0.5]), context, **copy.deepcopy(options)) for m in (net, theirs))
    assert toy.difference(a, b) < CLOSE  # observed 1.2e-6


def test_lora_by_the_hosts_loader(host, pair):
    from safetensors.torch import save_file

    state = pair[1].model.diffusion_model.state_dict()
    save_file(toy.lora(state), host.models("loras") / "toy.safetensors")

    def load(model):
        return host.call(
            "LoraLoaderModelOnly", model=model, lora_name="toy.safetensors", strength_model=1.0
        )[0]

    assert toy.difference(toy.sampled(pair[1], prepare=load), toy.sampled(pair[1])) > 0.01
    assert compare(pair, prepare=load) < CLOSE
    # Unloaded again: the weights are as they were.
    assert compare(pair) < CLOSE


def test_merge_and_save(host):
    """State dict keys are attributes (merging looks them up); saved files have BFL's names."""
    import comfy.utils

    config, state = toy.KLEIN, toy.transformer(toy.KLEIN)
    model, other = toy.ours(config, state), toy.ours(config, toy.transformer(config, 9))
    for key in model.model.state_dict():
        comfy.utils.get_attr(model.model, key)
    (merged,) = host.call("ModelMergeSimple", model1=model, model2=other, ratio=0.5)
    key = "diffusion_model.double_blocks.0.img_attn.norm.query_norm.weight"
    assert key in merged.patches
    assert toy.difference(toy.sampled(merged), toy.sampled(model)) > 0.01

    saved = model.model.state_dict_for_saving(*_unet(model))
    assert {k.removeprefix("model.diffusion_model.") for k in saved} == set(state)


def _unet(model) -> list:
    """Newer hosts pass the transformer's weights in, 0.3.75 takes them from the model."""
    import inspect

    names = inspect.signature(model.model.state_dict_for_saving).parameters
    return [model.model.diffusion_model.state_dict()] if "unet_state_dict" in names else []


def test_kv_form_is_isolated_in_the_host(host):
    """The host form of the KV transformer equals the core's."""
    import dataclasses

    from flux2_pack.flux2_core.transformer import Flux2Transformer

    config = dataclasses.replace(toy.KLEIN, kv_references=True)
    state = toy.transformer(config)
    core = Flux2Transformer(config)
    core.load_state_dict(state)
    net = toy.ours(config, state).model.diffusion_model
    x, refs = torch.randn(2, 128, 4, 6), toy.latents(4, (4, 4), (3, 5))
    t, context = torch.tensor([0.7, 0.3]), torch.randn(2, 512, 384)
    with torch.inference_mode():
        want = core(x, t, context, None, refs)
        got = net(x, t, context, ref_latents=refs, transformer_options={})
        plain = toy.ours(toy.KLEIN, state).model.diffusion_model(
            x, t, context, ref_latents=refs, transformer_options={}
        )
    assert toy.difference(got, want) < 1e-5  # observed 1.1e-6
    assert toy.difference(plain, want) > 1e-2


def test_kv_cache_node_is_exact_on_the_kv_form(host):
    """Isolated references depend on neither noise nor time: their cached keys change nothing."""
    import dataclasses

    node = needs("FluxKVCache")
    config = dataclasses.replace(toy.KLEIN, kv_references=True)
    model = toy.ours(config, toy.transformer(config))
    cached = toy.sampled(model, cfg=1.0, prepare=lambda m: node.execute(m).args[0])
    assert toy.difference(cached, toy.sampled(model, cfg=1.0)) < CLOSE  # observed 0


def test_nano_text_is_padded_to_32_rows(host):
    """A short text of another node is padded on the left, to this model's length and no more."""
    nano = configs.VARIANTS["nano"]
    model = toy.ours(nano.transformer, toy.transformer(nano.transformer), nano).model
    noise = torch.zeros(1, 128, 8, 8)
    text = torch.ones(1, 20, 384)
    out = model.extra_conds(cross_attn=text, noise=noise, device="cpu")["c_crossattn"].cond
    assert out.shape == (1, 32, 384) and out[:, :12].abs().max() == 0 and out[:, 12:].min() == 1


def test_memory_estimate_grows_with_the_width(host):
    small, large = (
        toy.ours(c, toy.transformer(c)).model.memory_required([1, 128, 64, 64])
        for c in (toy.KLEIN, configs.TransformerConfig(512, 384, 1, 1, guidance_embed=False))
    )
    assert large == pytest.approx(2 * small)


def test_lazy_weights(host):
    """Newer hosts leave a layer without its weight until the file's arrives, and assign it then.
    Rehearsed on the CPU: nothing of ours may touch a weight before."""
    memory = pytest.importorskip("comfy.memory_management", reason="needs ComfyUI 0.16 or newer")
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no lazy weights")
    from flux2_pack.nodes import host_objects
    from flux2_pack.nodes.host_model import Config, Model

    state = toy.transformer(toy.KLEIN)
    described = Config(toy.KLEIN)
    described.set_inference_dtype(torch.float32, None)
    memory.aimdo_enabled = True
    try:
        model = Model(toy.KLEIN, described, None)
        assert model.diffusion_model.img_in.weight is None
        model.load_model_weights(dict(state), "", assign=True)
    finally:
        memory.aimdo_enabled = False
    weight = model.diffusion_model.img_in.weight
    assert weight.data_ptr() == state["img_in.weight"].data_ptr()
    cpu = torch.device("cpu")
    patcher = host_objects.patch(model, load_device=cpu, offload_device=cpu, reload=(None, ()))
    assert toy.difference(toy.sampled(patcher), toy.sampled(toy.ours(toy.KLEIN, state))) == 0


def test_reload_factory(host):
    """Newer hosts make the same MODEL anew for hooks, compilation and second devices."""
    toy.write_models(host.models)
    (model,) = host.call("Flux2KitModelLoader", model="toy-klein.safetensors")
    if not hasattr(model, "cached_patcher_init"):
        pytest.skip("this ComfyUI does not reload")
    make, values = model.cached_patcher_init[:2]
    again = make(*values, disable_dynamic=True)
    assert again.model is not model.model and again.model.variant == model.model.variant
    assert toy.difference(toy.sampled(again), toy.sampled(model)) == 0
