"""Quantised files: how formats are declared, in which layouts, and what a network makes of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core import lora
from flux2_pack.flux2_core.checkpoint import load_transformer, read_state_dict
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import CHUNK, Packed, encode
from flux2_pack.flux2_core.keymaps import TRANSFORMER, to_diffusers
from flux2_pack.flux2_core.quantised import QuantLinear, quantize
from flux2_pack.tests.core.toys import KLEIN, error, inputs, toy

FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4", "mxfp8")
BLOCKS = (
    ".qkv.weight",
    ".proj.weight",
    "mlp.0.weight",
    "mlp.2.weight",
    "linear1.weight",
    "linear2.weight",
)


@pytest.fixture(scope="module")
def plain():
    return {name: tensor.bfloat16() for name, tensor in toy(KLEIN).state_dict().items()}


def quantised(plain, form, but=()):
    """-> the file's tensors, and what each quantised weight stands for."""
    state, packed = {}, {}
    for name, tensor in plain.items():
        if name.endswith(BLOCKS) and not name.endswith(tuple(but)):
            packed[name] = encode(tensor, form)
            layer = name.removesuffix("weight")
            state |= {layer + part: value for part, value in packed[name].parts.items()}
        else:
            state[name] = tensor
    return state, packed


def save(folder, state, **metadata):
    path = folder / "model.safetensors"
    state = {k: v.contiguous() for k, v in state.items()}
    save_file(state, path, metadata or None)
    return path


def note(form, **more):
    """A comfy_quant tensor."""
    return torch.tensor(list(json.dumps({"format": form} | more).encode()), dtype=torch.uint8)


