"""The FLUX.2 flow transformer: double-stream blocks, then single-stream blocks.

Facts that are easy to get wrong: text comes first; there is no mask; modulation is computed once
per forward; qkv rows are q | k | v, each head-major; the final layer's rows are shift | scale.
Source: FLUX.2 model card and reference implementation (black-forest-labs/flux2, Apache-2.0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import attend, attend_isolated
from .configs import TransformerConfig, Variant
from .errors import Flux2Error
from .latents import grid, tokens
from .layers import (
    MLPEmbedder,
    Modulation,
    ModulationLayer,
    QKNorm,
    layer_norm,
    linear,
    own_rows,
    sinusoid,
    swiglu,
)
from .positions import rope_table, rotate


@dataclass(frozen=True)
class Controls:
    """What bends the stock forward pass; None, or every field at its default, is stock.

    `kv_references`: references see references only and are modulated at t = 0; None follows the
    model's config.
    """

    kv_references: bool | None = None


STOCK = Controls()


@dataclass
class Stream:
    """What travels through the blocks. Rows: text T, picture L, references R, in this order."""

    txt: Tensor  # (B, T, h)
    img: Tensor  # (B, L + R, h)
    vec: Tensor  # (B, h)
    rope: tuple[Tensor, Tensor]  # cos, sin: (T + L + R, D / 2)
    img_mod: tuple[Modulation, Modulation]
    txt_mod: tuple[Modulation, Modulation]
    single_mod: Modulation
    text: int
    picture: int
    size: tuple[int, int]
    isolated: int = 0  # reference rows that see references only

    def attention(self, attend=attend):
        """The attention callable for this layout."""
        return (
            partial(attend_isolated, references=self.isolated, attend=attend)
            if self.isolated
            else attend
        )


class SelfAttention(nn.Module):
    """The weights of one stream's attention; the attention itself is joint."""

    def __init__(self, config: TransformerConfig, ops=nn, **kw):
        super().__init__()
        h = config.hidden_size
        self.heads = config.heads
        self.qkv = linear(ops, h, 3 * h, **kw)
        self.norm = QKNorm(config.head_dim, ops, **kw)
        self.proj = linear(ops, h, h, **kw)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, h) -> q, k, v (B, H, L, D), q and k normalised."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        return *self.norm(q, k), v


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 h) with rows q | k | v, each head-major -> three (B, H, L, D)."""
    q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=heads)
    return q, k, v


def mlp(hidden: int, ratio: int, ops, **kw) -> nn.ModuleDict:
    """SwiGLU feed-forward under the checkpoint's names 0 and 2."""
    inner = ratio * hidden
    return nn.ModuleDict(
        {"0": linear(ops, hidden, 2 * inner, **kw), "2": linear(ops, inner, hidden, **kw)}
    )


