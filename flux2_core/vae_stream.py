"""The autoencoder strip by strip: any size in bounded memory, with the whole picture's result.

A picture's activations are row strips. A convolution reads the rows beside its strip (a halo), a
GroupNorm takes its statistics from all strips of the picture before the first one is normalised,
and the attention goes through its queries in chunks: nothing is cut, so there are no seams.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .autoencoder import (
    AttnBlock,
    AutoEncoder,
    Downsample,
    Level,
    Mid,
    ResBlock,
    Upsample,
    check_latents,
    check_pixels,
)
from .latents import denormalise, normalise, pack, unpack

Read = Callable[[int, int], Tensor]  # rows a to b of a picture, (1, C, b - a, W)


@dataclass(frozen=True)
class Streaming:
    """How to go through a picture.

    `lean` keeps one tensor less alive in each residual block and computes its first convolution
    twice; the decoder's enlarged pictures are then never stored either. `host` keeps all strips
    but those at work in the CPU's memory. `strip` is the size of one strip in bytes; `rows`, its
    height, overrides it.
    """

    lean: bool = False
    host: bool = False
    strip: int = 64 * 2**20
    rows: int | None = None

    def strips(self, height: int, row: int) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of each strip, for rows of so many bytes."""
        step = self.rows or max(1, self.strip // row)
        return ((a, min(a + step, height)) for a in range(0, height, step))


class Moments:
    """Mean and variance of each group of channels, over strips."""

    def __init__(self):
        self.parts: list[tuple[int, Tensor, Tensor]] = []
        self.found: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, groups: int) -> None:
        flat = x.reshape(groups, -1)
        self.parts.append((flat.shape[1], *mean_variance(flat)))

    def total(self) -> tuple[Tensor, Tensor]:
        """Both (groups,) in float32, summed up in float64 on the CPU."""
        if self.found is None:
            counts, means, variances = zip(*self.parts, strict=True)
            n = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
            m, v = (torch.stack(t).cpu().double() for t in (means, variances))
            mean = (n * m).sum(0)
            variance = (n * (v + (m - mean).square())).sum(0)
            device = means[0].device
            self.found = mean.float().to(device), variance.float().to(device)
        return self.found


