"""What bends a forward pass, and what travels through its blocks."""

from collections.abc import Hashable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from .attention import attend, attend_segments
from .kv_cache import Kept, Recorder, ReferenceCache
from .layers import Modulation
from .negatives import Both, Negative
from .step_cache import Call, StepCache
from .visibility import Layout, ReferenceControl, RegionPrompt


@dataclass(frozen=True, eq=False)
class Controls:
    """What bends the stock forward pass; None, or every field at its default, is stock.

    `kv_references`: references see references only and are modulated at t = 0; None follows the
    model's config. `still`: references are modulated at t = 0 though they see everything.
    `references` is parallel to the references, missing ones are stock. `regions`
    are prompts for parts of the picture; with `isolate` what lies outside the regions does not
    look inside. `cache` keeps the references' keys and values between steps; `about` is what else
    they depend on (positions, for a host that bends them), `call` what else tells one of several
    calls a step from the others. `origin`: row and column of the first token of a window of a larger
    picture. `steps` reuses what the blocks did in earlier steps. `negative` steers away from a text.
    """

    kv_references: bool | None = None
    references: tuple[ReferenceControl, ...] = ()
    regions: tuple[RegionPrompt, ...] = ()
    isolate: bool = False
    still: bool = False
    cache: ReferenceCache | None = None
    about: Hashable = None
    call: Hashable = None
    origin: tuple[int, int] = (0, 0)
    steps: StepCache | None = None
    negative: Negative | None = None

    @property
    def settings(self) -> tuple:
        """All that bends the pass, without the handles."""
        handles = ("cache", "steps")
        return tuple(getattr(self, f.name) for f in fields(Controls) if f.name not in handles)


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
    layout: Layout
    size: tuple[int, int]
    memory: Kept | Recorder | None = (
        None  # the references' keys and values, from or for other steps
    )
    reuse: Call | None = None  # what the blocks did in other steps
    both: Both | None = None  # attention with the prompt and with a negative

    @property
    def text(self) -> int:
        return self.layout.text

    @property
    def picture(self) -> int:
        return self.layout.picture

    @property
    def rows(self) -> Tensor:
        """The picture's rows (B, L, h) after the blocks: all there are, or cut out of the sequence."""
        whole = self.img.shape[1] != self.picture
        return self.img[:, self.text : self.text + self.picture] if whole else self.img

    def known(self, before: Tensor) -> Tensor | None:
        """After the first block, whose input `before` was: the picture's rows after the last one,
        where they are near enough to earlier steps'."""
        if self.reuse is None:
            return None
        first, last = before[:, : self.picture], self.img[:, : self.picture]
        return self.reuse.reuse(first, last, compute=isinstance(self.memory, Recorder))

    def attention(self, block: int, attend=attend):
        """The attention callable of a block, double blocks counted first."""
        return partial(self._attend, block, attend)

    def _attend(self, block: int, attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if isinstance(self.memory, Recorder) and self.layout.references:
            own = slice(k.shape[2] - self.layout.references, None)
            self.memory.put(block, k[:, :, own], v[:, :, own])
        elif isinstance(self.memory, Kept):
            known = self.memory.get(block, k)
            k, v = (
                torch.cat((new, old.expand(len(new), -1, -1, -1)), 2)
                for new, old in zip((k, v), known, strict=True)
            )
        if not q.shape[2]:
            return v.new_empty(len(v), 0, v.shape[1] * v.shape[3])
        table = self.layout.last if q.shape[2] == self.layout.picture else self.layout.table
        if table is None:
            return attend(q, k, v)
        if self.both is not None:
            return self.both(q, k, v, table, attend)
        return attend_segments(q, k, v, table, attend)