def feed_forward(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    return layers["2"](swiglu(layers["0"](x)))


class DoubleBlock(nn.Module):
    """Text and picture with weights of their own, joined in attention."""

    def __init__(self, config: TransformerConfig, ops=nn, **kw):
        super().__init__()
        self.img_attn = SelfAttention(config, ops, **kw)
        self.img_mlp = mlp(config.hidden_size, config.mlp_ratio, ops, **kw)
        self.txt_attn = SelfAttention(config, ops, **kw)
        self.txt_mlp = mlp(config.hidden_size, config.mlp_ratio, ops, **kw)

    def forward(self, img, txt, img_mod, txt_mod, rope, attend=attend):
        """img (B, L, h), txt (B, T, h) -> the same."""
        img1, img2 = img_mod
        txt1, txt2 = txt_mod
        pairs = zip(
            self.txt_attn.heads_of(txt1.modulate(txt)),
            self.img_attn.heads_of(img1.modulate(img)),
            strict=True,
        )
        q, k, v = (torch.cat(pair, 2) for pair in pairs)
        out = attend(rotate(q, *rope), rotate(k, *rope), v)
        txt_out, img_out = map(own_rows, out.split((txt.shape[1], img.shape[1]), 1))

        img = img1.add(img, self.img_attn.proj(img_out))
        txt = txt1.add(txt, self.txt_attn.proj(txt_out))
        img = img2.add(img, feed_forward(self.img_mlp, img2.modulate(img)))
        txt = txt2.add(txt, feed_forward(self.txt_mlp, txt2.modulate(txt)))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and feed-forward in parallel over the whole sequence, one gate for both."""

    def __init__(self, config: TransformerConfig, ops=nn, **kw):
        super().__init__()
        h, inner = config.hidden_size, config.mlp_ratio * config.hidden_size
        self.heads, self.split = config.heads, (3 * h, 2 * inner)
        self.linear1 = linear(ops, h, sum(self.split), **kw)
        self.linear2 = linear(ops, h + inner, h, **kw)
        self.norm = QKNorm(config.head_dim, ops, **kw)

    def forward(
        self, x: Tensor, mod: Modulation, rope, attend=attend, rows: slice | None = None
    ) -> Tensor:
        """x (B, T, h) -> the same, or only `rows` of it: keys and values always come from all rows."""
        qkv, hidden = self.linear1(mod.modulate(x)).split(self.split, -1)
        q, k, v = split_heads(qkv, self.heads)
        q, k = self.norm(q, k)
        k = rotate(k, *rope)
        if rows is not None:
            x, q, hidden, mod = x[:, rows], q[:, :, rows], hidden[:, rows], mod.head()
            rope = tuple(table[rows] for table in rope)
        out = attend(rotate(q, *rope), k, v)
        return mod.add(x, self.linear2(torch.cat((out, swiglu(hidden)), -1)))


class LastLayer(nn.Module):
    def __init__(self, config: TransformerConfig, ops=nn, **kw):
        super().__init__()
        h = config.hidden_size
        self.linear = linear(ops, h, config.in_channels, **kw)
        self.adaLN_modulation = nn.ModuleDict({"1": linear(ops, h, 2 * h, **kw)})

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation["1"](F.silu(vec))[:, None].chunk(2, -1)
        return self.linear(torch.addcmul(shift, layer_norm(x), 1 + scale))


class Flux2Transformer(nn.Module):
    """v = model(x, t, context): the velocity noise - picture at time t.

    `ops` is the namespace that weighted layers come from. A host overrides `embed`, `double`,
    `single` and `head` to add its patches; the core knows nothing of them.
    """

    variant: Variant  # which release this is; set by the loader

    def __init__(self, config: TransformerConfig, ops=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        h, kw = config.hidden_size, {"dtype": dtype, "device": device}
        self.img_in = linear(ops, config.in_channels, h, **kw)
        self.txt_in = linear(ops, config.context_dim, h, **kw)
        self.time_in = MLPEmbedder(h, ops, **kw)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(h, ops, **kw)
        self.double_stream_modulation_img = ModulationLayer(h, 2, ops, **kw)
        self.double_stream_modulation_txt = ModulationLayer(h, 2, ops, **kw)
        self.single_stream_modulation = ModulationLayer(h, 1, ops, **kw)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, ops, **kw) for _ in range(config.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, ops, **kw) for _ in range(config.single_blocks)
        )
        self.final_layer = LastLayer(config, ops, **kw)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        guidance: Tensor | None = None,
        references: Sequence[Tensor] = (),
        controls: Controls | None = None,
    ) -> Tensor:
        """x (B, 128, h, w), timestep (B,) in [0, 1], context (B, T, ctx), guidance (B,) or None,
        references (B or 1, 128, h_i, w_i) each -> velocity (B, 128, h, w) in x's dtype."""
        s = self.embed(x, timestep, context, guidance, references, controls or STOCK)
        for i in range(len(self.double_blocks)):
            s.img, s.txt = self.double(i, s)
        s.img, s.txt = torch.cat((s.txt, s.img), 1), s.txt[:, :0]
        for i in range(len(self.single_blocks)):
            s.img = self.single(i, s)
        return self.head(s)

    def embed(self, x, timestep, context, guidance, references, controls: Controls) -> Stream:
        self.check(x, context)
        batch, _, h, w = x.shape
        refs = [r.to(x).expand(batch, -1, -1, -1) for r in references]
        img = self.img_in(torch.cat([tokens(part) for part in (x, *refs)], 1))
        txt = self.txt_in(context.to(x.dtype))
        vec = self.vector(timestep, guidance, x.dtype)
        rows = img.shape[1] - h * w
        kv = self.config.kv_references if controls.kv_references is None else controls.kv_references
        isolated = rows if kv else 0
        still = self.vector(torch.zeros_like(timestep), guidance, x.dtype) if isolated else None
        return Stream(
            txt=txt,
            img=img,
            vec=vec,
            rope=rope_table(
                txt.shape[1],
                (h, w),
                tuple((r.shape[2], r.shape[3]) for r in refs),
                self.config.axes_dim,
                self.config.theta,
                x.device,
            ),
            img_mod=self.double_stream_modulation_img(vec, still, isolated),
            txt_mod=self.double_stream_modulation_txt(vec),
            single_mod=self.single_stream_modulation(vec, still, isolated)[0],
            text=txt.shape[1],
            picture=h * w,
            size=(h, w),
            isolated=isolated,
        )

    def vector(self, timestep: Tensor, guidance: Tensor | None, dtype) -> Tensor:
        """The conditioning vector (B, h): time, plus guidance where the model embeds it."""
        vec = self.time_in(sinusoid(timestep).to(dtype))
        if self.config.guidance_embed and guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance).to(dtype))
        return vec

    def double(self, i: int, s: Stream) -> tuple[Tensor, Tensor]:
        return self.double_blocks[i](s.img, s.txt, s.img_mod, s.txt_mod, s.rope, s.attention())

    def single(self, i: int, s: Stream) -> Tensor:
        """The last block computes the picture's rows alone: nobody reads the others."""
        if i < len(self.single_blocks) - 1:
            return self.single_blocks[i](s.img, s.single_mod, s.rope, s.attention())
        rows = slice(s.text, s.text + s.picture)
        return self.single_blocks[i](s.img, s.single_mod, s.rope, attend, rows)

    def head(self, s: Stream) -> Tensor:
        """Accepts the picture's rows, or the whole sequence."""
        x = s.img if s.img.shape[1] == s.picture else s.img[:, s.text : s.text + s.picture]
        return grid(self.final_layer(x, s.vec), *s.size)

    def check(self, x: Tensor, context: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise Flux2Error(
                "The latent is not FLUX.2's",
                f"shape {tuple(x.shape)}, wanted (batch, {self.config.in_channels}, height / 16, width / 16)",
                "Make it with FLUX.2 Empty Latent or a FLUX.2 VAE",
            )
        if context.shape[-1] != self.config.context_dim:
            raise Flux2Error(
                "The text encoder does not belong to this model",
                f"its rows are {context.shape[-1]} wide, the model reads {self.config.context_dim}",
                f"Load {encoder_for(self.config.context_dim)}",
            )


def encoder_for(context_dim: int) -> str:
    """Plain words for the text encoder that a model of this context width reads."""
    names = {
        15360: "Mistral-3 24B (FLUX.2 dev)",
        7680: "Qwen3 4B (klein 4B)",
        12288: "Qwen3 8B (klein 9B)",
        384: "nano's own",
    }
    return names.get(context_dim, f"a text encoder that gives {context_dim} values a token")
