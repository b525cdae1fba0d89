"""From frames to multi-scale tokens: projection of the backbone's features and the deformable encoder (3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from instanceformer.model.attention import DeformableAttention, Levels, xavier_
from instanceformer.model.pyramid import Pyramid


@dataclass(frozen=True)
class FrameFeatures:
    """What the network knows about frames before it looks for instances; independent of any state.

    B clips of T frames; ``features[t]`` is one frame, without the dimension T.

    Attributes:
        tokens: (B, T, S, C) encoder output, all levels flattened.
        mask_features: (B, T, F, h, w) features of the mask head at its stride.
        looks: (B, T, channels, h, w) from which the looks of instances are pooled, at the mask head's stride; None if
            the option ``identity`` is ``none``.
        pyramid: of the B clips.
    """

    tokens: Tensor
    mask_features: Tensor
    looks: Tensor | None
    pyramid: Pyramid

    def __getitem__(self, t: int) -> FrameFeatures:
        looks = None if self.looks is None else self.looks[:, t]
        return FrameFeatures(self.tokens[:, t], self.mask_features[:, t], looks, self.pyramid)


class Projection(nn.Module):
    """Projects C3, C4 and C5 to C channels and adds coarser levels by strided convolution, the first from C5 itself.

    Args:
        channels: of C3, C4 and C5.
        dim: C, a multiple of 8; group norm has 32 groups if that divides C, otherwise 8.
        levels: number of levels, 3 to 5.
    """

    def __init__(self, channels: tuple[int, ...], dim: int, levels: int) -> None:
        super().__init__()
        inputs = [*channels, channels[-1], *[dim] * (levels - 4)][:levels]
        self.levels = nn.ModuleList(self._level(width, dim, strided=i >= 3) for i, width in enumerate(inputs))
        self.to(memory_format=torch.channels_last)  # like the backbone

    @staticmethod
    def _level(width: int, dim: int, strided: bool) -> nn.Sequential:
        conv = nn.Conv2d(width, dim, 3, stride=2, padding=1) if strided else nn.Conv2d(width, dim, 1)
        xavier_(conv)
        return nn.Sequential(conv, nn.GroupNorm(32 if dim % 32 == 0 else 8, dim))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C3, C4 and C5, (X, channels[l], H_l, W_l), to (X, C, H_l, W_l) of every level."""
        projected = [level(feature) for level, feature in zip(self.levels, features, strict=False)]
        coarser = features[-1]
        for level in self.levels[3:]:
            coarser = level(coarser)
            projected.append(coarser)
        return projected


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward network; layer norm after each."""

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
        super().__init__(expand, nn.ReLU(), nn.Dropout(dropout), contract)


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

    def forward(self, features: Sequence[Tensor], pyramid: Pyramid) -> Tensor:
        """Encode frames.

        Args:
            features: (X, C, H_l, W_l) projected features of every level.
            pyramid: of the X frames.

        Returns:
            (X, S, C) tokens.
        """
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        cells = [height * width for height, width in pyramid.levels.shapes]
        embedding = torch.cat([e.expand(n, -1) for e, n in zip(self.level_embedding, cells, strict=True)])
        position = pyramid.position + embedding
        for layer in self.layers:
            tokens = layer(tokens, position, pyramid.centers, pyramid.levels)
        return tokens
