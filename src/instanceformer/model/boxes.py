"""How much boxes overlap; no step depends on the data, so nothing ever waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) cxcywh: (...) in [0, 1]."""
    shared, union, _ = _areas(a, b)
    return shared / union


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU minus the fraction of the enclosing box that neither covers (Rezatofighi et al.): (...) in [-1, 1]."""
    shared, union, hull = _areas(a, b)
    return shared / union - (hull - union) / hull


def duplicates(boxes: Tensor, confidence: Tensor, candidates: Tensor, held: Tensor, max_overlap: float) -> Tensor:
    """Queries that would be a second one on the same instance.

    Args:
        boxes: (B, N, 4) cxcywh.
        confidence: (B, N) in [0, 1].
        candidates: (B, N) bool, confident queries.
        held: (B, N) bool, queries that already hold an instance: they take precedence and are never duplicates.
        max_overlap: box IoU above which two queries are on the same instance.

    Returns:
        (B, N) bool, queries that overlap by more with a candidate that is more confident or holds an instance.
    """
    overlap = box_iou(boxes[:, :, None], boxes[:, None])
    priority = confidence + held
    before = candidates[:, None, :] & (priority[:, None, :] > priority[:, :, None])
    return (before & (overlap > max_overlap)).any(dim=-1) & ~held


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of the intersection, the union and the enclosing box; the last two are never zero."""
    area = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3]
    a, b = (box_convert(x, "cxcywh", "xyxy") for x in (a, b))
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(dim=-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(dim=-1)
    return shared, (area - shared).clamp(min=1e-9), hull.clamp(min=1e-9)
