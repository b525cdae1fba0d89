"""Memory attention (3.3): tokens from earlier frames (equation 3) and attention to them (equation 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from instanceformer.model.attention import Attention, narrowed, sine_position, xavier_
from instanceformer.model.state import TrackState, push


@dataclass(frozen=True)
class MemoryTokens:
    """The memory as one frame sees it: values are the tokens, keys are the tokens plus their temporal index.

    Attributes:
        values: (B, d k, C) tokens.
        index: (B, d k, C) temporal index.
        filled: (B, d k) bool, false for empty slots.
    """

    values: Tensor
    index: Tensor
    filled: Tensor


class Memory(nn.Module):
    """Reads the queue: projects its tokens (equation 3) and computes their temporal index.

    The paper: m_f = W_m_proj(sg(q_f, b_f, c_f)), where sg stops gradients.
    Ours: m = W_m([q, class scores, box]), of inputs without gradient. W_m learns because a token is projected when it
    is read, not when it is written. The temporal index is the position embedding of the query that wrote the token,
    plus a sine encoding of the frame's age, t - f.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim + num_classes + 4, dim)
        xavier_(self.projection)

    def forward(self, state: TrackState, position: Tensor) -> MemoryTokens:
        """Read the memory.

        Args:
            state: holds the queue, d frames of k tokens each.
            position: (N, C) position embeddings of the queries.
        """
        inputs = torch.cat((state.memory_queries, state.memory_scores, state.memory_boxes), dim=-1)
        values = self.projection(inputs)
        index = position[state.memory_indices] + self.frame_codes(state.memory_filled, position.shape[-1])[:, :, None]
        return MemoryTokens(
            values=narrowed(values).flatten(1, 2),
            index=narrowed(index).flatten(1, 2),
            filled=state.memory_filled.flatten(1, 2),
        )

    def frame_codes(self, filled: Tensor, dim: int) -> Tensor:
        """Encoding of each frame in the queue, newest first: (B, d, k) bool to (1 or B, d, C)."""
        return sine_position(torch.arange(1, filled.shape[1] + 1, device=filled.device), dim)[None]


class MemoryAttention(nn.Module):
    """Cross-attention from queries to memory, then normalization (equation 4).

    The paper: q_t = Attn(q_t, M_t). Ours: the same, with the temporal index in the keys and not in the values; where
    the memory is empty, queries pass through unchanged.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, position: Tensor, memory: MemoryTokens) -> Tensor:
        """(B, N, C) queries and their (N, C) position embeddings to (B, N, C)."""
        anything = memory.filled.any(dim=1, keepdim=True)
        seen = memory.filled | ~anything  # all of it if it is empty: a softmax over nothing is NaN
        query, _, _ = self.attention.project(queries + position)
        _, key, value = self.attention.project(memory.values)
        _, index, _ = self.attention.project(memory.index, bias=False)
        updated = self.norm(queries + self.dropout(self.attention.attend(query, key + index, value, seen)))
        return torch.where(anything[..., None], updated, queries)


def remember(state: TrackState, queries: Tensor, scores: Tensor, boxes: Tensor, admitted: Tensor) -> TrackState:
    """Enqueue a frame's admitted queries; if there are more than k, the k most confident.

    Args:
        state: to update.
        queries: (B, N, C) final content.
        scores: (B, N, K) class scores in [0, 1].
        boxes: (B, N, 4) cxcywh in [0, 1].
        admitted: (B, N) bool.

    Returns:
        The state with the new frame at the front of its memory and the oldest one dropped.
    """
    tokens = state.memory_filled.shape[-1]
    confidence = scores.amax(dim=-1).masked_fill(~admitted, -1.0)
    best, indices = confidence.topk(tokens, dim=1)
    filled = best >= 0

    def chosen(x: Tensor) -> Tensor:
        kept = x.detach().gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
        return torch.where(filled[..., None], kept, 0).float()

    return replace(
        state,
        memory_queries=push(state.memory_queries, chosen(queries)),
        memory_scores=push(state.memory_scores, chosen(scores)),
        memory_boxes=push(state.memory_boxes, chosen(boxes)),
        memory_indices=push(state.memory_indices, torch.where(filled, indices, 0)),
        memory_filled=push(state.memory_filled, filled),
    )
