"""Everything that passes from one frame to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Identities:
    """What is known about the instance that each query holds (see ``model.identity``).

    Rows of queries that hold no instance are never read.

    Attributes:
        hidden: (B, N) bool, true if the last frame did not show the instance where its query was.
        looks: (B, N, E) running mean of its looks, of unit length.
        class_logits: (B, N, K) running mean of its class logits.
        boxes: (B, N, 4) where it was last seen, cxcywh in [0, 1].
        scenes: (B, N, E) looks of the whole frame in which it was last seen.
        motion: (B, N, 2) running mean of how far its center moves per frame, as fractions of the frame.
        sightings: (B, N) float32, number of frames in the running means, at most SIGHTINGS; 0 if nothing is known.
        away: (B, N) float32, frames since it was last seen.
    """

    hidden: Tensor
    looks: Tensor
    class_logits: Tensor
    boxes: Tensor
    scenes: Tensor
    motion: Tensor
    sightings: Tensor
    away: Tensor

    @classmethod
    def empty(
        cls, batch: int, num_queries: int, num_classes: int, looks: int, device: torch.device | None
    ) -> Identities:
        """The identities before the first frame: nothing is known."""
        sizes = {"looks": (looks,), "scenes": (looks,), "class_logits": (num_classes,), "boxes": (4,), "motion": (2,)}
        numbers = {
            field.name: torch.zeros(batch, num_queries, *sizes.get(field.name, ()), device=device)
            for field in fields(cls)
        }
        return cls(**{**numbers, "hidden": numbers["away"].bool()})

    def rolled(self) -> Identities:
        """The same, but each clip has those of the previous clip in the batch."""
        return Identities(**{field.name: getattr(self, field.name).roll(1, 0) for field in fields(self)})

    def of(self, queries: Tensor) -> Identities:
        """Those of the chosen queries, (B, M) int64."""
        return Identities(**{field.name: gather_queries(getattr(self, field.name), queries) for field in fields(self)})


@dataclass(frozen=True)
class TrackState:
    """The tracker between two frames: a value, with the same shapes from the first frame of a video to the last.

    B videos, N queries, C channels, K classes, d memory frames, k tokens per frame. Time runs backwards along d: index
    0 is the previous frame. Entries that are not marked as carried or filled are never read.

    Attributes:
        queries: (B, N, C) content with which a carried query starts the next frame.
        references: (B, N, 2) previous location of a carried query, (x, y) in [0, 1]: the reference point itself or the
            center of the last box, depending on the option ``location``.
        carried: (B, N) bool, whether the query continues from the previous frame; otherwise it starts from its learned
            content. All false after a reset.
        held: (B, N) bool, whether the query holds an instance. ``InstanceFormer.advance`` decides: in training, once
            the query is matched; at inference, once its score reaches ``min_confidence`` and it is not a duplicate.
            Stays true until ``free`` or a reset. This is the only record of it.
        class_logits: (B, d, N, K) raw class logits of the previous frames (equation 2).
        class_filled: (B, d, N) bool, the frames that the class prior sees of each query: from the newest, without gaps.
        memory_queries: (B, d, k, C) final content of the remembered queries (equation 3), without gradient.
        memory_scores: (B, d, k, K) their class scores in [0, 1].
        memory_boxes: (B, d, k, 4) their boxes, cxcywh in [0, 1].
        memory_indices: (B, d, k) int64, which query each token came from.
        memory_filled: (B, d, k) bool, false for empty slots.
        identities: what is known about the instances; None if ``identity`` is ``none``, as in the paper.
    """

    queries: Tensor
    references: Tensor
    carried: Tensor
    held: Tensor
    class_logits: Tensor
    class_filled: Tensor
    memory_queries: Tensor
    memory_scores: Tensor
    memory_boxes: Tensor
    memory_indices: Tensor
    memory_filled: Tensor
    identities: Identities | None

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
        looks: int = 0,
        device: torch.device | None = None,
    ) -> TrackState:
        """The state before a video's first frame; ``looks`` is the length E of their embedding, 0 for no identities."""
        b, n, d, k = batch, num_queries, memory_frames, memory_tokens
        return cls(
            queries=torch.zeros(b, n, dim, device=device),
            references=torch.zeros(b, n, 2, device=device),
            carried=torch.zeros(b, n, dtype=torch.bool, device=device),
            held=torch.zeros(b, n, dtype=torch.bool, device=device),
            class_logits=torch.zeros(b, d, n, num_classes, device=device),
            class_filled=torch.zeros(b, d, n, dtype=torch.bool, device=device),
            memory_queries=torch.zeros(b, d, k, dim, device=device),
            memory_scores=torch.zeros(b, d, k, num_classes, device=device),
            memory_boxes=torch.zeros(b, d, k, 4, device=device),
            memory_indices=torch.zeros(b, d, k, dtype=torch.int64, device=device),
            memory_filled=torch.zeros(b, d, k, dtype=torch.bool, device=device),
            identities=Identities.empty(b, n, num_classes, looks, device) if looks else None,
        )

    @property
    def hidden(self) -> Tensor:
        """(B, N) bool, queries whose instance the last frame did not show where they were."""
        return torch.zeros_like(self.held) if self.identities is None else self.identities.hidden

    def free(self, queries: Tensor) -> TrackState:
        """The state with some queries freed: they hold nothing, start afresh, and their memory tokens are gone.

        Args:
            queries: (B, N) bool, the queries to free.
        """
        return replace(
            self,
            carried=self.carried & ~queries,
            held=self.held & ~queries,
            class_filled=self.class_filled & ~queries[:, None],
            memory_filled=self.memory_filled
            & ~queries[:, None].expand(-1, self.memory_filled.shape[1], -1).gather(2, self.memory_indices),
            identities=self.identities
            and replace(
                self.identities,
                hidden=self.identities.hidden & ~queries,
                sightings=self.identities.sightings * ~queries,
            ),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; those of ``identities`` as ``identities_...``."""
        named = {name: value for name, value in vars(self).items() if name != "identities"}
        known = {} if self.identities is None else vars(self.identities)
        return named | {f"identities_{name}": value for name, value in known.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TrackState:
        """The inverse of ``tensors``."""
        known = {name.removeprefix("identities_"): x for name, x in tensors.items() if name.startswith("identities_")}
        rest = {name: x for name, x in tensors.items() if not name.startswith("identities_")}
        return cls(**rest, identities=Identities(**known) if known else None)

    def overwrite(self, by: TrackState) -> None:
        """Take over the values of another state, in place: a CUDA graph reads and writes the same tensors always."""
        for own, other in zip(self.tensors().values(), by.tensors().values(), strict=True):
            own.copy_(other)

    def to(self, device: torch.device | str) -> TrackState:
        """The same state on another device."""
        return TrackState.from_tensors({name: x.to(device) for name, x in self.tensors().items()})


def gather_queries(x: Tensor, queries: Tensor) -> Tensor:
    """Rows of (B, N, ...) at (B, M) int64 indices: (B, M, ...)."""
    return x.gather(1, queries.view(*queries.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def push(queue: Tensor, newest: Tensor) -> Tensor:
    """Enqueue along dimension 1 and drop the oldest: (B, d, ...) and (B, ...) to (B, d, ...)."""
    return torch.cat((newest[:, None], queue[:, :-1]), dim=1)
