"""Counts the bytes of the tensors that a computation holds, operation by operation."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active: `live`, the bytes of storages that operations have made and that something
    still holds, and `peak`, the most there were after any operation.

    Storages that were there before (weights, inputs) do not count, nor does what a kernel
    allocates and frees inside itself.
    """

    def __init__(self):
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak, self.at = 0, ""

    @property
    def live(self) -> int:
        return sum(size for ref, size in self.held.values() if not ref.expired())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forget()
        for tensor in tensors((args, kwargs)):
            self.note(tensor, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            self.note(tensor, tensor.untyped_storage().nbytes())
        if (live := self.live) > self.peak:
            self.peak, self.at = live, f"{func} {[tuple(t.shape) for t in tensors(out)]}"
        return out

    def note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        self.held.setdefault(storage._cdata, (StorageWeakRef(storage), size))

    def forget(self) -> None:
        """Drop storages that are gone: a new one may come to stand at the same address."""
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(call) -> int:
    """The most bytes that `call()` holds beyond what was there before."""
    with torch.inference_mode(), LiveBytes() as counter:
        call()
    return counter.peak
