"""Memory attention (3.3): tokens of earlier instances, equation 3, and the look back at them, equation 4."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from instanceformer.model.attention import Attention, narrowed, sine_position, xavier_
from instanceformer.model.state import TrackState, push


@dataclass(frozen=True)
class MemoryTokens:
    """The memory for one frame: values are the tokens, keys the tokens plus their temporal index.

    Attributes:
        values: (B, d k, C) token.
        index: (B, d k, C) temporal index.
        filled: (B, d k) bool.
    """

    values: Tensor
    index: Tensor
    filled: Tensor


class Memory(nn.Module):
    """Reads the queue: the tokens (equation 3) and their temporal index.

    The paper: m_f = W_m_proj(sg(q_f, b_f, c_f)), with the stop gradient sg.
    Ours: m = W_m([q, class scores, box]), of inputs without gradient. W_m learns because a token is projected when it
    is read, not when it is written. The temporal index is the position embedding of the query that wrote the token,
    plus the sine of the frame's age t - f.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim + num_classes + 4, dim)
        xavier_(self.projection)

    def forward(self, state: TrackState, position: Tensor) -> MemoryTokens:
        """Read the memory.

        Args:
            state: with the queue of d frames, k tokens each.
            position: (N, C) position embedding of every query.
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
        """Code of each frame of the queue, newest first: (B, d, k) bool gives (1 or B, d, C)."""
        return sine_position(torch.arange(1, filled.shape[1] + 1, device=filled.device), dim)[None]


class MemoryAttention(nn.Module):
    """Cross-attention from queries to memory, then normalization (equation 4).

    The paper: q_t = Attn(q_t, M_t). Ours: the same, with the temporal index in the keys and not in the values; where
    the memory is empty, queries pass unchanged.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, position: Tensor, memory: MemoryTokens) -> Tensor:
        """(B, N, C) queries and their position embedding give (B, N, C)."""
        anything = memory.filled.any(dim=1, keepdim=True)
        seen = memory.filled | ~anything  # with nothing to attend to, softmax over all rather than over none
        query, _, _ = self.attention.project(queries + position)
        _, key, value = self.attention.project(memory.values)
        _, index, _ = self.attention.project(memory.index, bias=False)
        updated = self.norm(queries + self.dropout(self.attention.attend(query, key + index, value, seen)))
        return torch.where(anything[..., None], updated, queries)


def remember(state: TrackState, queries: Tensor, scores: Tensor, boxes: Tensor, admitted: Tensor) -> TrackState:
    """Put the admitted queries of a frame into the queue, the most confident ones if they are more than k.

    Args:
        state: to start from.
        queries: (B, N, C) final content.
        scores: (B, N, K) class scores in [0, 1].
        boxes: (B, N, 4) cxcywh in [0, 1].
        admitted: (B, N) bool.

    Returns:
        The state with the new frame at the front of its memory and the oldest one gone.
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
