"""The FLUX.2 flow transformer: double-stream blocks, then single-stream blocks.

Facts that are easy to get wrong: text comes first; there is no mask; modulation is computed once
per forward; qkv rows are q | k | v, each head-major; the final layer's rows are shift | scale.
Source: FLUX.2 model card and reference implementation (black-forest-labs/flux2, Apache-2.0).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .configs import TransformerConfig, Variant
from .errors import Flux2Error
from .heads import turned_heads
from .kv_cache import Kept, Recorder
from .latents import grid
from .layers import (
    MLPEmbedder,
    Modulation,
    ModulationLayer,
    QKNorm,
    layer_norm,
    linear,
    own_rows,
    sinusoid,
)
from .negatives import Both
from .negatives import check as check_negative
from .positions import rope_table
from .products import added, applied, finished, modulated
from .step_cache import Call
from .stream import STOCK, Controls, Stream
from .visibility import ReferenceControl, arrange


class SelfAttention(nn.Module):
    """The weights of one stream's attention; the attention itself is joint."""

    def __init__(self, config: TransformerConfig, ops=nn, **kw):
        super().__init__()
        h = config.hidden_size
        self.heads = config.heads
        self.qkv = linear(ops, h, 3 * h, **kw)
        self.norm = QKNorm(config.head_dim, ops, **kw)
        self.proj = linear(ops, h, h, **kw)


