"""The batches that training and evaluation receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClipTargets:
    """Ground truth of a clip of T frames with n instances, each visible in at least one frame; n may be 0.

    Attributes:
        labels: (n,) int64, class indices in [0, K).
        boxes: (T, n, 4) float32, (center x, center y, width, height) as fractions of the clip's unpadded size; zeros
            where the instance is not visible.
        masks: (T, n, H, W) bool at the clip's unpadded size; all false where the instance is not visible.
        visible: (T, n) bool.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor
    visible: Tensor


@dataclass(frozen=True)
class DenseTargets:
    """Ground truth of B clips of T frames as dense tensors, so that the losses need no loop over instances.

    n is the largest number of instances in any of the clips, and at least 1. Clips with fewer are padded with
    instances that are never visible.

    Attributes:
        labels: (B, n) int64 class indices.
        boxes: (T, B, n, 4) float32 cxcywh as fractions of the clip's unpadded size.
        visible: (T, B, n) bool.
        masks: (T, B, n, h, w) uint8 in [0, 16], how many pixels of each 4x4 cell the mask covers. A cell corresponds to
            one mask logit.
        pixels: (B, h, w) bool, true for cells of the clip, false for padding.
        entering: (T, B, n) bool, whether this is the first frame in which the instance is visible. Stays on the CPU,
            where instances are matched.
    """

    labels: Tensor
    boxes: Tensor
    visible: Tensor
    masks: Tensor
    pixels: Tensor
    entering: Tensor

    def __len__(self) -> int:
        """Number of clips, B."""
        return len(self.labels)

    @classmethod
    def from_clips(cls, clips: Sequence[ClipTargets], size: tuple[int, int]) -> DenseTargets:
        """Pad and stack the targets of a batch.

        Args:
            clips: targets of each clip; all clips have the same number of frames.
            size: (height, width) of the padded frames in pixels.
        """
        n = max(1, *(len(clip.labels) for clip in clips))
        grid = (-(-size[0] // 4), -(-size[1] // 4))

        def padded(x: Tensor, dim: int) -> Tensor:
            margin = [0, 0] * (x.ndim - dim - 1) + [0, n - x.shape[dim]]
            return F.pad(x, margin)

        visible = torch.stack([padded(clip.visible, 1) for clip in clips], dim=1)
        return cls(
            labels=torch.stack([padded(clip.labels, 0) for clip in clips]),
            boxes=torch.stack([padded(clip.boxes, 1) for clip in clips], dim=1),
            visible=visible,
            masks=torch.stack([padded(coverage(clip.masks, grid), 1) for clip in clips], dim=1),
            pixels=torch.stack([_inside(clip, grid) for clip in clips]),
            entering=visible & (visible.cumsum(dim=0) == 1),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseTargets:
        """Move every tensor except ``entering`` to ``device``."""
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in vars(self).items() if name != "entering"}
        return replace(self, **moved)

    def pin_memory(self) -> DenseTargets:
        """Copy every tensor to page-locked memory; called by the DataLoader."""
        return DenseTargets(**{name: x.pin_memory() for name, x in vars(self).items()})


def coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Count the mask pixels in each 4x4 cell: (T, n, H, W) bool to (T, n, h, w) uint8, zero beyond H and W."""
    height, width = masks.shape[-2:]
    x = F.pad(masks.view(torch.uint8), (0, grid[1] * 4 - width, 0, grid[0] * 4 - height))
    for dim in (-2, -1):
        x = sum(x.unflatten(dim, (-1, 4)).unbind(dim), start=torch.zeros((), dtype=torch.uint8))
    return x


def _inside(clip: ClipTargets, grid: tuple[int, int]) -> Tensor:
    height, width = clip.masks.shape[-2:]
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[: -(-height // 4), : -(-width // 4)] = True
    return inside


@dataclass(frozen=True)
class ClipBatch:
    """B training clips of T frames, padded at the right and bottom to a common size.

    Attributes:
        frames: (B, T, 3, H, W) float32 RGB, normalized with the ImageNet mean and standard deviation; zero in the
            padding.
        padding: (B, H, W) bool, true in the padding; None if all clips have the same size. Stays on the CPU, where the
            network reads the clip sizes from it.
        targets: ground truth of the B clips.
    """

    frames: Tensor
    padding: Tensor | None
    targets: DenseTargets

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ClipBatch:
        """Move the tensors needed on ``device``; non-blocking by default, since Lightning does not pass the flag."""
        frames = self.frames.to(device, non_blocking=non_blocking)
        return replace(self, frames=frames, targets=self.targets.to(device, non_blocking))

    def pin_memory(self) -> ClipBatch:
        """Copy the frames and targets to page-locked memory; called by the DataLoader."""
        return replace(self, frames=self.frames.pin_memory(), targets=self.targets.pin_memory())


@dataclass(frozen=True)
class VideoChunk:
    """Consecutive frames of one video. The chunks of a video arrive in order; the first has ``start == 0``.

    Attributes:
        frames: (1, T, 3, H, W) float32, normalized as in ClipBatch, unpadded, resized for the network.
        video_id: the video's id in its annotation file.
        start: index of the chunk's first frame in the video.
        length: number of frames in the whole video.
        size: (height, width) of the original frames in pixels.
    """

    frames: Tensor
    video_id: int
    start: int
    length: int
    size: tuple[int, int]

    @property
    def is_last(self) -> bool:
        """Whether this is the last chunk of the video."""
        return self.start + self.frames.shape[1] == self.length

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VideoChunk:
        """Move the frames to ``device``."""
        return replace(self, frames=self.frames.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> VideoChunk:
        """Copy the frames to page-locked memory; called by the DataLoader."""
        return replace(self, frames=self.frames.pin_memory())


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to ``device`` without blocking on it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