def mean_variance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both of each row, in float32, a few rows at a time: copies in float32 stay small. On the CPU
    one by one, in its caches: var_mean takes four times as long there."""
    if rows.is_cuda:
        parts = [torch.var_mean(part.float(), dim=1, correction=0) for part in rows.split(4)]
        variance, mean = (torch.cat(each) for each in zip(*parts, strict=True))
        return mean, variance
    found = []
    for row in rows:
        row = row.float()
        mean = row.mean()
        found.append(torch.stack((mean, (row - mean).square_().mean())))
    mean, variance = torch.stack(found).unbind(1)
    return mean, variance


class Rows:
    """A picture (1, C, H, W) kept as strips, from the top down; `moments` are those of what was
    appended, if `groups` are named."""

    def __init__(self, stream: "Stream", height: int, groups: int = 0):
        self.stream, self.height, self.groups = stream, height, groups
        self.moments = Moments()
        self.strips: list[tuple[int, Tensor]] = []
        self.end = 0

    def append(self, x: Tensor) -> None:
        if self.groups:
            self.moments.add(x, self.groups)
        # a view of a convolution's output would keep its halo alive too
        kept = x.cpu() if self.stream.how.host else x
        self.strips.append((self.end, kept.contiguous()))
        self.end += x.shape[2]

    def read(self, a: int, b: int) -> Tensor:
        parts = [
            t[:, :, max(0, a - at) : b - at]
            for at, t in self.strips
            if at < b and at + t.shape[2] > a
        ]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return x.to(self.stream.device)

    def drop(self, row: int) -> None:
        """Rows above this one are not read again."""
        self.strips = [(at, t) for at, t in self.strips if at + t.shape[2] > row]


class Lazy:
    """A picture that is computed when it is read. `drop` tells what it is computed from."""

    def __init__(self, height: int, read: Read, drop: Callable[[int], None], moments: Moments):
        self.height, self.read, self.drop, self.moments = height, read, drop, moments


def whole_groups(norm: nn.GroupNorm, moments: Moments, x: Tensor) -> Tensor:
    """norm(x) of a strip, with the statistics of the whole picture."""
    each = norm.num_channels // norm.num_groups
    mean, variance = (t.repeat_interleave(each) for t in moments.total())
    weight, bias = (p.to(x.device, torch.float32) for p in (norm.weight, norm.bias))
    return F.batch_norm(x, mean, variance, weight, bias, eps=norm.eps)


def beside(conv: Callable[[Tensor], Tensor], read: Read, height: int) -> Read:
    """A 3x3 convolution with padding 1, as rows. At a strip's edge it pads too: those rows come
    from the halo and are cut off."""

    def rows(a: int, b: int) -> Tensor:
        top, end = max(0, a - 1), min(height, b + 1)
        return conv(read(top, end)).narrow(2, a - top, b - a)

    return rows


class Stream:
    """One pass of one picture through a network."""

    def __init__(self, how: Streaming, like: Tensor, groups: int):
        self.how, self.groups = how, groups
        self.device, self.size = like.device, like.element_size()

    def strips(self, height: int, width: int, channels: int) -> Iterator[tuple[int, int]]:
        return self.how.strips(height, channels * width * self.size)

    def fill(self, read: Read, height: int, width: int, channels: int, done=None) -> Rows:
        """All rows of `read`, stored. `done(b)` is told when rows above b have been made."""
        out = Rows(self, height, self.groups)
        for a, b in self.strips(height, width, channels):
            out.append(read(a, b))
            if done:
                done(b)
        return out

    def measured(self, read: Read, drop, height: int, width: int, channels: int) -> Lazy:
        """The rows of `read`, computed once for their statistics and again when they are read."""
        moments = Moments()
        for a, b in self.strips(height, width, channels):
            moments.add(read(a, b), self.groups)
        return Lazy(height, read, drop, moments)

    def activated(self, norm: nn.GroupNorm, x: Rows | Lazy) -> Read:
        return lambda a, b: F.silu(whole_groups(norm, x.moments, x.read(a, b)), inplace=True)

    def resblock(self, block: ResBlock, x: Rows | Lazy, width: int) -> Rows:
        height, inputs, outputs = x.height, block.conv1.in_channels, block.conv1.out_channels
        shape = (height, width, max(inputs, outputs))
        first = beside(block.conv1, self.activated(block.norm1, x), height)
        shortcut = _shortcut(block, x)
        if self.how.lean:
            h = self.measured(first, lambda _: None, *shape)
        elif outputs < inputs:  # then the shortcut's result takes less room than x
            h, short = Rows(self, height, self.groups), Rows(self, height)
            for a, b in self.strips(*shape):
                h.append(first(a, b))
                short.append(shortcut(a, b))
                x.drop(b - 1)
            x, shortcut = short, short.read
        else:
            h = self.fill(first, *shape)
        second = beside(block.conv2, self.activated(block.norm2, h), height)

        def done(b: int) -> None:
            h.drop(b - 1)
            x.drop(b - 2)

        return self.fill(lambda a, b: second(a, b) + shortcut(a, b), *shape, done)

    def attention(self, block: AttnBlock, x: Rows, width: int) -> Rows:
        height, channels = x.height, block.q.in_channels
        length = height * width

        def rows(conv: nn.Module, a: int, b: int) -> Tensor:
            n = whole_groups(block.norm, x.moments, x.read(a, b))
            return rearrange(conv(n), "b c h w -> b 1 (h w) c")

        like = x.read(0, 1)
        k, v = (like.new_empty(1, 1, length, channels) for _ in range(2))
        for a, b in self.strips(height, width, channels):
            k[:, :, a * width : b * width] = rows(block.k, a, b)
            v[:, :, a * width : b * width] = rows(block.v, a, b)
        out = Rows(self, height, self.groups)
        # where a kernel writes the scores out, they take four strips at once in float32
        for a, b in self.how.strips(height, width * length):
            seen = block.attend(rows(block.q, a, b).contiguous(), k, v)
            seen = rearrange(seen, "b 1 (h w) c -> b c h w", w=width)
            out.append(x.read(a, b) + block.proj_out(seen))
            x.drop(b)
        return out

    def mid(self, mid: Mid, x: Rows | Lazy, width: int) -> Rows:
        x = self.resblock(mid.block_1, x, width)
        return self.resblock(mid.block_2, self.attention(mid.attn_1, x, width), width)

    def enlarge(self, up: Upsample, x: Rows | Lazy, width: int) -> Rows | Lazy:
        """`width` is that of the result."""
        height, channels = 2 * x.height, up.conv.in_channels

        def nearest(a: int, b: int) -> Tensor:
            low = x.read(a // 2, (b + 1) // 2)
            big = F.interpolate(low, scale_factor=2.0, mode="nearest")
            return big.narrow(2, a - a // 2 * 2, b - a)

        def drop(row: int) -> None:
            x.drop((row - 1) // 2)

        read, shape = beside(up.conv, nearest, height), (height, width, channels)
        if self.how.lean:
            return self.measured(read, drop, *shape)
        return self.fill(read, *shape, drop)

    def shrink(self, down: Downsample, x: Rows, width: int) -> Rows:
        """`width` is that of the result. The layer pads at the bottom; where there is a row below
        the strip, it is read and the padding reaches nothing."""
        return self.fill(
            lambda a, b: down(x.read(2 * a, min(2 * b + 1, x.height))),
            x.height // 2,
            width,
            4 * down.conv.in_channels,
            lambda b: x.drop(2 * b),
        )


def _shortcut(block: ResBlock, x: Rows | Lazy) -> Read:
    conv = block.nin_shortcut
    return x.read if conv is None else lambda a, b: conv(x.read(a, b))


def _levels(levels: Iterable[nn.Module]) -> Iterator[tuple[Level, list[ResBlock]]]:
    for level in levels:
        assert isinstance(level, Level)
        yield level, [block for block in level.block if isinstance(block, ResBlock)]


def encode(vae: AutoEncoder, pixels: Tensor, how: Streaming) -> Tensor:
    """`vae.encode(pixels)`: (B, 3, H, W) in [-1, 1] -> (B, 128, H / 16, W / 16), one by one."""
    check_pixels(pixels)
    means = torch.cat([_encode(vae, one, how) for one in pixels.split(1)])
    return normalise(pack(means), *vae.statistics())


def _encode(vae: AutoEncoder, pixels: Tensor, how: Streaming) -> Tensor:
    net, (height, width) = vae.encoder, pixels.shape[2:]
    stream = Stream(how, pixels, net.norm_out.num_groups)
    first = beside(net.conv_in, lambda a, b: pixels[:, :, a:b], height)
    x = stream.fill(first, height, width, net.conv_in.out_channels)
    for level, blocks in _levels(net.down):
        for block in blocks:
            x = stream.resblock(block, x, width)
        if level.downsample is not None:
            width //= 2
            x = stream.shrink(level.downsample, x, width)
    x = stream.mid(net.mid, x, width)
    last = beside(net.conv_out, stream.activated(net.norm_out, x), x.height)
    strips = stream.strips(x.height, width, net.conv_out.in_channels)
    moments = torch.cat([net.quant_conv(last(a, b)) for a, b in strips], 2)
    return moments[:, : vae.config.latent_channels]


def decode(vae: AutoEncoder, latents: Tensor, how: Streaming) -> Tensor:
    """`vae.decode(latents)`: (B, 128, h, w) -> (B, 3, 16 h, 16 w), one by one."""
    check_latents(latents, vae.config)
    b, _, h, w = latents.shape
    out = latents.new_empty(b, 3, 16 * h, 16 * w)
    for i, one in enumerate(latents.split(1)):
        _decode(vae, unpack(denormalise(one, *vae.statistics())), how, out[i : i + 1])
    return out


def _decode(vae: AutoEncoder, z: Tensor, how: Streaming, out: Tensor) -> None:
    net, (height, width) = vae.decoder, z.shape[2:]
    stream = Stream(how, z, net.norm_out.num_groups)
    z = net.post_quant_conv(z)
    first = beside(net.conv_in, lambda a, b: z[:, :, a:b], height)
    x: Rows | Lazy = stream.fill(first, height, width, net.conv_in.out_channels)
    x = stream.mid(net.mid, x, width)
    for level, blocks in _levels(reversed(net.up)):
        for block in blocks:
            x = stream.resblock(block, x, width)
        if level.upsample is not None:
            width *= 2
            x = stream.enlarge(level.upsample, x, width)
    last = beside(net.conv_out, stream.activated(net.norm_out, x), x.height)
    for a, b in stream.strips(x.height, width, net.conv_out.in_channels):
        out[:, :, a:b] = last(a, b)
        x.drop(b - 1)
