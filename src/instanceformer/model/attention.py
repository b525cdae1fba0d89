"""Multi-head attention, deformable attention (Deformable DETR, equation 3), and sine positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deform_attn import Backend, fused_ms_deform_attn

WAVELENGTHS = 10_000.0
"""Ratio of the longest to the shortest wavelength of sine positions."""

Shapes = tuple[tuple[int, int], ...]
"""Height and width of every feature level, finest first."""


@dataclass(frozen=True)
class Levels:
    """What deformable attention needs to know about a feature pyramid's grids.

    Attributes:
        shapes: (height, width) of the L levels, finest first; S is the sum of their products.
        padded: (B, S) bool, true where a token is padding; None if nothing is.
    """

    shapes: Shapes
    padded: Tensor | None


class DeformableAttention(nn.Module):
    """Each query looks at a few learned points around its reference, on every level.

    Args:
        dim: channels C, divisible by ``heads``.
        heads: number of attention heads M.
        levels: number of feature levels L.
        points: sampling points P per head and level.

    Attributes:
        backend: the operator's backend, see ``ms_deform_attn``.
    """

    backend: Backend = "auto"

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be divisible by heads, found dim={dim} and heads={heads}")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Every head starts out looking in a direction of its own, with its points 1, 2, ... cells away."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.points + 1)
        grid = directions[:, None, None, :] * distances[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        xavier_(self.value_proj)
        xavier_(self.output_proj)

    def forward(self, query: Tensor, reference: Tensor, tokens: Tensor, levels: Levels) -> Tensor:
        """Attend; sampling locations and softmax are computed in float32, whatever the precision of the rest.

        Args:
            query: (B, Q, C) content plus position.
            reference: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes cxcywh, as fractions of each padded level.
            tokens: (B, S, C) flattened feature levels; padded ones contribute nothing.
            levels: their grids.

        Returns:
            (B, Q, C)
        """
        batch, queries, _ = query.shape
        query = narrowed(query)
        value = self.value_proj(tokens)
        if levels.padded is not None:
            value = value.masked_fill(levels.padded[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        points = (batch, queries, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*points, 2)
        logits = self.attention_weights(query).view(points)
        attended = fused_ms_deform_attn(value, levels.shapes, reference, offsets, logits, backend=self.backend)
        result: Tensor = self.output_proj(attended)
        return result


class Attention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention``.

    Inputs are multiplied by the whole of ``in_proj_weight``, and outputs that are not needed are dropped: slices of a
    weight would be cast again in every call under autocast, and their gradients would have to be put back together.

    Args:
        dim: channels C, divisible by ``heads``.
        heads: number of attention heads.
        dropout: dropout probability of the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        xavier_(self.out_proj)

    def project(self, x: Tensor, bias: bool = True) -> tuple[Tensor, ...]:
        """Project (..., C) to query, key and value, each (..., C), not yet split into heads."""
        return F.linear(x, self.in_proj_weight, self.in_proj_bias if bias else None).chunk(3, dim=-1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
        """Attend with projected queries, keys and values.

        Args:
            query: (B, N, C).
            key: (B, S, C).
            value: (B, S, C).
            seen: (B, S) bool, the keys to attend to, at least one per batch item; None: all.

        Returns:
            (B, N, C)
        """
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        mask = None if seen is None else seen[:, None, None].expand(-1, -1, query.shape[2], -1)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        result: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return result


def narrowed(x: Tensor) -> Tensor:
    """Cast to autocast's precision, if it is on: once, for what enters several products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def xavier_(layer: nn.Linear | nn.Conv2d) -> None:
    """Initialize with Glorot and Bengio's uniform weights and zero bias, as Deformable-DETR's transformer does."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def sine_position(coordinates: Tensor, dim: int) -> Tensor:
    """Interleaved sines and cosines of scalar coordinates.

    Args:
        coordinates: (...) numbers, in radians of the fastest sine.
        dim: even number of channels.

    Returns:
        (..., dim) float32, alternating sin and cos, with wavelengths from 2 pi to ``WAVELENGTHS`` times 2 pi.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=coordinates.device) / dim
    angles = coordinates.float()[..., None] / WAVELENGTHS**exponent
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def pixel_position(valid: Tensor, dim: int) -> Tensor:
    """Position of every cell of a feature map, relative to the valid part of its image.

    Args:
        valid: (B, H, W) bool, true in a rectangle at the top left, false where padded.
        dim: number of channels, divisible by 4.

    Returns:
        (B, H, W, dim) float32, the first half for y, the second for x. Cell centers are spread evenly over (0, 2 pi).
    """
    axes = []
    for present in (valid.any(dim=2), valid.any(dim=1)):  # rows, columns
        count = present.cumsum(1, dtype=torch.float32)
        axes.append(sine_position((count - 0.5) / (count[:, -1:] + 1e-6) * (2 * math.pi), dim // 2))
    rows, columns = axes
    shape = (*valid.shape, dim // 2)
    return torch.cat((rows[:, :, None].expand(shape), columns[:, None].expand(shape)), dim=-1)
