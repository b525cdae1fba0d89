"""What is seen in one frame of a video."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameInstances:
    """The n instances visible in one frame of H x W pixels (n may be 0).

    Attributes:
        ids: (n,) int64, identities: the same number is the same object in every frame of the video.
        labels: (n,) int64, class index in [0, K).
        scores: (n,) float32, confidence in [0, 1].
        boxes: (n, 4) float32, (x1, y1, x2, y2) in pixels, x2 and y2 exclusive.
        masks: (n, H, W) bool.
        hidden: (m,) int64, ids of those that go on, but are not visible in this frame.
    """

    ids: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.ids)
