"""Which query an instance gets: decided once, in the first frame in which it is visible (3.2, 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from instanceformer.data.batch import DenseTargets
from instanceformer.model.boxes import generalized_box_iou


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the matching cost, as in Deformable-DETR.

    Attributes:
        classification: of the focal cost of the instance's class.
        box_l1: of the L1 distance between boxes, cxcywh in [0, 1].
        box_giou: of minus the generalized IoU.
    """

    classification: float = 2.0
    box_l1: float = 5.0
    box_giou: float = 2.0


@torch.no_grad()
def match_entering(
    logits: Tensor, boxes: Tensor, targets: DenseTargets, t: int, assigned: Tensor, costs: MatchCosts
) -> Tensor:
    """Give each instance that enters at frame t a query, among those that no instance has yet.

    Instances keep their queries. A frame in which no instance enters costs nothing; any other costs one copy from the
    device to the host, where assignments are made and kept.

    Args:
        logits: (D, B, N, K) at frame t, of the D layers that are matched, each independently.
        boxes: (D, B, N, 4) cxcywh, likewise.
        targets: of the batch.
        t: index of the frame in the clip.
        assigned: (D, B, n) int64 on the CPU, query of each instance, or -1.
        costs: weights.

    Returns:
        (D, B, n) int64 on the CPU, the new assignment; an instance stays at -1 if there are fewer free queries than
        instances.
    """
    entering = targets.entering[t]
    if not entering.any():
        return assigned
    assigned = assigned.clone()
    # NaN and infinite predictions are left to the gradient scaler: they must not end a run here
    cost = match_cost(logits, boxes, targets.labels, targets.boxes[t], costs).nan_to_num(1e6, 1e6, -1e6).cpu()
    for layer, clip in torch.cartesian_prod(torch.arange(len(cost)), entering.any(dim=1).nonzero().flatten()).tolist():
        new, taken = entering[clip].nonzero().flatten(), assigned[layer, clip]
        free = torch.ones(cost.shape[2], dtype=torch.bool)
        free[taken[taken >= 0]] = False
        candidates = free.nonzero().flatten()
        rows, columns = linear_sum_assignment(cost[layer, clip][candidates][:, new].numpy())
        taken[new[columns]] = candidates[rows]
    return assigned


def match_cost(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, costs: MatchCosts) -> Tensor:
    """Cost of giving each query to each instance.

    Args:
        logits: (D, B, N, K).
        boxes: (D, B, N, 4) cxcywh.
        labels: (B, n) int64.
        target_boxes: (B, n, 4) cxcywh.
        costs: weights.

    Returns:
        (D, B, N, n) float32.
    """
    layers, _, queries, _ = logits.shape
    classes = labels[None, :, None].expand(layers, -1, queries, -1)
    probability = logits.float().sigmoid().gather(3, classes)
    positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    boxes, target_boxes = boxes.float()[..., None, :], target_boxes[:, None]
    distance = (boxes - target_boxes).abs().sum(dim=-1)
    overlap = generalized_box_iou(boxes, target_boxes)
    cost: Tensor = costs.classification * (positive - negative) + costs.box_l1 * distance - costs.box_giou * overlap
    return cost
