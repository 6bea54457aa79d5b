"""In which precision layers are stored and computed, the fused passes, and the guard."""

import copy
import logging

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.checkpoint import load_transformer
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kernels.reference import fp8_linear
from flux2_pack.flux2_core.precision import (
    FP8,
    PRECISIONS,
    WEIGHTS,
    choices,
    guarded,
    store,
    without_codes,
)
from flux2_pack.flux2_core.quantised import QuantLinear, quantize
from flux2_pack.flux2_core.stream import Controls
from flux2_pack.tests.core.toys import DEV, KLEIN, decibels, error, inputs, toy

BLOCKS = [
    f"double_blocks.{i}.{part}"
    for i in range(2)
    for s in ("img", "txt")
    for part in (f"{s}_attn.qkv", f"{s}_attn.proj", f"{s}_mlp.0", f"{s}_mlp.2")
] + [f"single_blocks.{i}.linear{k}" for i in range(3) for k in (1, 2)]


NUMBERS = ("modulate", "gated_modulate", "gated_add", "swiglu")  # passes that give no codes


@pytest.fixture(params=["reference"])
def codes(request):
    """Products in fp8 on any device, by name."""
    with kernels.use(request.param):
        yield


@pytest.fixture
def fp8_model():
    return quantize(toy(KLEIN), "fp8")


# --------------------------------------------------------------------------------- lists of layers


def test_a_list_of_layers():
    names = [*BLOCKS, "img_in", "final_layer.linear"]
    assert choices(names) == dict.fromkeys(BLOCKS, "auto")
    found = choices(
        names,
        "fp8",
        "double_blocks.0.*: bf16  # the first\n\nsingle_blocks.*.linear2: fp8 weights only\n"
        "double_blocks.0.img_mlp.0: auto",
    )
    assert found["double_blocks.0.txt_attn.qkv"] == "bf16"
    assert found["double_blocks.0.img_mlp.0"] == "auto"
    assert found["double_blocks.1.img_mlp.0"] == "fp8"
    assert found["single_blocks.2.linear2"] == WEIGHTS
    assert "img_in" not in found


@pytest.mark.parametrize(
    ("precision", "lines", "words"),
    [
        ("fp9", "", "no such precision"),
        ("fp8", "single_blocks.7.*: bf16", "fits no layer"),
        ("fp8", "single_blocks.0.linear1", "no line of a list"),
        ("fp8", "single_blocks.0.linear1: int3", "no such precision"),
    ],
)
def test_a_wrong_list_is_a_sentence(precision, lines, words):
    with pytest.raises(Flux2Error, match=words):
        choices(BLOCKS, precision, lines)


# ------------------------------------------------------------------------------ stored and computed


