"""Text from a text encoder: the rest of its language model, a K/V cache, a seeded choice of tokens.

A text encoder stops at the deepest layer that FLUX.2 reads. Writing needs the layers above, the
last norm and the output head: `Rest`, which holds those alone, so that the lower layers are in
memory once. Pictures are seen where the rest has a vision tower.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .configs import TextEncoderConfig
from .errors import Flux2Error
from .layers import linear
from .text_encoder import Layer, TextEncoder, for_each_query, rope_half
from .tokenizer import PromptTokenizer
from .vision_tower import Vision, VisionConfig, pixels_of, place_of

IMAGE = "[IMG]"


@dataclass(frozen=True)
class Chat:
    """A turn of a chat as text: `before`, the system's words, `between`, the user's, `after`.

    `stop`: the tokens that end an answer. `reserved`: what is taken out of people's words, because
    it would be a token with a meaning.
    """

    before: str
    between: str
    after: str
    stop: tuple[str, ...]
    reserved: tuple[str, ...]

    def __call__(self, system: str, user: str, pictures: str = "") -> str:
        system, user = (self._plain(words) for words in (system, user))
        return self.before + system + self.between + pictures + user + self.after

    def _plain(self, words: str) -> str:
        for token in self.reserved:
            words = words.replace(token, "")
        return words


CHATS = {
    "mistral3": Chat(
        "<s>[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT][INST]",
        "[/INST]",
        ("</s>",),
        (
            *("<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
            *(IMAGE, "[IMG_BREAK]", "[IMG_END]"),
        ),
    ),
    "qwen3": Chat(
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",  # an answer without thoughts
        ("<|im_end|>", "<|endoftext|>"),
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"),
    ),
}


# --------------------------------------------------------------------------------- the K/V cache


class KeyValues:
    """One layer's keys and values of a text of at most `length` tokens."""

    def __init__(self, length: int):
        self.length, self.used = length, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of new tokens (B, H, T, D) -> those of all so far."""
        if self._held is None:
            room = (*k.shape[:2], self.length, k.shape[-1])
            self._held = k.new_empty(room), v.new_empty(room)
        start, self.used = self.used, self.used + k.shape[2]
        for held, new in zip(self._held, (k, v), strict=True):
            held[:, :, start : self.used] = new
        return self._held[0][:, :, : self.used], self._held[1][:, :, : self.used]


class Causal:
    """Who sees whom in a text without padding: new tokens see themselves and all before them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, new, D), k and v (B, fewer heads, all, D) -> (B, new, H * D)."""
        new, total = q.shape[2], k.shape[2]
        if new == 1:  # the heads of a group as rows: no copy of the cache for each
            rows = rearrange(q, "b (g s) t d -> b g (s t) d", g=k.shape[1])
            out = F.scaled_dot_product_attention(rows, k, v)
            return rearrange(out, "b g s d -> b 1 (g s d)")
        k, v = for_each_query(q, k, v)
        seen = None
        if new < total:
            ones = torch.ones(new, total, dtype=torch.bool, device=q.device)
            seen = ones.tril(total - new)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        return rearrange(out, "b h t d -> b t (h d)")


# ---------------------------------------------------------------------------------- the networks


class Rest(nn.Module):
    """What stands above a text encoder in its language model: `layers` more layers, the last norm,
    the output head, and the vision tower where there is one."""

    def __init__(
        self,
        config: TextEncoderConfig,
        layers: int,
        vision: VisionConfig | None = None,
        ops=nn,
        dtype=None,
        device=None,
    ):
        super().__init__()
        kw = {"dtype": dtype, "device": device}
        self.layers = nn.ModuleList(Layer(config, ops, **kw) for _ in range(layers))
        self.norm = ops.RMSNorm(config.hidden_size, eps=config.norm_eps, **kw)
        self.lm_head = linear(ops, config.hidden_size, config.vocab_size, **kw)
        self.vision = Vision(vision, ops, **kw) if vision else None

    def head(self, x: Tensor) -> Tensor:
        """States -> logits of the token that comes next."""
        return self.lm_head(self.norm(x))


class Writer:
    """A text encoder with the rest of its language model. `tokenizer`: the encoder's own if None;
    `device`: where the words go in."""

    def __init__(
        self,
        encoder: TextEncoder,
        rest: Rest,
        tokenizer: PromptTokenizer | None = None,
        device=None,
    ):
        self.encoder, self.rest = encoder, rest
        self.device = device or encoder.model.embed_tokens.weight.device
        self._tokenizer = tokenizer

    @property
    def sees(self) -> bool:
        return self.rest.vision is not None

    @torch.no_grad()
    def logits(
        self,
        ids: Sequence[int],
        pictures: Sequence[Tensor] = (),
        caches: Sequence[KeyValues] = (),
    ) -> Tensor:
        """Tokens -> (vocabulary,), for the one that comes after the last.

        `pictures`: pixels for each run of [IMG] among the ids. With `caches` (`new_caches`) the ids
        are those that follow what was read before.
        """
        x = self._words(ids, pictures)
        past, config = caches[0].used if caches else 0, self.encoder.config
        slots = torch.arange(past, past + len(ids), device=x.device)
        rope = rope_half(slots[None, None], config.head_dim, config.rope_theta, x.dtype)
        layers = [*self.encoder.model.layers, *self.rest.layers]
        for i, layer in enumerate(layers):
            x = layer(x, rope, Causal(), caches[i] if caches else None)
        return self.rest.head(x[:, -1:])[0, -1]

    def new_caches(self, length: int) -> list[KeyValues]:
        layers = len(self.encoder.model.layers) + len(self.rest.layers)
        return [KeyValues(length) for _ in range(layers)]

    def _words(self, ids: Sequence[int], pictures: Sequence[Tensor]) -> Tensor:
        """-> (1, T, width), pictures in their places."""
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        x = self.encoder.model.embed_tokens(tokens)
        if pictures and self.rest.vision is not None:
            seen = [self.rest.vision(picture.to(x)) for picture in pictures]
            place = (tokens == self._token(IMAGE))[..., None].expand_as(x)
            x = x.masked_scatter(place, torch.cat(seen).to(x))
        return x

    def write(
        self,
        system: str,
        user: str,
        pictures: Sequence = (),
        *,
        limit: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
        cached: bool = True,
    ) -> tuple[str, bool]:
        """An answer and whether it came to its end within `limit` tokens.

        `pictures`: PIL images. The same seed gives the same text; temperature 0 needs none.
        """
        chat, prompts = CHATS[self.encoder.config.template], self.prompts
        vision = self.rest.vision
        cell = vision.config.cell if vision else 1
        pixels = [pixels_of(picture, cell) for picture in pictures] if vision else []
        text = chat(system, user, "".join(place_of(picture, cell) for picture in pixels))
        ids = list(prompts.tokenize(text))
        caches = self.new_caches(len(ids) + limit) if cached else []
        read: list[int] = []

        def step(new: Sequence[int]) -> Tensor:
            read.extend(new)
            shown = pixels if len(read) == len(ids) or not cached else ()
            return self.logits(new if cached else read, shown, caches)

        stop = {self._token(token) for token in chat.stop}
        written, ended = continue_text(step, ids, stop, limit, temperature, seed, on_token)
        return prompts.decode(written), ended

    @property
    def prompts(self) -> PromptTokenizer:
        found = self._tokenizer or self.encoder.tokenizer
        if found is None:
            raise Flux2Error(
                "This text encoder has no tokenizer", do="Load it with its tokenizer beside it"
            )
        return found

    def _token(self, text: str) -> int:
        ids = self.prompts.tokenize(text)
        if len(ids) != 1:
            raise Flux2Error(
                "This tokenizer lacks a token that writing needs",
                f"{text} is {len(ids)} tokens",
                "Use the tokenizer published with this text encoder",
            )
        return ids[0]


# ------------------------------------------------------------------------------ choosing tokens


def continue_text(
    step: Callable[[Sequence[int]], Tensor],
    ids: Sequence[int],
    stop: Collection[int],
    limit: int,
    temperature: float,
    seed: int,
    on_token: Callable[[int], None] | None = None,
) -> tuple[list[int], bool]:
    """-> the tokens written after `ids`, and whether a token of `stop` ended them.

    `step` is told what is new, first all `ids`, then each token, and gives the logits of the next.
    `on_token` hears how many are written, and may raise to interrupt.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    logits, written = step(ids), []
    while len(written) < limit:
        token = choose(logits, temperature, generator)
        if token in stop:
            return written, True
        written.append(token)
        if on_token:
            on_token(len(written))
        if len(written) < limit:
            logits = step([token])
    return written, False


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One token by softmax(logits / temperature); the likeliest at temperature 0.

    On the CPU in float64: the draw is the same wherever the logits were computed.
    """
    logits = logits.detach().to("cpu", torch.float64)
    if not logits.isfinite().all():
        raise Flux2Error(
            "The text encoder writes no text",
            "its numbers overflow",
            "Choose it in bf16 or fp8 rather than fp16, or check the file",
        )
    if temperature <= 0:
        return int(logits.argmax())
    share = (logits / temperature).softmax(-1).cumsum(-1)
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * share[-1]
    return min(int(torch.searchsorted(share, drawn, right=True)), len(share) - 1)
