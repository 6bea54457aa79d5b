"""The text encoder: one decoder-only language model for Mistral-3, Qwen3 and nano.

The transformer reads hidden states from three depths, stacked on channels, so only the layers up
to the deepest are built and there is no final norm and no output head. Module names are those of
the Hugging Face checkpoints.
Source: the published Mistral-3 and Qwen3 models as transformers (Apache-2.0) defines them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .configs import TextEncoderConfig
from .layers import linear


def rope_half(positions: Tensor, dim: int, theta: float, dtype=None) -> tuple[Tensor, Tensor]:
    """(..., T) -> cos, sin, each (..., T, dim) with the same dim / 2 angles twice.

    Angles in float32, the table in `dtype`, as the models were trained.
    """
    half = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    angle = positions.float()[..., None] * theta ** (-half / dim)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D / 2) of x (B, H, T, D): language models split heads in halves."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Visible:
    """Who sees whom: a row sees itself and the rows before it, padding is seen by nobody.

    Rows of padding before the first word see nothing; their attention is exactly 0. Saying so
    here keeps it true for every attention kernel (some return NaN).
    """

    def __init__(self, mask: Tensor):
        """`mask` (B, T) bool, True where there is text."""
        length = mask.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        seen = causal & mask[:, None, None, :]
        self.blind = ~seen.any(-1, keepdim=True)
        self.mask = seen | self.blind

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three (B, H, T, D) -> (B, T, H * D)."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return rearrange(out.masked_fill(self.blind, 0), "b h t d -> b t (h d)")


class Attention(nn.Module):
    """Causal attention with fewer key heads than query heads; Qwen3 normalises both."""

    def __init__(self, config: TextEncoderConfig, ops=nn, **kw):
        super().__init__()
        width, dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.q_proj = linear(ops, width, config.heads * dim, **kw)
        self.k_proj = linear(ops, width, config.kv_heads * dim, **kw)
        self.v_proj = linear(ops, width, config.kv_heads * dim, **kw)
        self.o_proj = linear(ops, config.heads * dim, width, **kw)
        self.q_norm = ops.RMSNorm(dim, eps=config.norm_eps, **kw) if config.qk_norm else None
        self.k_norm = ops.RMSNorm(dim, eps=config.norm_eps, **kw) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        q = rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        v = rearrange(self.v_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_half(q, *rope), rotate_half(k, *rope)
        share = self.heads // self.kv_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        return self.o_proj(visible.attend(q, k, v))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextEncoderConfig, ops=nn, **kw):
        super().__init__()
        self.gate_proj = linear(ops, config.hidden_size, config.intermediate_size, **kw)
        self.up_proj = linear(ops, config.hidden_size, config.intermediate_size, **kw)
        self.down_proj = linear(ops, config.intermediate_size, config.hidden_size, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: TextEncoderConfig, ops=nn, **kw):
        super().__init__()
        self.self_attn = Attention(config, ops, **kw)
        self.mlp = FeedForward(config, ops, **kw)
        self.input_layernorm = ops.RMSNorm(config.hidden_size, eps=config.norm_eps, **kw)
        self.post_attention_layernorm = ops.RMSNorm(config.hidden_size, eps=config.norm_eps, **kw)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Embedding and layers: everything that checkpoints keep under `model.`"""

    def __init__(self, config: TextEncoderConfig, ops=nn, **kw):
        super().__init__()
        self.embed_tokens = ops.Embedding(config.vocab_size, config.hidden_size, **kw)
        self.layers = nn.ModuleList(Layer(config, ops, **kw) for _ in range(config.layers))


class TextEncoder(nn.Module):
    """Token ids -> the context that the flow transformer reads."""

    def __init__(self, config: TextEncoderConfig, ops=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.model = LanguageModel(config, ops, dtype=dtype, device=device)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, T) int64, mask (B, T) bool, True where there is text -> (B, T, context_dim).

        `positions` (B, T) or (T,); by default slot numbers 0 ... T - 1, padding counted: FLUX.2's
        encoders were always run so, on either padding side.
        """
        config = self.config
        x = self.model.embed_tokens(ids)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        rope = rope_half(positions, config.head_dim, config.rope_theta, x.dtype)
        if positions.ndim == 2:
            rope = rope[0][:, None], rope[1][:, None]
        visible = Visible(mask)
        states = [x]
        for layer in self.model.layers:
            states.append(layer(states[-1], rope, visible))
        return torch.cat([states[k] for k in config.layers_out], -1)
