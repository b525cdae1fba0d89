"""Which query an instance gets: decided once, in the first frame in which it is visible (3.2, 3.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from instanceformer.model.decoder import FramePrediction
from instanceformer.training.targets import DenseTargets


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the matching cost, as in Deformable-DETR.

    Attributes:
        classification: of the focal cost of the instance's class.
        box_l1: of the L1 distance between boxes, cxcywh in [0, 1].
        box_giou: of minus the generalised IoU.
    """

    classification: float = 2.0
    box_l1: float = 5.0
    box_giou: float = 2.0


@torch.no_grad()
def match_entering(
    prediction: FramePrediction, targets: DenseTargets, t: int, assigned: Tensor, costs: MatchCosts
) -> Tensor:
    """Give the instances that enter at frame t a query each, among those that no instance holds.

    Instances keep the query that they hold; frames that bring nothing new cost nothing.

    Args:
        prediction: at frame t.
        targets: of the batch.
        t: index of the frame in the clip.
        assigned: (B, n) int64, query held by each instance, or -1.
        costs: weights.

    Returns:
        (B, n) int64, the new assignment; an instance stays at -1 if there are fewer free queries than instances.
    """
    entering = targets.entering[t]
    if not entering.any():
        return assigned
    assigned = assigned.clone()
    for clip in entering.any(dim=1).nonzero().flatten().tolist():
        new = entering[clip].nonzero().flatten().to(assigned.device)
        held = assigned[clip][assigned[clip] >= 0]
        cost = match_cost(
            prediction.logits[-1, clip],
            prediction.boxes[-1, clip],
            targets.labels[clip, new],
            targets.boxes[t, clip, new],
            costs,
        )
        free = torch.ones(cost.shape[0], dtype=torch.bool, device=cost.device)
        free[held] = False
        candidates = free.nonzero().flatten()
        # a NaN or infinite prediction is the gradient scaler's business, not a reason for a run to end here
        finite = cost[candidates].nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
        rows, columns = linear_sum_assignment(finite.cpu().numpy())
        rows, columns = (torch.as_tensor(x, device=assigned.device) for x in (rows, columns))
        assigned[clip, new[columns]] = candidates[rows]
    return assigned


def match_each_layer(prediction: FramePrediction, targets: DenseTargets, costs: MatchCosts) -> Tensor:
    """Match every decoder layer by itself, as DETR does; for clips of one frame, in which nothing has to keep a query.

    Args:
        prediction: at the only frame.
        targets: of the batch.
        costs: weights.

    Returns:
        (D, B, n) int64, the query of each instance in each layer, or -1.
    """
    nobody = torch.full_like(targets.labels, -1)
    layers = zip(prediction.logits.split(1), prediction.boxes.split(1), strict=True)
    return torch.stack(
        [
            match_entering(replace(prediction, logits=logits, boxes=boxes), targets, 0, nobody, costs)
            for logits, boxes in layers
        ]
    )


def match_cost(logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, costs: MatchCosts) -> Tensor:
    """Cost of giving each query to each instance.

    Args:
        logits: (N, K).
        boxes: (N, 4) cxcywh.
        labels: (m,) int64.
        target_boxes: (m, 4) cxcywh.
        costs: weights.

    Returns:
        (N, m) float32.
    """
    probability: Tensor = logits.float().sigmoid()[:, labels]
    positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    boxes, target_boxes = boxes.float(), target_boxes.float()
    overlap = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(target_boxes, "cxcywh", "xyxy"))
    distance = torch.cdist(boxes, target_boxes, p=1)
    cost: Tensor = costs.classification * (positive - negative) + costs.box_l1 * distance - costs.box_giou * overlap
    return cost
