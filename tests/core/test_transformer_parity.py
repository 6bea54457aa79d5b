"""Our transformer against diffusers' with the same random weights, at toy size.

Errors are max |a - b| / std(b) in float32 and ||a - b|| / ||b|| in bfloat16.
"""

from dataclasses import replace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", minversion="0.38", reason="pip install diffusers")
from diffusers.models.transformers.transformer_flux2 import (  # noqa: E402
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)

from flux2_pack.flux2_core.keymaps import TRANSFORMER, to_diffusers  # noqa: E402
from flux2_pack.flux2_core.latents import grid, tokens  # noqa: E402
from flux2_pack.flux2_core.positions import rope, sequence_ids  # noqa: E402
from flux2_pack.flux2_core.transformer import Controls, Flux2Transformer  # noqa: E402
from flux2_pack.tests.core.toys import DEV, KLEIN, SIZES, TEXT, inputs, toy  # noqa: E402


def theirs(model: Flux2Transformer) -> torch.nn.Module:
    """diffusers' transformer with the same weights."""
    c = model.config
    peer = diffusers.Flux2Transformer2DModel(
        num_layers=c.double_blocks,
        num_single_layers=c.single_blocks,
        num_attention_heads=c.heads,
        joint_attention_dim=c.context_dim,
        guidance_embeds=c.guidance_embed,
    )
    peer.load_state_dict(to_diffusers(model.state_dict(), TRANSFORMER))
    return peer.eval().requires_grad_(False)


def ids(t: int, height: int, width: int) -> torch.Tensor:
    return torch.cartesian_prod(
        torch.tensor([t]), torch.arange(height), torch.arange(width), torch.tensor([0])
    )


def parts(i: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, ids) of the picture and of each reference: t = 0, 10, 20, ..."""
    pictures = [i["x"], *i["references"]]
    return [(tokens(p), ids(10 * n, *p.shape[2:])) for n, p in enumerate(pictures)]


def call(peer, i: dict, pictures, **kw):
    """diffusers' forward over `pictures`, [(tokens, ids)]; its raw result."""
    return peer(
        hidden_states=torch.cat([p[0] for p in pictures], 1),
        encoder_hidden_states=i["context"],
        timestep=i["timestep"],
        img_ids=torch.cat([p[1] for p in pictures]),
        txt_ids=torch.cartesian_prod(*[torch.tensor([0])] * 3, torch.arange(TEXT)),
        guidance=i["guidance"],
        return_dict=False,
        **kw,
    )


def their_velocity(peer, i: dict) -> torch.Tensor:
    h, w = i["x"].shape[2:]
    return grid(call(peer, i, parts(i))[0][:, : h * w], h, w)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.std()).item()


def frobenius(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def kv(peer):
    """What diffusers' klein-KV pipeline does to its transformer."""
    for block in peer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in peer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return peer


@pytest.mark.parametrize("references", [0, 2, 10])
@pytest.mark.parametrize(("size", "batch"), [((5, 7), 1), ((1, 9), 2), ((8, 8), 2)])
@pytest.mark.parametrize(("config", "guidance"), [(DEV, 3.5), (KLEIN, None)], ids=["dev", "klein"])
def test_velocity(config, guidance, size, batch, references):
    model = toy(config)
    i = inputs(references, size, batch, guidance=guidance)
    assert error(model(**i), their_velocity(theirs(model), i)) <= 1e-5  # 1.5e-6


def test_dev_without_guidance():
    """diffusers has no such call; its klein form has the same weights less the guidance layers."""
    model, i = toy(DEV), inputs(1)
    plain = {k: v for k, v in model.state_dict().items() if not k.startswith("guidance_in.")}
    klein = Flux2Transformer(KLEIN)
    klein.load_state_dict(plain)
    assert error(model(**i), their_velocity(theirs(klein), i)) <= 1e-5  # 9.3e-7


def test_one_reference_serves_a_batch():
    model, i = toy(KLEIN), inputs(2, batch=2)
    i["references"] = [r[:1] for r in i["references"]]
    wide = i | {"references": [r.expand(2, -1, -1, -1) for r in i["references"]]}
    assert error(model(**i), their_velocity(theirs(model), wide)) <= 1e-5  # 1.4e-6


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("references", [0, 1, 3])
def test_kv_form(references, batch):
    """References that see each other alone, at t = 0: diffusers' first step, which fills its cache,
    and a later one, which reads it. Ours computes them each time; nothing else may differ."""
    model, peer = toy(KLEIN), kv(theirs(toy(KLEIN)))
    first = inputs(references, batch=batch)
    h, w = first["x"].shape[2:]
    picture, *refs = parts(first)
    rows = sum(len(r[1]) for r in refs)
    controls = Controls(kv_references=True)

    wanted, cache = call(
        peer, first, [*refs, picture], kv_cache_mode="extract", num_ref_tokens=rows
    )
    assert error(model(**first, controls=controls), grid(wanted, h, w)) <= 1e-5  # 1.4e-6

    later = inputs(references, batch=batch, seed=2) | {"references": first["references"]}
    later |= {"context": first["context"], "timestep": first["timestep"] / 2}
    mode = {"kv_cache": cache, "kv_cache_mode": "cached"} if references else {}
    wanted = call(peer, later, parts(later)[:1], **mode)[0]
    assert error(model(**later, controls=controls), grid(wanted, h, w)) <= 1e-5  # 1.9e-6


def test_kv_form_is_the_config_s_default():
    kv_model = Flux2Transformer(replace(KLEIN, kv_references=True))
    model, i = toy(KLEIN), inputs(2)
    kv_model.load_state_dict(model.state_dict())
    assert torch.equal(kv_model(**i), model(**i, controls=Controls(kv_references=True)))
    assert torch.equal(kv_model(**i, controls=Controls(kv_references=False)), model(**i))
    assert error(kv_model(**i), model(**i)) > 1e-2  # the two forms are not the same: 0.18


@pytest.mark.parametrize("references", [0, 2])
def test_bfloat16(references):
    """t and guidance are chosen so that 1000 t is exact in bfloat16: diffusers rounds it, we do not."""
    model = toy(DEV)
    exact, half = theirs(model), theirs(model).bfloat16()
    i = inputs(references, guidance=4.0) | {"timestep": torch.tensor([0.5])}
    rounded = {
        k: [r.bfloat16() for r in v] if k == "references" else v.bfloat16() for k, v in i.items()
    }
    ours = model.bfloat16()(**rounded)
    assert ours.dtype == torch.bfloat16
    assert frobenius(ours, their_velocity(half, rounded)) <= 2e-2  # 6.3e-3
    assert frobenius(ours, their_velocity(exact, i)) <= 2e-2  # 7.7e-3


def test_positions():
    """Our ids and rotary tables against diffusers'."""
    grids = ((5, 7), *SIZES)
    ours = sequence_ids(TEXT, grids[0], grids[1:])
    text = torch.cartesian_prod(*[torch.tensor([0])] * 3, torch.arange(TEXT))
    wanted = torch.cat([text, *(ids(10 * n, *g) for n, g in enumerate(grids))])
    assert torch.equal(ours, wanted.double())
    cos, sin = rope(ours, DEV.axes_dim, DEV.theta)
    their_cos, their_sin = theirs(toy(KLEIN)).pos_embed(wanted)  # each angle twice, side by side
    assert torch.equal(cos.repeat_interleave(2, -1), their_cos)
    assert torch.equal(sin.repeat_interleave(2, -1), their_sin)
