"""The memory decoder (3.3): self-, deformable and memory attention, feed-forward; boxes are refined in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from instanceformer.model.attention import Attention, DeformableAttention, narrowed
from instanceformer.model.encoder import FeedForward, FrameFeatures
from instanceformer.model.heads import box_head, class_head
from instanceformer.model.identity import Sighting
from instanceformer.model.memory import MemoryAttention, MemoryTokens
from instanceformer.model.propagation import logit
from instanceformer.model.state import gather_queries


@dataclass(frozen=True)
class FramePrediction:
    """All queries at one frame, after each of the D decoder layers.

    Attributes:
        logits: (D, B, N, K) class logits; the class prior is applied to the last layer's.
        boxes: (D, B, N, 4) cxcywh as fractions of the clip's own size.
        queries: (D, B, N, C) content.
        centers: (D, B, N, 2) location from which each layer started, (x, y) in [0, 1]; the origin of the mask head's
            relative coordinates.
        class_logits: (B, N, K) the last layer's, before the class prior; the state keeps these.
        references: (B, N, 2) ref_t of equation 1.
        sighting: whose instances the queries show; None if the option ``identity`` is ``none``.
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor
    centers: Tensor
    class_logits: Tensor
    references: Tensor
    sighting: Sighting | None = None

    @property
    def scores(self) -> Tensor:
        """(B, N, K) class probabilities of the last layer, times the probability that a known instance is seen."""
        scores = self.logits[-1].float().sigmoid()
        return scores if self.sighting is None else scores * self.sighting.presence[..., None]

    def permuted(self, order: Tensor) -> FramePrediction:
        """Swap queries: row i becomes what query order[i] found. ``order``, (B, N) int64, is its own inverse."""
        layers = {name: gather_layers(getattr(self, name), order) for name in ("logits", "boxes", "queries", "centers")}
        return FramePrediction(
            **layers,
            class_logits=gather_queries(self.class_logits, order),
            references=gather_queries(self.references, order),
            sighting=self.sighting and self.sighting.permuted(order),
        )


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the frame, memory attention, feed-forward network."""

    def __init__(
        self,
        dim: int,
        heads: int,
        levels: int,
        points: int,
        feedforward_dim: int,
        dropout: float,
        memory: bool,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads, dropout)
        self.norm_self = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, levels, points)
        self.norm_cross = nn.LayerNorm(dim)
        self.memory_attention = MemoryAttention(dim, heads, dropout) if memory else None
        self.feedforward = FeedForward(dim, feedforward_dim, dropout)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        reference: Tensor,
        features: FrameFeatures,
        memory: MemoryTokens | None,
    ) -> Tensor:
        """(B, N, C) queries to (B, N, C); ``reference`` is (B, N, L, 2 or 4), as fractions of each padded level."""
        query, key, value = self.self_attention.project(queries)
        query_position, key_position, _ = self.self_attention.project(position, bias=False)
        attended = self.self_attention.attend(query + query_position, key + key_position, value)
        queries = self.norm_self(queries + self.dropout(attended))
        located = self.located(queries, position)
        attended = self.cross_attention(located, reference, features.tokens, features.pyramid.levels)
        queries = self.norm_cross(queries + self.dropout(attended))
        if self.memory_attention is not None and memory is not None:
            queries = self.memory_attention(queries, position, memory)
        result: Tensor = self.norm_feedforward(queries + self.dropout(self.feedforward(queries)))
        return result

    def located(self, queries: Tensor, position: Tensor) -> Tensor:
        """(B, N, C) from which deformable attention predicts where to look."""
        return queries + position


class Decoder(nn.Module):
    """A stack of DecoderLayers, each with its own class and box head.

    Args:
        layers: the D layers, first to last.
        dim: channels C.
        num_classes: classes K.
    """

    def __init__(self, layers: Sequence[DecoderLayer], dim: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.class_heads = nn.ModuleList(class_head(dim, num_classes) for _ in layers)
        self.box_heads = nn.ModuleList(box_head(dim, first=i == 0) for i in range(len(layers)))

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        references: Tensor,
        features: FrameFeatures,
        memory: MemoryTokens | None,
    ) -> FramePrediction:
        """Decode one frame.

        Args:
            queries: (B, N, C) content to start from.
            position: (N, C) position embedding.
            references: (B, N, 2) float32, as fractions of the clip's own size.
            features: of one frame.
            memory: tokens of earlier frames; None for a network without memory.

        Returns:
            The prediction, without the class prior.
        """
        ratios = features.pyramid.valid_ratios[:, None]
        reference = references
        all_logits, all_boxes, all_queries, all_centers = [], [], [], []
        for layer, classify, refine in zip(self.layers, self.class_heads, self.box_heads, strict=True):
            scale = ratios if reference.shape[-1] == 2 else torch.cat((ratios, ratios), dim=-1)
            queries = layer(queries, position, reference[:, :, None] * scale, features, memory)
            seen = narrowed(queries)
            change = refine(seen).float()
            located = logit(reference)
            if reference.shape[-1] == 2:
                boxes = torch.cat((change[..., :2] + located, change[..., 2:]), dim=-1).sigmoid()
            else:
                boxes = (change + located).sigmoid()
            all_logits.append(classify(seen).float())
            all_boxes.append(boxes)
            all_queries.append(queries)
            all_centers.append(reference[..., :2])
            reference = boxes.detach()
        return FramePrediction(
            logits=torch.stack(all_logits),
            boxes=torch.stack(all_boxes),
            queries=torch.stack(all_queries),
            centers=torch.stack(all_centers),
            class_logits=all_logits[-1],
            references=references,
        )


def gather_layers(x: Tensor, queries: Tensor) -> Tensor:
    """Rows of the chosen queries: (D, B, N, C) at (B, n) or (D, B, n) int64 indices: (D, B, n, C)."""
    return x.gather(2, queries.expand(x.shape[0], -1, -1)[..., None].expand(-1, -1, -1, x.shape[-1]))
