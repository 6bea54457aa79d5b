"""The text encoder: one decoder-only language model for Mistral-3, Qwen3 and nano.

The transformer reads hidden states from three depths, stacked on channels, so only the layers up
to the deepest are built and there is no final norm and no output head. Module names are those of
the Hugging Face checkpoints.
Source: the published Mistral-3 and Qwen3 models as transformers (Apache-2.0) defines them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .configs import MISTRAL3_24B, QWEN3_4B, TEXT_ENCODERS, Shapes, TextEncoderConfig, count
from .errors import Flux2Error
from .layers import linear
from .tokenizer import PromptTokenizer

TOY_WIDTH = 1024  # below it any shape of the family is welcome, above it only the released ones


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
        """q (B, H, T, D); k and v, which may have fewer heads -> (B, T, H * D)."""
        k, v = for_each_query(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return rearrange(out.masked_fill(self.blind, 0), "b h t d -> b t (h d)")


def for_each_query(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries: each serves its group of neighbours."""
    share = q.shape[1] // k.shape[1]
    return k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)


class Sight(Protocol):
    """Who sees whom, as `Visible`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Cache(Protocol):
    """The keys and values of a text's earlier tokens."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of new tokens -> those of all so far."""
        ...


class Widths(Protocol):
    """What a feed-forward layer asks of a config."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...


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

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Sight, cache: Cache | None = None
    ) -> Tensor:
        q = rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        v = rearrange(self.v_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_half(q, *rope), rotate_half(k, *rope)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.o_proj(visible.attend(q, k, v))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Widths, ops=nn, **kw):
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

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Sight, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Embedding and layers: everything that checkpoints keep under `model.`"""

    def __init__(self, config: TextEncoderConfig, ops=nn, **kw):
        super().__init__()
        self.embed_tokens = ops.Embedding(config.vocab_size, config.hidden_size, **kw)
        self.layers = nn.ModuleList(Layer(config, ops, **kw) for _ in range(config.layers))


class TextEncoder(nn.Module):
    """Token ids -> the context that the flow transformer reads. `encode` needs a tokenizer."""

    def __init__(self, config: TextEncoderConfig, ops=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.tokenizer: PromptTokenizer | None = None
        self.model = LanguageModel(config, ops, dtype=dtype, device=device)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, T) int64, mask (B, T) bool, True where there is text -> (B, T, context_dim).

        `positions` (B, T) or (T,); by default slot numbers 0 ... T - 1, padding counted: FLUX.2's
        encoders were always run so, on either padding side.
        """
        config = self.config
        x = self.model.embed_tokens(ids)
        slots = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        slots = slots[..., None, :]  # the same for every head
        rope = rope_half(slots, config.head_dim, config.rope_theta, x.dtype)
        visible = Visible(mask)
        states = [x]
        for layer in self.model.layers:
            states.append(layer(states[-1], rope, visible))
        return torch.cat([states[k] for k in config.layers_out], -1)

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """-> (B, text_length, context_dim); rows of padding are part of the context."""
        if self.tokenizer is None:
            raise Flux2Error(
                "This text encoder has no tokenizer",
                do="Load it with load_text_encoder, or set its tokenizer to one",
            )
        ids, mask = self.tokenizer.encode(prompts)
        device = self.model.embed_tokens.weight.device
        return self(ids.to(device), mask.to(device))


def detect_text_encoder(shapes: Shapes) -> TextEncoderConfig:
    """Weight shapes under Hugging Face names, without prefix (`model.layers.0. ...`) -> config.

    A released encoder is known by its widths; a small one of any shape is read as Qwen3 if it
    normalises queries, else as Mistral-3, with states taken at each quarter of its depth.
    Raises Flux2Error for anything else. The sizes are read off what packed files leave whole: the
    embedding, the norms, and the rows of linears, never their columns.
    """
    try:
        vocabulary, width = shapes["model.embed_tokens.weight"]
        inner = shapes["model.layers.0.mlp.gate_proj.weight"][0]
        query = shapes["model.layers.0.self_attn.q_proj.weight"][0]
        key = shapes["model.layers.0.self_attn.k_proj.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise _foreign(f"{len(shapes)} tensors, no {error}") from error
    norm = shapes.get("model.layers.0.self_attn.q_norm.weight")
    for known in TEXT_ENCODERS.values():
        sizes = known.hidden_size, known.intermediate_size, known.qk_norm
        if sizes == (width, inner, norm is not None):
            config = replace(known, vocab_size=vocabulary)
            break
    else:
        config = _toy(vocabulary, width, inner, query, key, norm, count(shapes, "model.layers"))
    if count(shapes, "model.layers") < config.layers:
        raise Flux2Error(
            "Layers are missing from this text encoder",
            f"{count(shapes, 'model.layers')} of {config.layers}",
            "Choose a complete file",
        )
    rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if rows != (query, key) or "model.layers.0.self_attn.q_proj.bias" in shapes:
        raise _foreign(f"width {width}, {query} query and {key} key rows")
    return config


def _toy(
    vocabulary: int, width: int, inner: int, query: int, key: int, norm, layers: int
) -> TextEncoderConfig:
    base = MISTRAL3_24B if norm is None else QWEN3_4B
    dim = base.head_dim if norm is None else norm[0]
    step = max(layers // 4, 1)
    if width >= TOY_WIDTH or query % dim or key % dim:
        raise _foreign(f"a language model of width {width} and {layers} layers")
    return replace(
        base,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        heads=query // dim,
        kv_heads=key // dim,
        head_dim=dim,
        layers_out=(step, 2 * step, 3 * step),
        pad_id=base.pad_id if base.pad_id < vocabulary else 0,
    )


def _foreign(seen: str) -> Flux2Error:
    return Flux2Error(
        "This is not a FLUX.2 text encoder",
        seen,
        "Choose Mistral-3 Small 24B for dev, Qwen3 4B for klein 4B, Qwen3 8B for klein 9B",
    )
