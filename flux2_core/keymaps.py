"""Checkpoint layouts as data: each weight's name in BFL files, which is ours, and in diffusers files.

One table per network, read in both directions. Placeholders: {n}, {m} a number; {side} encoder or
decoder; {qkv} one of q, k, v; {t} one name (weight, bias); {x} anything. `edit` says what happens
to the tensor on the way; "" is nothing.
Source: facts of the reference implementation's and diffusers' checkpoints, compared tensor by tensor.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import Packed, stack

Weight = Tensor | Packed


class Rule(NamedTuple):
    bfl: str
    diffusers: str
    edit: str = ""


TRANSFORMER = tuple(
    Rule(*row)
    for row in (
        ("img_in.{t}", "x_embedder.{t}"),
        ("txt_in.{t}", "context_embedder.{t}"),
        ("time_in.in_layer.{t}", "time_guidance_embed.timestep_embedder.linear_1.{t}"),
        ("time_in.out_layer.{t}", "time_guidance_embed.timestep_embedder.linear_2.{t}"),
        ("guidance_in.in_layer.{t}", "time_guidance_embed.guidance_embedder.linear_1.{t}"),
        ("guidance_in.out_layer.{t}", "time_guidance_embed.guidance_embedder.linear_2.{t}"),
        ("double_stream_modulation_img.lin.{t}", "double_stream_modulation_img.linear.{t}"),
        ("double_stream_modulation_txt.lin.{t}", "double_stream_modulation_txt.linear.{t}"),
        ("single_stream_modulation.lin.{t}", "single_stream_modulation.linear.{t}"),
        ("double_blocks.{n}.img_attn.qkv.{t}", "transformer_blocks.{n}.attn.to_{qkv}.{t}", "fuse"),
        (
            "double_blocks.{n}.txt_attn.qkv.{t}",
            "transformer_blocks.{n}.attn.add_{qkv}_proj.{t}",
            "fuse",
        ),
        ("double_blocks.{n}.img_attn.proj.{t}", "transformer_blocks.{n}.attn.to_out.0.{t}"),
        ("double_blocks.{n}.txt_attn.proj.{t}", "transformer_blocks.{n}.attn.to_add_out.{t}"),
        (
            "double_blocks.{n}.img_attn.norm.query_norm.scale",
            "transformer_blocks.{n}.attn.norm_q.weight",
        ),
        (
            "double_blocks.{n}.img_attn.norm.key_norm.scale",
            "transformer_blocks.{n}.attn.norm_k.weight",
        ),
        (
            "double_blocks.{n}.txt_attn.norm.query_norm.scale",
            "transformer_blocks.{n}.attn.norm_added_q.weight",
        ),
        (
            "double_blocks.{n}.txt_attn.norm.key_norm.scale",
            "transformer_blocks.{n}.attn.norm_added_k.weight",
        ),
        ("double_blocks.{n}.img_mlp.0.{t}", "transformer_blocks.{n}.ff.linear_in.{t}"),
        ("double_blocks.{n}.img_mlp.2.{t}", "transformer_blocks.{n}.ff.linear_out.{t}"),
        ("double_blocks.{n}.txt_mlp.0.{t}", "transformer_blocks.{n}.ff_context.linear_in.{t}"),
        ("double_blocks.{n}.txt_mlp.2.{t}", "transformer_blocks.{n}.ff_context.linear_out.{t}"),
        ("single_blocks.{n}.linear1.{t}", "single_transformer_blocks.{n}.attn.to_qkv_mlp_proj.{t}"),
        ("single_blocks.{n}.linear2.{t}", "single_transformer_blocks.{n}.attn.to_out.{t}"),
        (
            "single_blocks.{n}.norm.query_norm.scale",
            "single_transformer_blocks.{n}.attn.norm_q.weight",
        ),
        (
            "single_blocks.{n}.norm.key_norm.scale",
            "single_transformer_blocks.{n}.attn.norm_k.weight",
        ),
        ("final_layer.linear.{t}", "proj_out.{t}"),
        ("final_layer.adaLN_modulation.1.{t}", "norm_out.linear.{t}", "swap"),
    )
)

AUTOENCODER = tuple(
    Rule(*row)
    for row in (
        ("encoder.quant_conv.{t}", "quant_conv.{t}"),
        ("decoder.post_quant_conv.{t}", "post_quant_conv.{t}"),
        ("{side}.norm_out.{t}", "{side}.conv_norm_out.{t}"),
        ("encoder.down.{n}.downsample.{x}", "encoder.down_blocks.{n}.downsamplers.0.{x}"),
        (
            "encoder.down.{n}.block.{m}.nin_shortcut.{t}",
            "encoder.down_blocks.{n}.resnets.{m}.conv_shortcut.{t}",
        ),
        ("encoder.down.{n}.block.{m}.{x}", "encoder.down_blocks.{n}.resnets.{m}.{x}"),
        ("decoder.up.{n}.upsample.{x}", "decoder.up_blocks.{n}.upsamplers.0.{x}", "upside down"),
        (
            "decoder.up.{n}.block.{m}.nin_shortcut.{t}",
            "decoder.up_blocks.{n}.resnets.{m}.conv_shortcut.{t}",
            "upside down",
        ),
        ("decoder.up.{n}.block.{m}.{x}", "decoder.up_blocks.{n}.resnets.{m}.{x}", "upside down"),
        ("{side}.mid.block_1.{x}", "{side}.mid_block.resnets.0.{x}"),
        ("{side}.mid.block_2.{x}", "{side}.mid_block.resnets.1.{x}"),
        ("{side}.mid.attn_1.norm.{t}", "{side}.mid_block.attentions.0.group_norm.{t}"),
        ("{side}.mid.attn_1.{qkv}.{t}", "{side}.mid_block.attentions.0.to_{qkv}.{t}", "conv"),
        ("{side}.mid.attn_1.proj_out.{t}", "{side}.mid_block.attentions.0.to_out.0.{t}", "conv"),
    )
)

# Newer hosts save the norms' scales as `weight`. Read only: BFL's spelling is what we write.
SPELLINGS = (
    Rule("{x}.query_norm.scale", "{x}.query_norm.weight"),
    Rule("{x}.key_norm.scale", "{x}.key_norm.weight"),
)

# Language models: Hugging Face's names, without prefix, and llama.cpp's in GGUF files.
LLAMA_CPP = tuple(
    Rule(*row)
    for row in (
        ("embed_tokens.weight", "token_embd.weight"),
        ("norm.weight", "output_norm.weight"),
        ("layers.{n}.self_attn.{qkv}_proj.weight", "blk.{n}.attn_{qkv}.weight"),
        ("layers.{n}.self_attn.o_proj.weight", "blk.{n}.attn_output.weight"),
        ("layers.{n}.self_attn.{qkv}_norm.weight", "blk.{n}.attn_{qkv}_norm.weight"),
        ("layers.{n}.input_layernorm.weight", "blk.{n}.attn_norm.weight"),
        ("layers.{n}.post_attention_layernorm.weight", "blk.{n}.ffn_norm.weight"),
        ("layers.{n}.mlp.gate_proj.weight", "blk.{n}.ffn_gate.weight"),
        ("layers.{n}.mlp.up_proj.weight", "blk.{n}.ffn_up.weight"),
        ("layers.{n}.mlp.down_proj.weight", "blk.{n}.ffn_down.weight"),
    )
)

FIELDS = {
    "n": r"\d+",
    "m": r"\d+",
    "side": "encoder|decoder",
    "qkv": "[qkv]",
    "t": r"[^.]+",
    "x": ".+",
}


def to_bfl(state: Mapping[str, Weight], rules: Iterable[Rule]) -> dict[str, Weight]:
    """Rename and edit what the rules know; other names, BFL's own among them, stay as they are.

    Needs the whole network: q, k and v become one tensor, and a decoder is numbered from its end.
    A q, k or v that lacks the others keeps its name, so that a strict load names it.
    """
    out, parts, last = {}, {}, _last(state, r"decoder\.up_blocks\.(\d+)\.")
    for key, tensor in state.items():
        rule, fields = match(rules, key, 1)
        if rule is None:
            out[key] = tensor
        elif rule.edit == "fuse":
            parts.setdefault(rule.bfl.format(**fields), {})[fields["qkv"]] = key
        else:
            fields = _turn(fields, last) if rule.edit == "upside down" else fields
            out[rule.bfl.format(**fields)] = _edit(rule.edit, tensor, to_conv=True)
    for name, thirds in parts.items():
        if len(thirds) == 3:
            out[name] = _fuse([state[thirds[part]] for part in "qkv"])
        else:
            out.update((key, state[key]) for key in thirds.values())
    return out


def from_llama_cpp(names: Iterable[str]) -> dict[str, str]:
    """{Hugging Face's name: llama.cpp's} of the tensors that a text encoder has."""
    found = ((match(LLAMA_CPP, name, 1), name) for name in names)
    return {rule.bfl.format(**fields): name for (rule, fields), name in found if rule}


def to_diffusers(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The inverse of `to_bfl`. Tensors are views of the given ones, except swapped halves."""
    out, last = {}, _last(state, r"decoder\.up\.(\d+)\.")
    for key, tensor in state.items():
        rule, fields = match(rules, key, 0)
        if rule is None:
            out[key] = tensor
        elif rule.edit == "fuse":
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                out[rule.diffusers.format(**fields, qkv=part)] = third
        else:
            fields = _turn(fields, last) if rule.edit == "upside down" else fields
            out[rule.diffusers.format(**fields)] = _edit(rule.edit, tensor, to_conv=False)
    return out


