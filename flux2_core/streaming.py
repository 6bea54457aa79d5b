"""A transformer larger than the device: its blocks pass through two buffers, one after the other.

The weights stay where they were loaded, mapped from the file for instance. While a block computes,
the next one is copied; results are those of the whole model, bit for bit (on a card where `bench tune`
chose float16 sums, of the whole model without them). For library use: inside ComfyUI the host moves
weights.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .quantised import QuantLinear
from .transformer import Flux2Transformer

ALIGN = 256  # bytes between the starts of two tensors in a buffer


def stream(model: Flux2Transformer, device: torch.device | str) -> Flux2Transformer:
    """Everything but the blocks goes to `device`; blocks are copied there as they are needed.

    In place. Two buffers of the largest block are all that the blocks take on the device.
    """
    device = torch.device(device)
    blocks = [*model.double_blocks, *model.single_blocks]
    buffers = _Buffers(blocks, device)
    double = len(model.double_blocks)
    for i, block in enumerate(blocks):
        held = model.double_blocks if i < double else model.single_blocks
        held[i if i < double else i - double] = Streamed(block, i, buffers)
        for layer in block.modules():
            if isinstance(layer, QuantLinear):
                layer.rebases = False  # what it holds while it runs is a copy
    for name, child in model.named_children():
        if name not in ("double_blocks", "single_blocks"):
            child.to(device)
    return model


class Streamed(nn.Module):
    """A block whose weights are on the device only while it runs. It looks like the block: its
    state dict is the block's."""

    def __init__(self, block: nn.Module, number: int, buffers: "_Buffers"):
        super().__init__()
        self._modules = block._modules  # names in state dicts stay the checkpoint's
        self.inner, self.number, self.shelf = (block,), number, buffers

    def forward(self, *args, **kw):
        weights = self.shelf.take(self.number)
        out = functional_call(self.inner[0], weights, args, kw)
        self.shelf.done(self.number)
        return out

    def _apply(self, fn, recurse: bool = True):
        return self  # a move of the model leaves the blocks where they are


class _Buffers:
    """Two stretches of device memory; block i lies in number i % 2."""

    def __init__(self, blocks: list[nn.Module], device: torch.device):
        self.tensors = [dict(_tensors(block)) for block in blocks]
        size = max(sum(map(_span, tensors.values())) for tensors in self.tensors)
        self.memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds = [-1, -1]
        cuda = device.type == "cuda"
        self.copies = torch.cuda.Stream(device) if cuda else None
        self.there = [torch.cuda.Event() for _ in range(2)] if cuda else None
        self.free = [torch.cuda.Event() for _ in range(2)] if cuda else None

    def take(self, i: int) -> dict[str, Tensor]:
        """Block i's weights on the device, the next block's on the way."""
        self._copy(i)
        if i + 1 < len(self.tensors):
            self._copy(i + 1)
        if self.there is not None:
            torch.cuda.current_stream(self.memory[0].device).wait_event(self.there[i % 2])
        return dict(self._views(i))

    def done(self, i: int) -> None:
        """Block i's work is queued: its buffer may be written again once that has run."""
        if self.free is not None:
            self.free[i % 2].record(torch.cuda.current_stream(self.memory[0].device))

    def _copy(self, i: int) -> None:
        side = i % 2
        if self.holds[side] == i:
            return
        self.holds[side] = i
        if self.copies is None or self.free is None or self.there is None:
            self._write(i)
            return
        self.copies.wait_event(self.free[side])
        with torch.cuda.stream(self.copies):
            self._write(i)
            self.there[side].record(self.copies)

    def _write(self, i: int) -> None:
        for name, view in self._views(i):
            view.copy_(self.tensors[i][name], non_blocking=True)

    def _views(self, i: int) -> Iterator[tuple[str, Tensor]]:
        """Block i's tensors as parts of its buffer."""
        start, memory = 0, self.memory[i % 2]
        for name, tensor in self.tensors[i].items():
            part = memory[start : start + tensor.numel() * tensor.element_size()]
            yield name, part.view(tensor.dtype).reshape(tensor.shape)
            start += _span(tensor)


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p.detach()) for name, p in block.named_parameters())
    yield from block.named_buffers()


def _span(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN
