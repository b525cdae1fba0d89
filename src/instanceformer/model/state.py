"""All that passes from one frame to the next."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrackState:
    """The tracker between two frames: a value, with the same shapes from the first frame of a video to the last.

    B videos, N queries, C channels, K classes, d memory frames, k tokens a frame. Time runs backwards along d: index 0
    is the previous frame. Nothing marked as not carried or not filled is ever read.

    Attributes:
        queries: (B, N, C) content with which a carried query starts the next frame.
        references: (B, N, 2) previous location of a carried query, (x, y) in [0, 1]: the reference point itself or the
            centre of the last box, as the rule of location propagation asks.
        carried: (B, N) bool, whether the query continues from the previous frame; otherwise it starts from its learned
            content. All false after a reset.
        class_logits: (B, d, N, K) raw class logits of the previous frames (equation 2).
        class_filled: (B, d, N) bool, the frames that the class prior sees of each query, without a gap from the newest.
        memory_queries: (B, d, k, C) final content of the remembered queries (equation 3), without gradient.
        memory_scores: (B, d, k, K) their class scores in [0, 1].
        memory_boxes: (B, d, k, 4) their boxes, cxcywh in [0, 1].
        memory_indices: (B, d, k) int64, which query each token came from.
        memory_filled: (B, d, k) bool.
    """

    queries: Tensor
    references: Tensor
    carried: Tensor
    class_logits: Tensor
    class_filled: Tensor
    memory_queries: Tensor
    memory_scores: Tensor
    memory_boxes: Tensor
    memory_indices: Tensor
    memory_filled: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        *,
        num_queries: int,
        dim: int,
        num_classes: int,
        memory_frames: int,
        memory_tokens: int,
        device: torch.device | None = None,
    ) -> TrackState:
        """The state before a video's first frame."""
        b, n, d, k = batch, num_queries, memory_frames, memory_tokens
        return cls(
            queries=torch.zeros(b, n, dim, device=device),
            references=torch.zeros(b, n, 2, device=device),
            carried=torch.zeros(b, n, dtype=torch.bool, device=device),
            class_logits=torch.zeros(b, d, n, num_classes, device=device),
            class_filled=torch.zeros(b, d, n, dtype=torch.bool, device=device),
            memory_queries=torch.zeros(b, d, k, dim, device=device),
            memory_scores=torch.zeros(b, d, k, num_classes, device=device),
            memory_boxes=torch.zeros(b, d, k, 4, device=device),
            memory_indices=torch.zeros(b, d, k, dtype=torch.int64, device=device),
            memory_filled=torch.zeros(b, d, k, dtype=torch.bool, device=device),
        )

    @property
    def held(self) -> Tensor:
        """(B, N) bool, queries with a history: those that hold an instance, where the options ask for that."""
        return self.class_filled[:, 0]

    def release(self, queries: Tensor) -> TrackState:
        """The state in which some queries hold nothing: they start afresh, and what they left in memory is gone.

        Args:
            queries: (B, N) bool.
        """
        return replace(
            self,
            carried=self.carried & ~queries,
            class_filled=self.class_filled & ~queries[:, None],
            memory_filled=self.memory_filled
            & ~queries[:, None].expand(-1, self.memory_filled.shape[1], -1).gather(2, self.memory_indices),
        )

    def to(self, device: torch.device | str) -> TrackState:
        """The same state on another device."""
        return TrackState(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def push(queue: Tensor, newest: Tensor) -> Tensor:
    """Enqueue along dimension 1 and drop the oldest: (B, d, ...) and (B, ...) give (B, d, ...)."""
    return torch.cat((newest[:, None], queue[:, :-1]), dim=1)
