"""Sine position codes: of pixels (Deformable-DETR's) and of the age of memory tokens (Attention Is All You Need)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0


def sine_position(coordinates: Tensor, dim: int) -> Tensor:
    """Interleaved sines and cosines of scalar coordinates.

    Args:
        coordinates: (...) float, in radians of the fastest sine.
        dim: even number of channels.

    Returns:
        (..., dim) float32: sin and cos in turn, wavelengths from 2 pi to ``TEMPERATURE`` times 2 pi.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=coordinates.device) / dim
    angles = coordinates.float()[..., None] / TEMPERATURE**exponent
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def pixel_position(valid: Tensor, dim: int) -> Tensor:
    """Position of every cell of a feature map, relative to the valid part of its image.

    Args:
        valid: (B, H, W) bool, true in a rectangle at the top left, false where padded.
        dim: number of channels, divisible by 4.

    Returns:
        (B, H, W, dim) float32, the first half for y, the second for x. Cell centres run over (0, 2 pi).
    """
    axes = []
    for present in (valid.any(dim=2), valid.any(dim=1)):  # rows, columns
        count = present.cumsum(1, dtype=torch.float32)
        axes.append(sine_position((count - 0.5) / (count[:, -1:] + 1e-6) * (2 * math.pi), dim // 2))
    rows, columns = axes
    shape = (*valid.shape, dim // 2)
    return torch.cat((rows[:, :, None].expand(shape), columns[:, None].expand(shape)), dim=-1)
