"""One change in every dialect: the same latents as the weights with the change added in float64."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core import lora
from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.keymaps import TRANSFORMER, to_diffusers
from flux2_pack.flux2_core.quantised import QuantLinear, quantize
from flux2_pack.tests.core.toys import KLEIN, error, inputs, toy

RANK, ALPHA, H = 4, 2.0, 256
CLOSE = 1e-4  # seen at most 2.0e-6
LAYERS = (
    "double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.proj", "double_blocks.0.img_mlp.0",
    "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1", "single_blocks.2.linear2", "img_in",
    "time_in.in_layer", "double_stream_modulation_img.lin", "final_layer.adaLN_modulation.1",
)  # fmt: skip
SHAPES = lora.linears(toy(KLEIN))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


FACTORS = {
    name: (random(RANK, SHAPES[name][1], seed=i), random(SHAPES[name][0], RANK, seed=i + 50))
    for i, name in enumerate(LAYERS)
}


def merged(deltas, strength=1.0):
    """The model with W + strength * delta, added in float64."""
    model = toy(KLEIN)
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        layer.weight.copy_(layer.weight.double() + strength * delta.double())
    return model


def low_rank(alpha=ALPHA):
    return {n: b.double() @ a.double() * (alpha / RANK) for n, (a, b) in FACTORS.items()}


def save(folder, tensors):
    path = folder / "some_lora.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def bfl(a="lora_A.weight", b="lora_B.weight", prefix="", alpha=True, under=False):
    out = {}
    for name, (down, up) in FACTORS.items():
        name = name.replace(".", "_") if under else name
        out |= {f"{prefix}{name}.{a}": down, f"{prefix}{name}.{b}": up}
        if alpha:
            out[f"{prefix}{name}.alpha"] = torch.tensor(ALPHA)
    return out


def diffusers(prefix="transformer.", a="lora_A.weight", b="lora_B.weight", under=False):
    """Split q, k, v share A; the final modulation's halves are swapped in B."""
    out = {}
    for name, (down, up) in FACTORS.items():
        for theirs, rows in to_diffusers({f"{name}.weight": up}, TRANSFORMER).items():
            theirs = theirs.removesuffix(".weight")
            theirs = theirs.replace(".", "_") if under else theirs
            out |= {f"{prefix}{theirs}.{a}": down.clone(), f"{prefix}{theirs}.{b}": rows}
            out[f"{prefix}{theirs}.alpha"] = torch.tensor(ALPHA)
    return out


