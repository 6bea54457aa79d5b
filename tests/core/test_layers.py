"""What the transformer's small parts cost and what they hand back to training."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.layers import swiglu
from flux2_pack.flux2_core.positions import rope, rotate, sequence_ids
from flux2_pack.flux2_core.transformer import Flux2Transformer


def gradient(function, x):
    """function(x) and the gradient of its weighted sum."""
    x = x.clone().requires_grad_()
    y = function(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return y.detach(), x.grad


def plainly_rotated(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


@pytest.mark.parametrize("batched", [False, True], ids=["table", "table for each picture"])
def test_rotate(batched):
    """Against sums of products, forward and backward; x as attention holds it, heads inside."""
    cos, sin = rope(sequence_ids(3, (2, 4)), (32, 32, 32, 32), 2000)
    if batched:
        cos, sin = (torch.stack((t, t.flip(0)))[:, None] for t in (cos, sin))
    x = torch.randn(2, 11, 3, 128, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    ours, wanted = (gradient(lambda x, f=f: f(x, cos, sin), x) for f in (rotate, plainly_rotated))
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-6  # 2.4e-7
    half = rotate(x.bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16 and half.is_contiguous()
    assert torch.equal(half, rotate(x.bfloat16().float(), cos, sin).bfloat16())


def test_swiglu():
    """With and without a gradient, and without touching its input."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()

    def plain(x):
        return torch.nn.functional.silu(x[..., :4]) * x[..., 4:]

    (ours, slope), (wanted, wanted_slope) = gradient(swiglu, x), gradient(plain, x)
    assert torch.equal(ours, wanted) and torch.equal(slope, wanted_slope)
    assert torch.equal(swiglu(x), wanted) and torch.equal(x, before)


@pytest.mark.parametrize("batch", [1, 2])
def test_every_linear_layer_is_one_matrix_product(batch):
    """On a slice of rows PyTorch runs a batched product instead, and copies the weight for it."""
    config = TransformerConfig(256, 96, 1, 2, guidance_embed=False)
    model = Flux2Transformer(config).requires_grad_(False)
    x, context = torch.randn(batch, 128, 4, 4), torch.randn(batch, 7, 96)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        model(x, torch.full((batch,), 0.5), context, references=[x, x])
    names = [event.name for event in seen.events()]
    assert "aten::mm" in names and "aten::bmm" not in names
