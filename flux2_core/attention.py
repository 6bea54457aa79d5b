"""Joint attention over [text, picture, references].

Every attention call of the transformer goes through one callable (q, k, v) -> out, so that a host
can put its own kernels and patches there.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, cat


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, Q, D), (B, H, K, D), (B, H, K, D) -> (B, Q, H * D); softmax scale 1 / sqrt(D), no mask."""
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h q d -> b q (h d)")


def attend_isolated(q: Tensor, k: Tensor, v: Tensor, references: int, attend=attend) -> Tensor:
    """The last `references` queries see the last `references` keys only; all others see every key.

    Two calls and no mask: exact, and cheaper than one (source: klein KV, reference implementation).
    `q` may lack the reference rows (the last block, where nobody reads them).
    """
    rest = q.shape[2] - references
    out = attend(q[:, :, :rest], k, v)
    if not references:
        return out
    ref = attend(q[:, :, rest:], k[:, :, -references:], v[:, :, -references:])
    return cat((out, ref), 1)