DIALECTS = {
    "ai-toolkit": bfl(prefix="diffusion_model."),
    "bare": bfl(),
    "all-in-one": bfl(prefix="model.diffusion_model."),
    "down and up": bfl("lora_down.weight", "lora_up.weight", "diffusion_model."),
    "an adapter's name": bfl("lora_A.default.weight", "lora_B.default.weight", "diffusion_model."),
    "PEFT": bfl(prefix="base_model.model."),
    "kohya": bfl("lora_down.weight", "lora_up.weight", "lora_unet_", under=True),
    "diffusers": diffusers(),
    "DiffSynth": diffusers(""),
    "older diffusers": diffusers("transformer.", "lora.down.weight", "lora.up.weight"),
    "linear layers": diffusers(
        "transformer.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
    ),
    "OneTrainer": diffusers("lora_transformer_", "lora_down.weight", "lora_up.weight", under=True),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(tmp_path, dialect):
    model = toy(KLEIN)
    applied = lora.apply(model, save(tmp_path, DIALECTS[dialect]))
    assert error(model(**inputs(2)), merged(low_rank())(**inputs(2))) < CLOSE
    assert applied.report.used == len(DIALECTS[dialect]) and not applied.report.skipped


def test_a_broken_export(tmp_path):
    """`transformer_blocks` cut in its middle."""
    whole = {k: v for k, v in diffusers("").items() if k.startswith("transformer_blocks")}
    cut = {k.removeprefix("tran"): v for k, v in whole.items()}
    model = toy(KLEIN)
    lora.apply(model, save(tmp_path, cut))
    deltas = {n: d for n, d in low_rank().items() if n.startswith("double_blocks")}
    assert error(model(**inputs(1)), merged(deltas)(**inputs(1))) < CLOSE


def test_peft_itself(tmp_path):
    """Saved by the package, from a model of ours that it wrapped."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
    wrapped = peft.get_peft_model(toy(KLEIN), config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                layer = next(n for n in LAYERS if n in name)
                p.copy_(FACTORS[layer]["lora_B" in name])
    wrapped.save_pretrained(tmp_path)
    model = toy(KLEIN)
    lora.apply(model, tmp_path / "adapter_model.safetensors")
    assert error(model(**inputs(1)), wrapped(**inputs(1))) < CLOSE
    assert error(model(**inputs(1)), merged(low_rank(RANK))(**inputs(1))) < CLOSE


def test_without_alpha_the_factor_is_one(tmp_path):
    model = toy(KLEIN)
    lora.apply(model, save(tmp_path, bfl(alpha=False)))
    assert error(model(**inputs(1)), merged(low_rank(RANK))(**inputs(1))) < CLOSE


def test_parts_of_fused_layers(tmp_path):
    """Split q, k, v and feed-forward of a single block, and its first three widths alone."""
    parts = {"attn.to_q": (0, 1), "attn.to_k": (1, 2), "attn.to_v": (2, 3), "proj_mlp": (3, 9)}
    tensors, delta = {}, torch.zeros(SHAPES["single_blocks.0.linear1"]).double()
    for i, (name, (start, stop)) in enumerate(parts.items()):
        a, b = random(RANK, H, seed=i), random((stop - start) * H, RANK, seed=i + 9)
        key = f"transformer.single_transformer_blocks.0.{name}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        delta[start * H : stop * H] += b.double() @ a.double()
    a, b = random(RANK, H, seed=20), random(3 * H, RANK, seed=21)
    tensors |= {
        "single_blocks.1.linear1_qkv.lora_A.weight": a,
        "single_blocks.1.linear1_qkv.lora_B.weight": b,
    }
    other = torch.zeros_like(delta)
    other[: 3 * H] = b.double() @ a.double()
    model = toy(KLEIN)
    lora.apply(model, save(tmp_path, tensors))
    wanted = merged({"single_blocks.0.linear1": delta, "single_blocks.1.linear1": other})
    assert error(model(**inputs(1)), wanted(**inputs(1))) < CLOSE


QKV = "double_blocks.0.img_attn.qkv"


def lokr(factorised):
    """w1 (3, 4), w2 (256, 64): whole, or w2 as a product."""
    w1, w2 = random(3, 4, seed=1), random(256, 64, seed=2)
    if not factorised:  # the sentinel that trainers write for "no alpha"
        return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9999220736.0)}, torch.kron(
            w1.double(), w2.double()
        )
    a, b = random(256, RANK, seed=3), random(RANK, 64, seed=4)
    delta = torch.kron(w1.double(), a.double() @ b.double()) * ALPHA / RANK
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}, delta


def loha():
    a, b, c, d = (random(*s, seed=i) for i, s in enumerate(((768, RANK), (RANK, 256)) * 2))
    parts = {
        "hada_w1_a": a,
        "hada_w1_b": b,
        "hada_w2_a": c,
        "hada_w2_b": d,
        "alpha": torch.tensor(ALPHA),
    }
    a, b, c, d = (x.double() for x in (a, b, c, d))
    return parts, (a @ b) * (c @ d) * ALPHA / RANK


def dora():
    a, b = FACTORS[QKV]
    weight = toy(KLEIN).get_submodule(QKV).weight.double()
    scale = 1 + random(768, 1, seed=7)
    changed = weight + b.double() @ a.double() * ALPHA / RANK
    delta = changed * scale.double() / changed.norm(dim=1, keepdim=True) - weight
    return {
        "lora_down.weight": a,
        "lora_up.weight": b,
        "dora_scale": scale,
        "alpha": torch.tensor(ALPHA),
    }, delta


def full():
    diff = random(768, 256, seed=8)
    return {"diff": diff}, diff.double()


KINDS = {
    "LoKr, whole": lokr(False),
    "LoKr, a product": lokr(True),
    "LoHa": loha(),
    "DoRA": dora(),
    "full": full(),
}


@pytest.mark.parametrize(
    "kind, prefix", list(itertools.product(KINDS, ("lycoris_", "diffusion_model.")))
)
def test_relatives(tmp_path, kind, prefix):
    parts, delta = KINDS[kind]
    name = QKV.replace(".", "_") if prefix == "lycoris_" else QKV
    model = toy(KLEIN)
    lora.apply(model, save(tmp_path, {f"{prefix}{name}.{k}": v for k, v in parts.items()}), 0.7)
    assert error(model(**inputs(1)), merged({QKV: delta}, 0.7)(**inputs(1))) < CLOSE


@pytest.mark.parametrize("form", ["fp8", "int8", "nvfp4", "mxfp8"])
def test_beside_quantised_weights(tmp_path, form):
    """Codes stay as they are; the result is that of the decoded weights with the change added."""
    model = quantize(toy(KLEIN), form)
    before = {
        n: m.packed.parts["weight"].clone()
        for n, m in model.named_modules()
        if isinstance(m, QuantLinear)
    }
    lora.apply(model, save(tmp_path, bfl()))
    wanted = toy(KLEIN)
    for name, layer in quantize(toy(KLEIN), form).named_modules():
        if isinstance(layer, QuantLinear):
            wanted.get_submodule(name).weight.copy_(layer.packed.decode())
    for name, delta in low_rank().items():
        weight = wanted.get_submodule(name).weight
        weight.copy_(weight.double() + delta)
    assert error(model(**inputs(2)), wanted(**inputs(2))) < CLOSE
    for name, codes in before.items():
        now = model.get_submodule(name).packed.parts["weight"]
        assert torch.equal(now.view(torch.uint8), codes.view(torch.uint8))


def test_several_change_strength_and_go_without_a_trace(tmp_path):
    model, i = toy(KLEIN), inputs(1)
    stock = model(**i)
    one = lora.apply(model, save(tmp_path, bfl()), 0.5)
    two = lora.apply(model, save(tmp_path, {f"{QKV}.diff": KINDS["full"][0]["diff"]}), 2.0)
    deltas = {n: 0.5 * d for n, d in low_rank().items()}
    deltas[QKV] = deltas[QKV] + 2 * KINDS["full"][1]
    assert error(model(**i), merged(deltas)(**i)) < CLOSE
    one.strength = two.strength = 0.0
    assert torch.equal(model(**i), stock)
    one.strength = -1.0
    assert error(model(**i), merged(low_rank(), -1.0)(**i)) < CLOSE
    one.remove()
    two.remove()
    assert torch.equal(model(**i), stock)


def test_the_report(tmp_path):
    tensors = bfl(prefix="lora_unet_", under=True, a="lora_down.weight", b="lora_up.weight")
    tensors |= {
        "lora_te1_text_model_encoder_layers_0.lora_down.weight": torch.ones(4, 4),
        "lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight": torch.ones(4, 256),
        "single_blocks.1.linear2.lora_A.weight": torch.ones(4, 1024),
        "img_in.diff_b": torch.ones(256),
        "something.else": torch.ones(1),
    }
    report = lora.apply(toy(KLEIN), save(tmp_path, tensors)).report
    assert (report.used, report.layers, len(report.skipped)) == (30, 10, 5)
    reasons = set(report.skipped.values())
    assert reasons == {
        "for a text encoder",
        "for a layer that this model does not have",
        "one half of a pair is missing",
        "a bias, which FLUX.2 does not have",
        "not a part of a LoRA that is known here",
    }
    model = toy(KLEIN)
    changes = sum(d.square().sum() for d in low_rank().values())
    weights = sum(model.get_submodule(n).weight.double().square().sum() for n in LAYERS)
    assert report.relative == pytest.approx(float((changes / weights) ** 0.5), rel=1e-4)
    assert "30 tensors change 10 layers" in str(report) and "Skipped 1, for a text encoder" in str(
        report
    )


@pytest.mark.parametrize(
    "width, name", [(3072, "klein 4B"), (4096, "klein 9B"), (6144, "FLUX.2 dev")]
)
def test_another_size_is_refused_by_name(tmp_path, width, name):
    tensors = {
        "diffusion_model.single_blocks.0.linear2.lora_A.weight": torch.ones(2, 4 * width),
        "diffusion_model.single_blocks.0.linear2.lora_B.weight": torch.ones(width, 2),
    }
    with pytest.raises(Flux2Error, match=f"was made for .*{name}"):
        lora.apply(toy(KLEIN), save(tmp_path, tensors))


@pytest.mark.parametrize(
    "key",
    ["lora_unet_down_blocks_0_attn.lora_down.weight", "lora_te_a.lora_up.weight", "img_in.weight"],
)
def test_another_family_is_refused(tmp_path, key):
    with pytest.raises(Flux2Error, match="changes nothing in this model"):
        lora.apply(toy(KLEIN), save(tmp_path, {key: torch.ones(4, 4)}))


def test_a_model_with_guidance(tmp_path):
    config = TransformerConfig(256, 96, 1, 1, guidance_embed=True)
    a, b = random(RANK, 256), random(256, RANK, seed=1)
    key = "transformer.time_guidance_embed.guidance_embedder.linear_2"
    model, i = toy(config), inputs(1, guidance=4.0)
    stock = model(**i)
    lora.apply(model, save(tmp_path, {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}))
    wanted = toy(config)
    wanted.guidance_in.out_layer.weight.add_(b @ a)
    assert error(model(**i), wanted(**i)) < CLOSE
    assert error(model(**i), stock) > 1e-2


def test_several_changes_of_one_layer_add_up(tmp_path):
    """Two adapters, two names of the layer and a full difference beside a product: none is lost."""
    (a, b), diff = FACTORS[QKV], random(768, 256, seed=8)
    kohya = "lora_unet_" + QKV.replace(".", "_")
    tensors = {f"{QKV}.diff": diff}
    for up, down in (
        (f"{QKV}.lora_B.one.weight", f"{QKV}.lora_A.one.weight"),
        (f"{QKV}.lora_B.two.weight", f"{QKV}.lora_A.two.weight"),
        (f"{kohya}.lora_up.weight", f"{kohya}.lora_down.weight"),
    ):
        tensors |= {up: b.clone(), down: a.clone()}
    model = toy(KLEIN)
    applied = lora.apply(model, save(tmp_path, tensors))
    wanted = merged({QKV: 3 * b.double() @ a.double() + diff.double()})
    assert error(model(**inputs(1)), wanted(**inputs(1))) < CLOSE
    assert (applied.report.used, applied.report.converted) == (7, 2)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_A.weight": (4, 256), "lora_B.weight": (768, 5)},
        {"lora_A.weight": (), "lora_B.weight": ()},
        {"lora_A.weight": (0, 256), "lora_B.weight": (768, 0), "alpha": ()},
        {"lora_A.weight": (4, 256), "lora_B.weight": (768, 4), "dora_scale": (5,)},
    ],
)
def test_tensors_that_do_not_fit_together(tmp_path, parts):
    tensors = {f"{QKV}.{part}": torch.ones(shape) for part, shape in parts.items()}
    with pytest.raises(Flux2Error, match="is damaged"):
        lora.apply(toy(KLEIN), save(tmp_path, tensors))


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_from_peft_s_configuration(tmp_path, rslora):
    """PEFT writes alpha beside its file, not into it."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3 * RANK, use_rslora=rslora, target_modules=list(LAYERS)
    )
    wrapped = peft.get_peft_model(toy(KLEIN), config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                layer = next(n for n in LAYERS if n in name)
                p.copy_(FACTORS[layer]["lora_B" in name] / 3)
    wrapped.save_pretrained(tmp_path)
    model = toy(KLEIN)
    lora.apply(model, tmp_path / "adapter_model.safetensors")
    assert error(model(**inputs(1)), wrapped(**inputs(1))) < CLOSE
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(Flux2Error, match=r"adapter_config\.json"):
        lora.apply(toy(KLEIN), tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path, bad):
    tensors = {key: value.clone() for key, value in bfl().items()}
    next(value for key, value in tensors.items() if "lora_B" in key)[0, 0] = bad
    with pytest.raises(Flux2Error, match="NaN or infinity in"):
        lora.apply(toy(KLEIN), save(tmp_path, tensors))


NAMED = {
    "bare": "BFL",
    "all-in-one": "all-in-one file",
    "down and up": "ai-toolkit",
    "an adapter's name": "ai-toolkit",
    "older diffusers": "diffusers",
    "linear layers": "diffusers",
}


@pytest.mark.parametrize("name", DIALECTS)
def test_the_report_names_the_dialect(tmp_path, name):
    report = lora.apply(toy(KLEIN), save(tmp_path, DIALECTS[name])).report
    assert report.dialect == NAMED.get(name, name)
    assert str(report).startswith(f"some_lora.safetensors ({report.dialect}): ")


def test_the_report_names_relatives(tmp_path):
    parts = {f"lycoris_{QKV.replace('.', '_')}.{k}": v for k, v in KINDS["LoKr, whole"][0].items()}
    assert lora.apply(toy(KLEIN), save(tmp_path, parts)).report.dialect == "LyCORIS, LoKr"