def mlp(hidden: int, ratio: int, ops, **kw) -> nn.ModuleDict:
    """SwiGLU feed-forward under the checkpoint's names 0 and 2."""
    inner = ratio * hidden
    return nn.ModuleDict(
        {"0": linear(ops, hidden, 2 * inner, **kw), "2": linear(ops, inner, hidden, **kw)}
    )


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
        text, picture = self.txt_attn, self.img_attn
        heads = turned_heads(
            applied(picture.qkv, modulated(picture.qkv, img1, img)), picture.norm, picture.heads,
            rope, applied(text.qkv, modulated(text.qkv, txt1, txt)), text.norm,
        )  # fmt: skip
        out = attend(*heads)
        txt_out, img_out = map(own_rows, out.split((txt.shape[1], img.shape[1]), 1))

        img, ready = added(self.img_mlp["0"], img1, img2, img, picture.proj, img_out)
        img = finished(self.img_mlp["2"], img2, img, applied(self.img_mlp["0"], ready))
        txt, ready = added(self.txt_mlp["0"], txt1, txt2, txt, text.proj, txt_out)
        txt = finished(self.txt_mlp["2"], txt2, txt, applied(self.txt_mlp["0"], ready))
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
        made = applied(self.linear1, modulated(self.linear1, mod, x))
        qkv, hidden = made.split(self.split, -1)
        q, k, v = turned_heads(qkv, self.norm, self.heads, rope)
        if isinstance(rows, slice):  # comparing it would tie a compiled graph to one size
            x, q, hidden, mod = x[:, rows], q[:, :, rows], hidden[:, rows], mod.head()
        out = attend(q, k, v)
        return finished(self.linear2, mod, x, hidden, out)


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
        return self.head(self.blocks(s))

    def blocks(self, s: Stream) -> Stream:
        before = None if s.reuse is None else s.img
        for i in range(len(self.double_blocks)):
            s.img, s.txt = self.double(i, s)
            if before is not None:
                if (known := s.known(before)) is not None:
                    s.img = known
                    return s
                before = None
        s.img, s.txt = torch.cat((s.txt, s.img), 1), s.txt[:, :0]
        for i in range(len(self.single_blocks)):
            s.img = self.single(i, s)
        if isinstance(s.memory, Recorder):
            s.memory = s.memory.finish()
        if s.reuse is not None:
            s.reuse.computed(s.rows)
        return s

    def embed(self, x, timestep, context, guidance, references, controls: Controls) -> Stream:
        self.check(x, context)
        kv = self.isolates(controls)
        memory = self.recall(x, timestep, context, guidance, references, controls, kv)
        size, shapes = (x.shape[2], x.shape[3]), tuple((r.shape[2], r.shape[3]) for r in references)
        negative, both = self.negative(context, size, controls)
        layout = arrange(
            context.shape[1], size, shapes, controls.references, controls.regions,
            negative=sum(n.shape[1] for n in negative), isolate=controls.isolate, kv=kv, cached=isinstance(memory, Kept), device=x.device,
        )  # fmt: skip
        texts = [context, *negative, *(r.context for r in controls.regions)]
        txt = self.txt_in(torch.cat([t.to(x).expand(len(x), -1, -1) for t in texts], 1))
        img = self.img_in(layout.tokens(x, references))
        rope = self.positions(context.shape[1], size, shapes, controls, x.device)
        if layout.rows is not None:
            rope = (rope[0][layout.rows], rope[1][layout.rows])
        still = layout.references if kv or controls.still else 0
        mods = self.modulations(timestep, guidance, x.dtype, still)
        reuse = self.reuse(x, timestep, context, guidance, references, controls)
        return Stream(txt, img, *mods[:1], rope, *mods[1:], layout, size, memory, reuse, both)

    def negative(self, context, size, controls: Controls) -> tuple[list[Tensor], Both | None]:
        """The text to steer away from, if there is one, and where it stands."""
        how = controls.negative
        if how is None or not how.active:
            return [], None
        check_negative(how, context)
        text = context.shape[1]
        start = 2 * text + sum(r.context.shape[1] for r in controls.regions)
        picture = slice(start, start + size[0] * size[1])
        return [how.context], Both(slice(0, text), slice(text, 2 * text), picture, how)

    def isolates(self, controls: Controls) -> bool:
        """True in the KV form: references see references only, and stand at t = 0."""
        kv = controls.kv_references
        return self.config.kv_references if kv is None else kv

    def positions(self, text: int, size, shapes, controls: Controls, device):
        """cos, sin of the stock sequence [text, picture, references]."""
        axes, theta = self.config.axes_dim, self.config.theta
        return rope_table(text, size, shapes, axes, theta, device, controls.origin)

    def modulations(self, timestep, guidance, dtype, still: int):
        """-> vec, and the modulations of picture, text and single blocks; the last `still` rows of
        a sequence stand at t = 0."""
        vec = self.vector(timestep, guidance, dtype)
        at_zero = self.vector(torch.zeros_like(timestep), guidance, dtype) if still else None
        return (
            vec,
            self.double_stream_modulation_img(vec, at_zero, still),
            self.double_stream_modulation_txt(vec),
            self.single_stream_modulation(vec, at_zero, still)[0],
        )

    def vector(self, timestep: Tensor, guidance: Tensor | None, dtype) -> Tensor:
        """The conditioning vector (B, h): time, plus guidance where the model embeds it."""
        vec = self.time_in(sinusoid(timestep).to(dtype))
        if self.config.guidance_embed and guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance).to(dtype))
        return vec

    def recall(
        self, x, timestep, context, guidance, references, controls: Controls, kv: bool
    ) -> Kept | Recorder | None:
        """The references' keys and values if they are known, or what records them on the way."""
        cache, steer = controls.cache, controls.references
        steer = [steer[i] if i < len(steer) else ReferenceControl() for i in range(len(references))]
        seen = [i for i, control in enumerate(steer) if control.seen]
        if cache is None or not seen:
            return None
        shapes = tuple((i, tuple(r.shape[2:]), steer[i].strength) for i, r in enumerate(references))
        content = [shared(references[i]) for i in seen]
        maps = [(i, steer[i].keep, steer[i].region) for i in seen]
        content += [m.to(x.device) for _, *pair in maps for m in pair if m is not None]
        about = [controls.about, kv, x.dtype, tuple(seen), shapes]
        about += [(i, *(m is not None for m in pair)) for i, *pair in maps]
        if self.config.guidance_embed and guidance is not None:
            about.append(tuple(guidance.tolist()))
        if cache.mode == "exact":
            if not kv:
                raise Flux2Error(
                    "An exact reference cache needs weights of the KV form",
                    "this model's references look at the text and the picture",
                    "Load the KV form (klein 9B KV), or choose the approximate cache",
                )
            key = cache.key(content, tuple(about))
            found = cache.find(key)
            return found or self.prefill(
                key, x, guidance, references, replace(controls, references=tuple(steer))
            )
        content += [context, *(t for r in controls.regions for t in (r.context, r.region))]
        more = [x.shape, controls.call, controls.isolate]
        if (away := controls.negative) is not None and away.active:
            content.append(away.context)
            more += [away.scale, away.tau, away.alpha]
        key = cache.key(content, (*about, *more))
        if cache.due(key):
            return cache.record(key, len(self.double_blocks) + len(self.single_blocks))
        return cache.find(key)

    def reuse(self, x, timestep, context, guidance, references, controls: Controls) -> Call | None:
        """What was done in earlier steps; pictures of several times in one batch go without."""
        if controls.steps is None or len(times := set(timestep.tolist())) != 1:
            return None
        embedded = guidance if self.config.guidance_embed else None
        settings = (x.shape, x.dtype, context, embedded, *references, controls.settings)
        blocks = len(self.double_blocks) + len(self.single_blocks)
        return controls.steps.call(times.pop(), settings, blocks)

    def prefill(self, key, x, guidance, references, controls: Controls) -> Kept:
        """The references alone through all blocks: in the KV form they see nobody else, so text
        and picture may be empty. References that all pictures share run once."""
        references = [shared(r) for r in references]
        guidance = None if guidance is None else shared(guidance)
        batch = max(map(len, references if guidance is None else (*references, guidance)))
        bound = x.new_empty(0, 0)
        alone = tuple(
            replace(c, active=c.seen, region=None if c.region is None else bound)
            for c in controls.references
        )
        only = replace(
            controls, references=alone, regions=(), isolate=False, cache=None, steps=None,
            negative=None,
        )  # fmt: skip
        s = self.embed(
            x.new_empty(batch, x.shape[1], 0, 0),
            torch.zeros(batch, device=x.device),
            x.new_empty(batch, 0, self.config.context_dim),
            None if guidance is None else guidance.expand(batch),
            references,
            only,
        )
        assert controls.cache is not None
        s.memory = controls.cache.record(key, len(self.double_blocks) + len(self.single_blocks))
        kept = self.blocks(s).memory
        assert isinstance(kept, Kept)
        return kept

    def double(self, i: int, s: Stream) -> tuple[Tensor, Tensor]:
        return self.double_blocks[i](s.img, s.txt, s.img_mod, s.txt_mod, s.rope, s.attention(i))

    def single(self, i: int, s: Stream) -> Tensor:
        """The last block computes the picture's rows alone: nobody reads the others."""
        rows = slice(s.text, s.text + s.picture) if i == len(self.single_blocks) - 1 else None
        attention = s.attention(len(self.double_blocks) + i)
        return self.single_blocks[i](s.img, s.single_mod, s.rope, attention, rows)

    def head(self, s: Stream) -> Tensor:
        """Accepts the picture's rows, or the whole sequence."""
        return grid(s.layout.restore(self.final_layer(s.rows, s.vec)), *s.size)

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


def shared(x: Tensor) -> Tensor:
    """x (B, ...), or its first row where all are the same."""
    return x[:1] if len(x) > 1 and bool((x == x[:1]).all()) else x


def encoder_for(context_dim: int) -> str:
    """Plain words for the text encoder that a model of this context width reads."""
    names = {
        15360: "Mistral-3 24B (FLUX.2 dev)",
        7680: "Qwen3 4B (klein 4B)",
        12288: "Qwen3 8B (klein 9B)",
        384: "nano's own",
    }
    return names.get(context_dim, f"a text encoder that gives {context_dim} values a token")
