"""From frames to multi-scale tokens: projection of the backbone's features and the deformable encoder (3.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from instanceformer.model.attention import DeformableAttention, Levels, Shapes, xavier_
from instanceformer.model.position import pixel_position

STRIDES = (8, 16, 32, 64, 128)
"""Stride in pixels of every feature level, finest first; three come from the backbone, the rest are added to it."""


@dataclass(frozen=True)
class FrameFeatures:
    """What the network knows of frames before it looks for instances; stateless.

    B clips of T frames; ``features[t]`` is one frame, without the dimension T.

    Attributes:
        tokens: (B, T, S, C) encoder output, all levels flattened.
        mask_features: (B, T, F, h, w) features of the mask head at its stride.
        levels: grids of the L levels of the tokens.
        valid_ratios: (B, L, 2) float32, fraction (x, y) of each level that is not padding.
        sizes: (B, 2) float32, (width, height) in pixels of the clips without padding.
        grid: (height, width) of the mask logits: a quarter of the padded frames' size, rounded up.
    """

    tokens: Tensor
    mask_features: Tensor
    levels: Levels
    valid_ratios: Tensor
    sizes: Tensor
    grid: tuple[int, int]

    def __getitem__(self, t: int) -> FrameFeatures:
        return FrameFeatures(
            self.tokens[:, t],
            self.mask_features[:, t],
            self.levels,
            self.valid_ratios,
            self.sizes,
            self.grid,
        )


class Projection(nn.Module):
    """Brings C3 to C5 to C channels and adds coarser levels by strided convolution, the first of them from C5 itself.

    Args:
        channels: of C3, C4 and C5.
        dim: C, divisible by the number of groups of the normalisation.
        levels: 3 to 5.
    """

    def __init__(self, channels: tuple[int, ...], dim: int, levels: int) -> None:
        super().__init__()
        inputs = [*channels, channels[-1], *[dim] * (levels - 4)][:levels]
        self.levels = nn.ModuleList(self._level(width, dim, strided=i >= 3) for i, width in enumerate(inputs))
        self.to(memory_format=torch.channels_last)  # as the backbone

    @staticmethod
    def _level(width: int, dim: int, strided: bool) -> nn.Sequential:
        conv = nn.Conv2d(width, dim, 3, stride=2, padding=1) if strided else nn.Conv2d(width, dim, 1)
        xavier_(conv)
        return nn.Sequential(conv, nn.GroupNorm(32 if dim % 32 == 0 else 8, dim))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """(X, channels[l], H_l, W_l) of C3 to C5 give (X, C, H_l, W_l) of every level."""
        projected = [level(feature) for level, feature in zip(self.levels, features, strict=False)]
        coarser = features[-1]
        for level in self.levels[3:]:
            coarser = level(coarser)
            projected.append(coarser)
        return projected


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward network; normalised after each."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = DeformableAttention(dim, heads, levels, points)
        self.norm_attention = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim, dropout)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, levels: Levels) -> Tensor:
        """Refine (X, S, C) tokens; arguments as in DeformableAttention."""
        attended = self.self_attention(tokens + position, reference, tokens, levels)
        tokens = self.norm_attention(tokens + self.dropout(attended))
        result: Tensor = self.norm_feedforward(tokens + self.dropout(self.feedforward(tokens)))
        return result


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear: (..., C) to (..., C)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        expand, contract = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for layer in (expand, contract):
            xavier_(layer)
        super().__init__(expand, nn.ReLU(inplace=True), nn.Dropout(dropout), contract)


class Encoder(nn.Module):
    """Level embedding, positions and a stack of EncoderLayers."""

    def __init__(
        self, dim: int, layers: int, heads: int, levels: int, points: int, feedforward_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.level_embedding = nn.Parameter(torch.randn(levels, dim))
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, levels, points, feedforward_dim, dropout) for _ in range(layers)
        )

    def forward(self, features: list[Tensor], valid: list[Tensor], levels: Levels, valid_ratios: Tensor) -> Tensor:
        """Encode frames.

        Args:
            features: (X, C, H_l, W_l) projected, of X = B T frames, a clip's frames next to each other.
            valid: (B, H_l, W_l) bool of each level.
            levels: grids, of B clips.
            valid_ratios: (B, L, 2) float32.

        Returns:
            (X, S, C) tokens.
        """
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        frames, dim = tokens.shape[0] // valid_ratios.shape[0], tokens.shape[-1]
        position = torch.cat(
            [
                pixel_position(mask, dim).flatten(1, 2) + embedding
                for mask, embedding in zip(valid, self.level_embedding, strict=True)
            ],
            dim=1,
        )
        reference = cell_centres(levels.shapes, valid_ratios)
        position, reference = (x.repeat_interleave(frames, dim=0) for x in (position, reference))
        if levels.padded is not None:
            levels = replace(levels, padded=levels.padded.repeat_interleave(frames, dim=0))
        for layer in self.layers:
            tokens = layer(tokens, position, reference, levels)
        return tokens


def cell_centres(shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Centre of every cell of every level, seen from every level.

    Args:
        shapes: (height, width) of the L levels.
        valid_ratios: (B, L, 2) float32.

    Returns:
        (B, S, L, 2) float32, (x, y) as fractions of each padded level; beyond 1 outside the valid part.
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, dtype=torch.float32, device=valid_ratios.device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=valid_ratios.device) + 0.5) / width
        grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(0, 1)
        centres.append(grid / valid_ratios[:, level, None])
    return torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]
