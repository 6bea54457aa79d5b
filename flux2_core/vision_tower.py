"""What Mistral-3 sees pictures with: a vision transformer, and the projector into its words' space.

Each picture is looked at alone. Module names are those of the Hugging Face checkpoints.
Source: the published Pixtral and Mistral-3 models as transformers (Apache-2.0) defines them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from .configs import Shapes, count
from .errors import Flux2Error
from .layers import linear
from .text_encoder import FeedForward, rotate_half

MOST_PIXELS = 768 * 768  # of a picture, as the reference implementation's upsampling has it
LONGEST_SIDE = 1540
MEAN = (0.48145466, 0.4578275, 0.40821073)
SPREAD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5
HEAD_DIM = 64


@dataclass(frozen=True)
class VisionConfig:
    """The defaults are Mistral-3's. `text_size` is the width of the language model, `norm_eps` its
    norms'."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    layers: int = 24
    heads: int = 16
    patch: int = 14
    rope_theta: float = 1e4
    merge: int = 2  # so many patches in a row, and such rows, become one word
    text_size: int = 5120
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def cell(self) -> int:
        """The side, in pixels, of what becomes one word."""
        return self.patch * self.merge


class VisionAttention(nn.Module):
    """Every patch of a picture sees all of it."""

    def __init__(self, config: VisionConfig, ops=nn, **kw):
        super().__init__()
        width, self.heads = config.hidden_size, config.heads
        self.q_proj = linear(ops, width, width, **kw)
        self.k_proj = linear(ops, width, width, **kw)
        self.v_proj = linear(ops, width, width, **kw)
        self.o_proj = linear(ops, width, width, **kw)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(part, "b t (h d) -> b h t d", h=self.heads) for part in parts)
        out = F.scaled_dot_product_attention(rotate_half(q, *rope), rotate_half(k, *rope), v)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)"))


class VisionLayer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: VisionConfig, ops=nn, **kw):
        super().__init__()
        self.attention = VisionAttention(config, ops, **kw)
        self.feed_forward = FeedForward(config, ops, **kw)
        self.attention_norm = ops.RMSNorm(config.hidden_size, eps=EPS, **kw)
        self.ffn_norm = ops.RMSNorm(config.hidden_size, eps=EPS, **kw)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))


class VisionTransformer(nn.Module):
    """The stack of layers: everything that checkpoints keep under `transformer.`"""

    def __init__(self, config: VisionConfig, ops=nn, **kw):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, ops, **kw) for _ in range(config.layers))


class Tower(nn.Module):
    """Pixels (1, 3, H, W) -> (1, h * w, width), h and w counted in patches."""

    def __init__(self, config: VisionConfig, ops=nn, **kw):
        super().__init__()
        self.config = config
        size = config.patch
        self.patch_conv = ops.Conv2d(
            3, config.hidden_size, kernel_size=size, stride=size, bias=False, **kw
        )
        self.ln_pre = ops.RMSNorm(config.hidden_size, eps=EPS, **kw)
        self.transformer = VisionTransformer(config, ops, **kw)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_conv(pixels)
        rope = grid_rope(patches.shape[-2:], self.config, patches)
        x = self.ln_pre(rearrange(patches, "b c h w -> b (h w) c"))
        for layer in self.transformer.layers:
            x = layer(x, rope)
        return x


def grid_rope(grid, config: VisionConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (h * w, head_dim): even frequencies turn with the row, odd ones with the column."""
    dim = config.head_dim
    half = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device)
    frequency = config.rope_theta ** (-half / dim)
    row, column = (torch.arange(n, dtype=torch.float32, device=like.device) for n in grid)
    rows = (row[:, None] * frequency[::2])[:, None].expand(-1, grid[1], -1)
    columns = (column[:, None] * frequency[1::2])[None].expand(grid[0], -1, -1)
    angle = torch.cat((rows, columns), -1).flatten(0, 1)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


class PatchMerger(nn.Module):
    """Squares of merge x merge patches -> one token of the same width."""

    def __init__(self, config: VisionConfig, ops=nn, **kw):
        super().__init__()
        self.merge = config.merge
        width = config.hidden_size
        self.merging_layer = linear(ops, width * config.merge**2, width, **kw)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        squares = "b (h p w q) c -> b (h w) (c p q)"
        sizes = {"w": grid[1] // self.merge, "p": self.merge, "q": self.merge}
        return self.merging_layer(rearrange(x, squares, h=grid[0] // self.merge, **sizes))


class Projector(nn.Module):
    """The tower's patches -> the language model's words."""

    def __init__(self, config: VisionConfig, ops=nn, **kw):
        super().__init__()
        self.norm = ops.RMSNorm(config.hidden_size, eps=config.norm_eps, **kw)
        self.patch_merger = PatchMerger(config, ops, **kw)
        self.linear_1 = linear(ops, config.hidden_size, config.text_size, **kw)
        self.linear_2 = linear(ops, config.text_size, config.text_size, **kw)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.patch_merger(self.norm(x), grid)
        return self.linear_2(F.gelu(self.linear_1(x)))


class Vision(nn.Module):
    """Pixels (1, 3, H, W), sides multiples of config.cell -> (words, text_size)."""

    def __init__(self, config: VisionConfig, ops=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.vision_tower = Tower(config, ops, dtype=dtype, device=device)
        self.multi_modal_projector = Projector(config, ops, dtype=dtype, device=device)

    def forward(self, pixels: Tensor) -> Tensor:
        grid = pixels.shape[-2] // self.config.patch, pixels.shape[-1] // self.config.patch
        return self.multi_modal_projector(self.vision_tower(pixels), grid)[0]


def detect_vision(shapes: Shapes, norm_eps: float) -> VisionConfig:
    """Weight shapes under our names -> config. Raises Flux2Error for another kind of tower."""
    try:
        width, _, patch, _ = shapes["vision_tower.patch_conv.weight"]
        inner = shapes["vision_tower.transformer.layers.0.feed_forward.gate_proj.weight"][0]
        text = shapes["multi_modal_projector.linear_1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise Flux2Error(
            "The vision tower of this text encoder is not Mistral-3's",
            f"no {error}",
            "Choose Mistral-3 Small 24B, or disconnect the references",
        ) from error
    layers = count(shapes, "vision_tower.transformer.layers")
    heads = max(1, width // HEAD_DIM)
    return VisionConfig(width, inner, layers, heads, patch, text_size=text, norm_eps=norm_eps)


# -------------------------------------------------------------------------------------- pictures


def shown_size(width: int, height: int, cell: int) -> tuple[int, int]:
    """The size at which a picture is looked at, (width, height): no larger than it is but for the
    last cell, at most MOST_PIXELS, the longer side at most LONGEST_SIDE."""
    scale = max(1.0, math.sqrt(width * height / MOST_PIXELS), max(width, height) / LONGEST_SIDE)
    sides = (max(1, math.floor(side / scale)) for side in (width, height))
    wide, high = (-(-side // cell) * cell for side in sides)
    return wide, high


def pixels_of(picture: Image.Image, cell: int) -> Tensor:
    """-> (1, 3, H, W), normalised as the tower was trained."""
    size = shown_size(*picture.size, cell)
    small = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(small, np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(SPREAD)).permute(2, 0, 1)[None]


def place_of(pixels: Tensor, cell: int) -> str:
    """What stands for a picture in the text: a token for each word, row by row."""
    rows, columns = pixels.shape[-2] // cell, pixels.shape[-1] // cell
    lines = ["[IMG]" * columns] * rows
    return "[IMG_BREAK]".join(lines) + "[IMG_END]"
