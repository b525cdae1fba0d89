"""The life of tracks: which query is which identity, from birth to end."""

from __future__ import annotations

import torch
from torch import Tensor

from instanceformer.inference.options import SegmenterOptions
from instanceformer.model.boxes import duplicates


class Tracks:
    """The tracks of one video, at most one for each of the network's N queries.

    Everything is a tensor of fixed size on the network's device, and nothing here waits for the device.

    Attributes:
        ids: (N,) int64, the track that each query holds, counted from 1 in the order of birth; 0 where it holds none.

    Args:
        num_queries: N.
        num_classes: K.
        options: rules.
        device: of the network.
    """

    def __init__(self, num_queries: int, num_classes: int, options: SegmenterOptions, device: torch.device) -> None:
        self.options = options
        self.ids = torch.zeros(num_queries, dtype=torch.int64, device=device)
        self._last_id = torch.zeros((), dtype=torch.int64, device=device)
        self._total = torch.zeros(num_queries, num_classes, device=device)  # of probabilities while visible
        self._seen = torch.zeros(num_queries, device=device)  # frames in which the track was visible
        self._hidden = torch.zeros(num_queries, device=device)  # frames since then

    @property
    def probabilities(self) -> Tensor:
        """(N, K) mean class probabilities of each track over the frames in which it was visible; 0 without a track."""
        return self._total / self._seen.clamp(min=1)[:, None]

    def update(self, scores: Tensor, boxes: Tensor, held: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the next frame: begin and end tracks.

        Args:
            scores: (N, K) class probabilities.
            boxes: (N, 4) cxcywh.
            held: (N,) bool, queries that the network takes for an instance: only they can hold a track.
            hidden: (N,) bool, those of them that are not on their instance in this frame, as the network sees it.

        Returns:
            (N,) bool, queries whose tracks are visible in this frame; (N,) bool, queries whose tracks end with it.
        """
        options = self.options
        confidence = scores.amax(dim=-1)
        visible = (self.ids > 0) & ~hidden & (confidence >= options.show)
        born = (self.ids == 0) & held & ~hidden & (confidence >= options.birth)
        candidates = (born | visible)[None]
        born &= ~duplicates(boxes[None], confidence[None], candidates, visible[None], options.max_overlap)[0]
        rank = confidence.masked_fill(~born, -1.0).argsort(descending=True, stable=True).argsort()
        born &= rank < options.max_tracks - (self.ids > 0).sum()

        numbers = born.cumsum(0)
        self.ids = torch.where(born, self._last_id + numbers, self.ids)
        self._last_id = self._last_id + numbers[-1]

        visible |= born
        self._total = self._total + torch.where(visible[:, None], scores, 0.0)
        self._seen = self._seen + visible
        self._hidden = torch.where(visible, 0.0, self._hidden + 1)

        ended = (self.ids > 0) & (self._hidden > options.patience)
        self.ids = torch.where(ended, 0, self.ids)
        self._total = torch.where(ended[:, None], 0.0, self._total)
        self._seen = torch.where(ended, 0.0, self._seen)
        return visible, ended