@pytest.mark.parametrize("stored", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_in_every_precision(tmp_path, stored, precision):
    model = toy(KLEIN).bfloat16()
    if stored != "bf16":
        quantize(model, stored)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.contiguous()
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    kept = "single_blocks.0.linear1"
    loaded = load_transformer(path, precision=precision, layers=f"{kept}: bf16")
    formats = {n: m.format for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert kept not in formats
    name = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}.get(stored)
    wanted = {"auto": name, "bf16": None, FP8: "float8_e4m3fn", WEIGHTS: "float8_e4m3fn"}[precision]
    assert set(formats.values()) == ({wanted} if wanted else set())
    for layer in loaded.modules():
        if isinstance(layer, QuantLinear):
            assert layer.compute == ("weights" if precision == WEIGHTS else "fp8")
    if stored == "fp8" and precision != "bf16":  # codes of a file are never quantised again
        packed = loaded.get_submodule("single_blocks.1.linear1").packed.parts["weight"]
        assert torch.equal(
            packed.view(torch.uint8), state["single_blocks.1.linear1.weight"].view(torch.uint8)
        )


def test_nothing_is_stored_otherwise_on_auto():
    state = toy(KLEIN).state_dict()
    same = store(state, choices([n.removesuffix(".weight") for n in state]))
    assert all(same[name] is state[name] for name in state)


# ------------------------------------------------------------------------------- the fused passes


def unfused(model):
    """Hooks on every layer: activations arrive as numbers and are quantised alone."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_hook(lambda *_: None)
    return model


@pytest.fixture
def passes(monkeypatch):
    """Names of the fused passes, as they are called."""
    called = []
    for name in (
        "modulate_quantize",
        "gated_modulate_quantize",
        "swiglu_quantize",
        "qk_norm_rope",
        "modulate_quantize_blocks",
        "swiglu_quantize_blocks",
        "quantize_rows",
        *NUMBERS,
    ):
        op = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, op=op, name=name: called.append(name) or op(*args)
        )
    return called


def test_stock_layers_take_the_stock_way(passes):
    """Passes between numbers are made in one where something serves that: the same numbers, and
    the stock ones bit for bit where it is switched off."""
    model = toy(KLEIN)
    stock = model(**inputs(2))
    assert not passes
    with kernels.use("reference"):
        named = model(**inputs(2))
    counts = {"qk_norm_rope": 5, "modulate": 7, "gated_modulate": 4, "gated_add": 7, "swiglu": 7}
    assert {name: passes.count(name) for name in set(passes)} == counts
    assert error(named, stock) < 1e-5  # seen 3e-6
    passes.clear()
    with kernels.use("off"):
        assert torch.equal(model(**inputs(2)), stock)
    assert not passes


def test_passes_between_numbers_leave_gradients_alone(passes):
    model, found = toy(KLEIN), []
    for wish in ("off", "reference"):
        given = inputs(1)
        given["x"].requires_grad_()
        with kernels.use(wish):
            model(**given).square().sum().backward()
        found.append(given["x"].grad)
    assert "modulate" in passes  # of the text, at first
    assert error(found[1], found[0]) < 1e-4  # seen 2e-6


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "int8"])
@pytest.mark.parametrize("asked", ["x", "modulation"])
@pytest.mark.parametrize("wish", ["auto", "reference"])
def test_codes_leave_gradients_alone(form, asked, wish):
    """Whoever wants them gets those of the decoded weights: rounding to codes has none."""
    quantised, found = quantize(toy(KLEIN).bfloat16(), form), []
    decoded = copy.deepcopy(quantised)
    for name, layer in list(decoded.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = torch.nn.Linear(*layer.shape[::-1], bias=False).requires_grad_(False)
            plain.weight.copy_(layer.packed.decode())
            decoded.set_submodule(name, plain.bfloat16())
    for model in (decoded, quantised):
        given = inputs(1) | {"x": inputs(1)["x"].bfloat16()}
        modulation = model.double_stream_modulation_img.lin.weight
        leaf = modulation if asked == "modulation" else given["x"]
        with kernels.use(wish):
            leaf.requires_grad_()
            model(**given).float().square().sum().backward()
        found.append(leaf.grad.float())
    assert found[0].norm() > 0
    assert decibels(found[1], found[0]) > 25


def test_norms_that_somebody_watches_are_called(passes):
    """A hook, as a host's patch: the norm's own forward is what counts."""
    model = toy(KLEIN)
    model.single_blocks[0].norm.query_norm.register_forward_hook(lambda *_: None)
    with kernels.use("reference"):
        model(**inputs(2))
    assert passes.count("qk_norm_rope") == 4


def test_on_the_cpu_weights_alone_are_fp8(fp8_model):
    """Nothing multiplies fp8 faster there: the result is that of the decoded weights."""
    plain = toy(KLEIN)
    for name, layer in fp8_model.named_modules():
        if isinstance(layer, QuantLinear):
            plain.get_submodule(name).weight.copy_(layer.packed.decode())
    assert error(fp8_model(**inputs(1)), plain(**inputs(1))) < 1e-5  # seen 0


@pytest.mark.parametrize("config", [DEV, KLEIN])
def test_fused_passes_mean_what_the_layers_mean(codes, passes, config):
    """Both quantise the same activations: only what float32 rounds differently flips a code."""
    given = inputs(2, batch=2, guidance=3.0 if config is DEV else None)
    fused = quantize(toy(config), "fp8")(**given)
    # two streams in each of two double blocks, three single blocks
    assert {n: passes.count(n) for n in passes} == {
        "modulate_quantize": 4 + 3,
        "gated_modulate_quantize": 4,
        "swiglu_quantize": 4 + 3,
        "qk_norm_rope": 2 + 3,
        "gated_add": 4 + 3,
        "quantize_rows": 4,  # what comes out of attention, in double blocks
    }
    passes.clear()
    alone = unfused(quantize(toy(config), "fp8"))(**given)
    assert set(passes) == {"qk_norm_rope", "quantize_rows", *NUMBERS}
    assert decibels(fused, alone) > 60  # seen 76 and 131
    assert decibels(fused, toy(config)(**given)) > 25  # seen 29.8 and 34.4


@pytest.mark.parametrize(("form", "least"), [("mxfp8", 30), ("nvfp4", 20)])
def test_formats_with_blocks_are_fused_too(codes, passes, form, least):
    """What Blackwell multiplies; there is no gated form of these, the sum is a pass of its own."""
    given = inputs(2)
    fused = quantize(toy(KLEIN), form)(**given)
    assert passes.count("modulate_quantize_blocks") == 4 + 4 + 3
    assert passes.count("swiglu_quantize_blocks") == 4 + 3
    alone = unfused(quantize(toy(KLEIN), form))(**given)
    assert decibels(fused, alone) > 60  # seen inf and 137
    assert decibels(fused, toy(KLEIN)(**given)) > least  # seen 35.5 and 24.8


def test_int8_products_take_numbers(codes):
    """The library rounds activations itself: only the definition serves here."""
    given = inputs(2)
    with kernels.use("auto"):
        decoded = quantize(toy(KLEIN), "int8")(**given)
    assert error(quantize(toy(KLEIN), "int8")(**given), decoded) < 1e-4  # seen 1.3e-6


def test_references_at_time_zero_go_the_plain_way(codes, passes):
    """Rows with a modulation of their own (the KV form) are quantised alone."""
    given = inputs(2) | {"controls": Controls(kv_references=True)}
    fused = quantize(toy(KLEIN), "fp8")(**given)
    assert passes.count("gated_modulate_quantize") == 2  # of the text
    alone = unfused(quantize(toy(KLEIN), "fp8"))(**given)
    assert decibels(fused, alone) > 60  # seen 164


def test_fp8_weights_only_never_quantises_activations(codes, passes, fp8_model):
    with without_codes(fp8_model):
        fp8_model(**inputs(1))
    assert passes and not [name for name in passes if "quantize" in name]
    assert all(m.compute == "fp8" for m in fp8_model.modules() if isinstance(m, QuantLinear))


def test_blocks_compile_to_one_graph_each(codes, fp8_model):
    """The operations stay opaque to the compiler: no break, the same picture."""
    given = inputs(1)
    with torch.inference_mode():
        wanted = fp8_model(**given)
        for block in (*fp8_model.double_blocks, *fp8_model.single_blocks):
            block.compile(backend="aot_eager", fullgraph=True)
        assert error(fp8_model(**given), wanted) < 1e-4  # seen 0


# ------------------------------------------------------------------------------------------ the guard


@pytest.fixture
def overflowing(monkeypatch, fp8_model):
    """A product that overflows in one layer."""
    wide = fp8_model.single_blocks[1].linear2
    bad = wide.packed.parts["weight"].view(torch.uint8).clone()

    def broken(codes, scale, weight, weight_scale, dtype=torch.bfloat16):
        out = fp8_linear(codes, scale, weight, weight_scale, dtype)
        same = weight.shape == bad.shape and torch.equal(weight.view(torch.uint8), bad)
        return out * torch.inf if same else out

    from flux2_pack.flux2_core.kernels import table

    op = table.OPS["fp8_linear"]
    monkeypatch.setattr(op, "candidates", list(op.candidates))
    kernels.register("fp8_linear", "broken", 1000, broken)
    yield fp8_model
    op.chosen.clear()


def test_a_step_that_overflows_is_repeated_and_said(overflowing, caplog):
    model, given = overflowing, inputs(1)
    with without_codes(model):
        wanted = model(**given)
    assert not torch.isfinite(model(**given)).all()
    with caplog.at_level(logging.WARNING):
        out = guarded(model, lambda: model(**given))
    assert torch.equal(out, wanted)
    assert "single_blocks.1.linear2" in caplog.text
    assert "repeated in float32" in caplog.text


def test_the_guard_leaves_other_overflows_to_others(fp8_model, caplog):
    given = inputs(1)
    given["x"][0, 0, 0, 0] = torch.nan
    out = guarded(fp8_model, lambda: fp8_model(**given))
    assert not torch.isfinite(out).all()
    assert not caplog.text
