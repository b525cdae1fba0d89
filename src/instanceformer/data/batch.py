"""The batch types: all that the data side hands to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipTargets:
    """Ground truth of one clip of T frames with n instances, each visible in at least one of them (n may be 0).

    Attributes:
        labels: (n,) int64, class index in [0, K).
        boxes: (T, n, 4) float32, (centre x, centre y, width, height) as fractions of the clip's own, unpadded size;
            zeros where the instance is not visible.
        masks: (T, n, H, W) bool at the clip's own, unpadded size; all false where not visible.
        visible: (T, n) bool.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor
    visible: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipTargets:
        """Move every tensor to ``device``."""
        return ClipTargets(*(t.to(device, non_blocking=non_blocking) for t in vars(self).values()))

    def pin_memory(self) -> ClipTargets:
        """Copy every tensor to page-locked memory, as the DataLoader asks."""
        return ClipTargets(*(t.pin_memory() for t in vars(self).values()))


@dataclass(frozen=True)
class ClipBatch:
    """B training clips of T frames, padded on the right and at the bottom to a common size.

    Attributes:
        frames: (B, T, 3, H, W) float32, RGB normalised with the ImageNet mean and deviation; zero where padded.
        padding: (B, H, W) bool, true where padded; None when all clips have the same size.
        targets: B ClipTargets.
    """

    frames: Tensor
    padding: Tensor | None
    targets: list[ClipTargets]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipBatch:
        """Move every tensor to ``device``."""
        return ClipBatch(
            frames=self.frames.to(device, non_blocking=non_blocking),
            padding=None if self.padding is None else self.padding.to(device, non_blocking=non_blocking),
            targets=[targets.to(device, non_blocking) for targets in self.targets],
        )

    def pin_memory(self) -> ClipBatch:
        """Copy every tensor to page-locked memory, as the DataLoader asks."""
        return ClipBatch(
            frames=self.frames.pin_memory(),
            padding=None if self.padding is None else self.padding.pin_memory(),
            targets=[targets.pin_memory() for targets in self.targets],
        )


@dataclass(frozen=True)
class VideoChunk:
    """Consecutive frames of one video; the chunks of a video arrive in order, the first with ``start == 0``.

    Attributes:
        frames: (1, T, 3, H, W) float32, normalised as in ClipBatch, unpadded, resized for the network.
        video_id: the video's id in its annotation file.
        start: index in the video of the chunk's first frame.
        length: number of frames of the whole video.
        size: (height, width) in pixels of the video's original frames.
    """

    frames: Tensor
    video_id: int
    start: int
    length: int
    size: tuple[int, int]

    @property
    def is_last(self) -> bool:
        """Whether the video ends with this chunk."""
        return self.start + self.frames.shape[1] == self.length

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VideoChunk:
        """Move the frames to ``device``."""
        return replace(self, frames=self.frames.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> VideoChunk:
        """Copy the frames to page-locked memory, as the DataLoader asks."""
        return replace(self, frames=self.frames.pin_memory())
