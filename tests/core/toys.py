"""A random FLUX.2 at toy size, and inputs for it."""

import torch

from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.transformer import Flux2Transformer

DEV = TransformerConfig(256, 96, 2, 3, guidance_embed=True)
KLEIN = TransformerConfig(256, 96, 2, 3, guidance_embed=False)
SIZES = [(6, 10), (4, 4), (8, 3), (1, 5), (2, 2), (3, 3), (4, 2), (2, 4), (5, 1), (1, 1)]
TEXT = 7


def toy(config: TransformerConfig, seed: int = 0) -> Flux2Transformer:
    """Random weights that keep every activation near 1, so that no term hides behind another."""
    model = Flux2Transformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(
            1 + 0.1 * noise if parameter.ndim == 1 else noise / parameter.shape[1] ** 0.5
        )
    return model


def inputs(references: int, size=(5, 7), batch: int = 1, seed: int = 1, guidance=None) -> dict:
    """What our forward takes; `references` of sizes that differ, one set for each picture."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 128, *size, generator=g),
        "timestep": torch.tensor([0.767, 0.301, 0.55, 0.9, 0.1, 0.4])[:batch],
        "context": torch.randn(batch, TEXT, DEV.context_dim, generator=g),
        "guidance": None
        if guidance is None
        else torch.tensor([guidance, 2.5, 1.5, 3.5, 4.5, 5.5])[:batch],
        "references": [torch.randn(batch, 128, *s, generator=g) for s in SIZES[:references]],
    }


def decibels(made: torch.Tensor, right: torch.Tensor) -> float:
    """Signal to noise: `right` over what `made` differs by, in float64."""
    right = right.double()
    return 10 * ((right.square().sum() / (made.double() - right).square().sum()).log10()).item()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over b's standard deviation."""
    return ((a - b).abs().max() / b.std()).item()
