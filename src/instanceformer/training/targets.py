"""Ground truth of a batch of clips as dense tensors, so that losses need no loop over instances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from instanceformer.data.batch import ClipTargets


@dataclass(frozen=True)
class DenseTargets:
    """B clips of T frames with at most n instances each; n is at least 1, missing instances are never visible.

    Attributes:
        labels: (B, n) int64 class index.
        boxes: (T, B, n, 4) cxcywh as fractions of the clip's own size.
        visible: (T, B, n) bool.
        masks: (T, B, n, h, w) float32, covered fraction of every cell of the mask logits.
        pixels: (B, h, w) float32, one where a cell belongs to the clip and zero where it is padding.
        entering: (T, B, n) bool, on the CPU: whether this is the first frame in which the instance is visible.
    """

    labels: Tensor
    boxes: Tensor
    visible: Tensor
    masks: Tensor
    pixels: Tensor
    entering: Tensor

    @classmethod
    def from_clips(cls, clips: list[ClipTargets], grid: tuple[int, int]) -> DenseTargets:
        """Pad and stack the targets of a batch.

        Args:
            clips: one for each clip of the batch, all with the same number of frames.
            grid: (h, w) of the mask logits.
        """
        n = max(1, *(len(clip.labels) for clip in clips))

        def padded(x: Tensor, dim: int) -> Tensor:
            margin = [0, 0] * (x.ndim - dim - 1) + [0, n - x.shape[dim]]
            return F.pad(x, margin)

        visible = torch.stack([padded(clip.visible, 1) for clip in clips], dim=1)
        seen = visible.cumsum(dim=0)
        return cls(
            labels=torch.stack([padded(clip.labels, 0) for clip in clips]),
            boxes=torch.stack([padded(clip.boxes, 1) for clip in clips], dim=1),
            visible=visible,
            masks=torch.stack([coverage(padded(clip.masks, 1), grid) for clip in clips], dim=1),
            pixels=torch.stack([_inside(clip, grid) for clip in clips]),
            entering=(visible & (seen == 1)).cpu(),
        )


def coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fraction of every 4x4 cell that a mask covers: (T, n, H, W) bool gives (T, n, h, w) float32, zero beyond H, W."""
    height, width = masks.shape[-2:]
    cells = F.pad(masks.float(), (0, grid[1] * 4 - width, 0, grid[0] * 4 - height))
    return F.avg_pool2d(cells, 4)


def _inside(clip: ClipTargets, grid: tuple[int, int]) -> Tensor:
    height, width = clip.masks.shape[-2:]
    inside = torch.zeros(grid, device=clip.masks.device)
    inside[: -(-height // 4), : -(-width // 4)] = 1
    return inside
