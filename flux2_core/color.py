"""Colour as the eye sees it: CIE Lab and the difference CIEDE2000.

Source: IEC 61966-2-1 (sRGB), CIE 15 (Lab, D65), Sharma, Wu and Dalal 2005 (CIEDE2000).
"""

import math

import torch
from torch import Tensor

_XYZ = (  # linear sRGB -> XYZ under D65
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_WHITE = (0.95047, 1.0, 1.08883)


def linear(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> linear light."""
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0) + 0.055) / 1.055) ** 2.4)


def lab(rgb: Tensor) -> Tensor:
    """sRGB (..., 3) in [0, 1] -> L in [0, 100], a, b."""
    xyz = linear(rgb.float()) @ rgb.new_tensor(_XYZ, dtype=torch.float32).T
    xyz = xyz / xyz.new_tensor(_WHITE)
    low = xyz <= (6 / 29) ** 3
    f = torch.where(low, xyz * (29 / 6) ** 2 / 3 + 4 / 29, xyz.clamp_min(1e-9) ** (1 / 3))
    x, y, z = f.unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


def delta_e(a: Tensor, b: Tensor) -> Tensor:
    """CIEDE2000 between two sRGB pictures (..., 3) in [0, 1]; 1 is about the least one can see."""
    return ciede2000(lab(a), lab(b))


def ciede2000(one: Tensor, two: Tensor) -> Tensor:
    """CIEDE2000 between Lab colours (..., 3), all three weights 1."""
    l1, a1, b1 = one.unbind(-1)
    l2, a2, b2 = two.unbind(-1)
    chroma = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * _seventh(chroma)
    c1, h1 = torch.hypot(stretch * a1, b1), _hue(stretch * a1, b1)
    c2, h2 = torch.hypot(stretch * a2, b2), _hue(stretch * a2, b2)
    turn = torch.remainder(h2 - h1 + math.pi, 2 * math.pi) - math.pi
    gray = (c1 * c2) == 0
    turn = torch.where(gray, 0, turn)
    apart = 2 * (c1 * c2).sqrt() * torch.sin(turn / 2)
    hue = torch.where(gray, h1 + h2, torch.remainder(h1 + turn / 2, 2 * math.pi))
    light, c = (l1 + l2) / 2, (c1 + c2) / 2

    def wave(k: int, degrees: float) -> Tensor:
        return torch.cos(k * hue + math.radians(degrees))

    t = 1 - 0.17 * wave(1, -30) + 0.24 * wave(2, 0) + 0.32 * wave(3, 6) - 0.20 * wave(4, -63)
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / (20 + (light - 50) ** 2).sqrt())
    dc = (c2 - c1) / (1 + 0.045 * c)
    dh = apart / (1 + 0.015 * c * t)
    bump = torch.exp(-(((torch.rad2deg(hue) - 275) / 25) ** 2))
    rotation = -2 * _seventh(c) * torch.sin(math.radians(60) * bump)
    return (dl**2 + dc**2 + dh**2 + rotation * dc * dh).clamp_min(0).sqrt()


def _seventh(c: Tensor) -> Tensor:
    return (c**7 / (c**7 + 25.0**7)).sqrt()


def _hue(a: Tensor, b: Tensor) -> Tensor:
    return torch.remainder(torch.atan2(b, a), 2 * math.pi)