def decoded(model, packed):
    return {
        name: model.get_submodule(name.removesuffix(".weight")).packed.decode() for name in packed
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("form", FORMATS)
def test_formats_without_a_word_in_the_file(tmp_path, plain, form):
    state, packed = quantised(plain, form)
    model = load_transformer(save(tmp_path, state))
    assert same(decoded(model, packed), {name: p.decode() for name, p in packed.items()})
    assert {type(m) for m in model.modules() if "Linear" in type(m).__name__} == {
        torch.nn.Linear,
        QuantLinear,
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_note_beside_each_layer(tmp_path, plain, form):
    state, packed = quantised(plain, form)
    state |= {name.removesuffix("weight") + "comfy_quant": note(form) for name in packed}
    model = load_transformer(save(tmp_path, state))
    assert same(decoded(model, packed), {name: p.decode() for name, p in packed.items()})


@pytest.mark.parametrize("table", [True, False])
def test_the_headers_word(tmp_path, plain, table):
    """Layer names with the prefix; formats in a table or alone; double blocks' attention left whole."""
    state, packed = quantised(plain, "float8_e4m3fn", but=("attn.qkv.weight", "attn.proj.weight"))
    prefix = "model.diffusion_model."
    layers = {
        prefix + n.removesuffix(".weight"): {"format": "float8_e4m3fn"}
        if table
        else "float8_e4m3fn"
        for n in packed
    }
    said = json.dumps({"format_version": "1.0", "layers": layers})
    path = save(tmp_path, {prefix + k: v for k, v in state.items()}, _quantization_metadata=said)
    model = load_transformer(path)
    assert same(decoded(model, packed), {name: p.decode() for name, p in packed.items()})
    assert isinstance(model.double_blocks[0].img_attn.qkv, torch.nn.Linear)


def test_the_older_marker(tmp_path, plain):
    state, packed = quantised(plain, "float8_e4m3fn")
    renamed = {k.replace("weight_scale", "scale_weight"): v for k, v in state.items()}
    renamed |= {n.removesuffix("weight") + "scale_input": torch.ones(()) for n in packed}
    renamed["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    model = load_transformer(save(tmp_path, renamed))
    assert same(decoded(model, packed), {name: p.decode() for name, p in packed.items()})


def test_a_static_input_scale_is_kept_beside(tmp_path, plain):
    state, packed = quantised(plain, "float8_e4m3fn")
    state |= {n.removesuffix("weight") + "input_scale": torch.tensor(0.25) for n in packed}
    model = load_transformer(save(tmp_path, state))
    assert model.single_blocks[0].linear1.packed.parts["input_scale"] == 0.25
    assert same(decoded(model, packed), {name: p.decode() for name, p in packed.items()})


def test_a_straight_cast_to_fp8(tmp_path, plain):
    """No scales anywhere, norms and all: as if every weight were multiplied by one."""
    codes = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in plain.items()}
    model = load_transformer(save(tmp_path, codes))
    assert torch.equal(model.img_in.packed.decode(), codes["img_in.weight"].float())
    norm = model.double_blocks[0].img_attn.norm.query_norm.weight
    key = "double_blocks.0.img_attn.norm.query_norm.scale"
    assert torch.equal(norm, codes[key].bfloat16())
    whole = save(tmp_path, {k: v.bfloat16() for k, v in codes.items()})
    model.float()
    assert error(model(**inputs(1)), load_transformer(whole, dtype=torch.float32)(**inputs(1))) == 0


@pytest.mark.parametrize("form", FORMATS)
def test_split_layers_in_diffusers_layout(tmp_path, plain, form):
    """q, k and v have scales of their own and become one layer."""
    state, wanted = {}, {}
    for name, tensor in to_diffusers(plain, TRANSFORMER).items():
        if "transformer_blocks" in name and "norm" not in name:
            packed = encode(tensor, form)
            layer = name.removesuffix("weight")
            state |= {layer + part: value for part, value in packed.parts.items()}
            wanted[name] = packed.decode()
        else:
            state[name] = tensor
    model = load_transformer(save(tmp_path, state))
    thirds = [wanted[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]
    assert torch.equal(model.double_blocks[0].img_attn.qkv.packed.decode(), torch.cat(thirds))


@pytest.mark.parametrize("form", FORMATS)
def test_a_forward_is_that_of_the_decoded_weights(tmp_path, plain, form):
    state, packed = quantised(plain, form)
    model = load_transformer(save(tmp_path, state))
    whole = plain | {name: p.decode(torch.bfloat16) for name, p in packed.items()}
    other = load_transformer(save(tmp_path, whole))
    i = {k: v.bfloat16() if k in ("x", "context") else v for k, v in inputs(2).items()}
    i["references"] = [r.bfloat16() for r in i["references"]]
    if form != "float8_e4m3fn":
        assert torch.equal(model(**i), other(**i))
        return
    # codes are multiplied as they are and scaled after: nearer to float32 than rounded weights are
    exact = plain | {name: p.decode() for name, p in packed.items()}
    exact = load_transformer(save(tmp_path, exact), dtype=torch.float32)(**inputs(2))
    ours, theirs = (error(m(**i).float(), exact) for m in (model, other))
    assert ours < 1.2 * theirs  # seen 0.9 times it


def test_a_cast_does_not_reach_codes_and_scales(tmp_path, plain):
    state, packed = quantised(plain, "mxfp8")
    model = load_transformer(save(tmp_path, state)).to(torch.float32)
    assert same(decoded(model, packed), {name: p.decode() for name, p in packed.items()})
    assert model.img_in.weight.dtype == torch.float32


@pytest.mark.parametrize("form", (*FORMATS, "gguf Q8_0"))
def test_decoding_some_rows_at_a_time_changes_nothing(form):
    g = torch.Generator().manual_seed(0)
    high = CHUNK + 200
    if form.startswith("gguf"):
        rows = torch.randint(0, 100, (high, 68), generator=g).to(torch.uint8)
        packed = Packed(form, (high, 64), {"weight": rows})
    else:
        packed = encode(torch.randn(high, 64, generator=g), form)
    parts = [packed.rows(start, min(start + 128, high)).decode() for start in range(0, high, 128)]
    assert torch.equal(torch.cat(parts), packed.decode())
    assert torch.equal(packed.decode(torch.bfloat16), packed.decode().bfloat16())


BROKEN = {
    "a scale too many": ({"single_blocks.0.linear1.weight_scale": torch.ones(5)}, "5 scales"),
    "no second scale": (
        {"single_blocks.0.linear1.weight_scale_2": None},
        "does not fit together|not read",
    ),
    "an unknown format": ({"single_blocks.0.linear1.comfy_quant": note("fp3")}, "fp3"),
    "a note that is no JSON": (
        {"single_blocks.0.linear1.comfy_quant": torch.tensor([123, 1], dtype=torch.uint8)},
        "describes a quantised layer wrongly",
    ),
    "rotated": (
        {"single_blocks.0.linear1.comfy_quant": note("int8_tensorwise", convrot=True)},
        "rotated INT8 weights, which are not read yet",
    ),
    "bitsandbytes": ({"single_blocks.0.linear1.weight.quant_map": torch.ones(16)}, "bitsandbytes"),
    "blocks of 128": ({"single_blocks.0.linear1.weight_scale_inv": torch.ones(2, 2)}, "128 x 128"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path, plain, name):
    change, words = BROKEN[name]
    state, _ = quantised(plain, "nvfp4")
    state = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(Flux2Error, match=words):
        read_state_dict(save(tmp_path, state), "transformer")


def test_a_broken_word_in_the_header_is_refused(tmp_path, plain):
    path = save(tmp_path, plain, _quantization_metadata='{"layers": {"a": {}}}')
    with pytest.raises(Flux2Error, match="describes its quantised layers wrongly"):
        read_state_dict(path, "transformer")


def test_weights_stay_as_small_as_the_file(tmp_path, plain):
    state, packed = quantised(plain, "nvfp4")
    model = load_transformer(save(tmp_path, state))
    held = sum(model.get_submodule(n.removesuffix(".weight")).packed.bytes for n in packed)
    assert held < 0.6 * sum(plain[n].numel() for n in packed)


def write_gguf(folder, plain, kind, encode_as=None):
    """As the community's files: BFL names, blocks quantised, norms float32, the rest bf16."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "flux")
    wanted = {}
    for name, tensor in plain.items():
        form = kind if name.endswith(BLOCKS) else "F32" if tensor.ndim == 1 else "BF16"
        form = gguf.GGMLQuantizationType[form]
        codes = gguf.quants.quantize(tensor.float().numpy(), form)
        wanted[name] = torch.from_numpy(gguf.quants.dequantize(codes, form))
        writer.add_tensor(name, codes, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf", wanted


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "BF16", "F32"])
def test_gguf_files(tmp_path, plain, kind):
    path, wanted = write_gguf(tmp_path, plain, kind)
    model = load_transformer(path, dtype=torch.bfloat16)
    assert model.config == KLEIN
    other = load_transformer(save(tmp_path, {k: v.bfloat16() for k, v in wanted.items()}))
    for name in (n for n in wanted if n.endswith(BLOCKS)):
        layer = model.get_submodule(name.removesuffix(".weight"))
        got = layer.packed.decode() if isinstance(layer, QuantLinear) else layer.weight.float()
        exact = wanted[name] if isinstance(layer, QuantLinear) else wanted[name].bfloat16().float()
        assert torch.equal(got, exact)
    i = {k: v.bfloat16() if k in ("x", "context") else v for k, v in inputs(1).items()}
    assert torch.equal(model(**i), other(**i))


def test_a_lora_beside_gguf_weights(tmp_path, plain):
    """The codes stay; the result is that of the decoded weights with the change added."""
    path, wanted = write_gguf(tmp_path, plain, "Q8_0")
    model = load_transformer(path, dtype=torch.float32)
    other = load_transformer(
        save(tmp_path, {k: v.float() for k, v in wanted.items()}), dtype=torch.float32
    )
    layer, g = "single_blocks.1.linear1", torch.Generator().manual_seed(2)
    rows, columns = other.get_submodule(layer).weight.shape
    a, b = torch.randn(4, columns, generator=g) * 0.1, torch.randn(rows, 4, generator=g) * 0.1
    file = tmp_path / "some_lora.safetensors"
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, file)
    before, stock = model.get_submodule(layer).weight.clone(), model(**inputs(1))
    lora.apply(model, file)
    other.get_submodule(layer).weight.add_(b @ a)
    assert error(model(**inputs(1)), other(**inputs(1))) < 1e-4  # seen 1.4e-6
    assert error(model(**inputs(1)), stock) > 1e-2
    assert torch.equal(model.get_submodule(layer).weight, before)


def test_a_gguf_of_another_kind_is_refused(tmp_path, plain):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    codes = torch.zeros(4, 84, dtype=torch.uint8).numpy()
    writer.add_tensor("img_in.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Flux2Error, match="Q2_K"):
        load_transformer(tmp_path / "a.gguf")


def test_damaged_gguf_files_are_refused(tmp_path, plain):
    """Cut off, or with any byte of the beginning changed: a sentence, or the same weights."""
    small = {k: v for k, v in plain.items() if k.startswith(("img_in", "txt_in"))}
    path, _ = write_gguf(tmp_path, small, "Q8_0")
    whole = path.read_bytes()
    for size in (0, 3, 20, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(Flux2Error):
            load_transformer(path)
    for at in range(0, 200, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(Flux2Error):
            load_transformer(path)


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4", "mxfp8"])
def test_quantize_takes_the_block_linears_and_nothing_else(plain, name):
    model = toy(KLEIN).bfloat16()
    assert quantize(model, name) is model
    packed = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert packed == {n.removesuffix(".weight") for n in plain if n.endswith(BLOCKS)}
    wanted = encode(plain["single_blocks.0.linear1.weight"], model.single_blocks[0].linear1.format)
    assert torch.equal(model.single_blocks[0].linear1.packed.decode(), wanted.decode())


def test_quantize_refuses_what_is_only_read():
    with pytest.raises(Flux2Error, match="not written here"):
        quantize(toy(KLEIN), "gguf Q8_0")