def _fuse(thirds: list[Weight]) -> Weight:
    """q, k, v below each other; where not all are quantised alike, as plain numbers."""
    packed = [third for third in thirds if isinstance(third, Packed)]
    if len(packed) == 3 and len({third.format for third in packed}) == 1:
        return stack(packed)
    return torch.cat([t.decode(torch.bfloat16) if isinstance(t, Packed) else t for t in thirds])


def _edit(edit: str, tensor: Weight, to_conv: bool) -> Weight:
    """`swap`: the halves along rows change places. `conv`: a linear layer's weight <-> a 1 x 1
    convolution's; a bias is both."""
    if edit and isinstance(tensor, Packed):
        tensor = tensor.decode(torch.bfloat16)
    if isinstance(tensor, Packed):
        return tensor
    if edit == "swap":
        return torch.cat(tensor.chunk(2)[::-1])
    if edit == "conv" and tensor.ndim > 1:
        return tensor.reshape(*tensor.shape[:2], *((1, 1) if to_conv else ()))
    return tensor


def _last(state: Iterable[str], pattern: str) -> int:
    """The highest block number in names that start with `pattern`."""
    return max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=0)


def _turn(fields: dict[str, str], last: int) -> dict[str, str]:
    return fields | {"n": str(last - int(fields["n"]))}


def match(rules: Iterable[Rule], key: str, side: int) -> tuple[Rule | None, dict[str, str]]:
    """The first rule whose name on `side` (0 BFL, 1 diffusers) fits, and what its placeholders hold."""
    for rule in rules:
        if found := _pattern(rule[side]).fullmatch(key):
            return rule, found.groupdict()
    return None, {}


@cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(
        re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{FIELDS[m[1]]})", re.escape(template))
    )
