"""The training loss (equation 6): classification, box, mask and temporal contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from instanceformer.data.batch import DenseTargets
from instanceformer.model.boxes import generalized_box_iou
from instanceformer.training.contrastive import temporal_contrastive_loss
from instanceformer.training.recognition import FrameRecognition, identity_losses


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of equation 6.

    As printed::

        L = lambda_1 L_cls + lambda_2 L_box + lambda_3 L_mask + lambda_4 L_tcl

    and as computed, with a weight w for each of our terms::

        L = sum over decoder layers (w classification + w box_l1 + w box_giou + w mask_focal + w mask_dice)
            + w contrastive  (+ w appearance + w recognition)

    It differs because the paper takes its losses from Deformable-DETR, which applies them to every layer and whose box
    loss is L1 plus generalized IoU; for the mask's cross-entropy, the focal and dice losses are used, as in SeqFormer
    and the authors' release. The terms in parentheses go beyond the paper: only a network with ``identity`` has them.

    Attributes:
        classification: weight of the focal loss, over all queries and classes.
        box_l1: weight of the L1 distance between boxes, cxcywh in [0, 1].
        box_giou: weight of one minus the generalized IoU.
        mask_focal: weight of the focal loss of the mask's pixels.
        mask_dice: weight of the dice loss of the mask.
        contrastive: weight of the temporal contrastive loss; 0 leaves it out (table 4, without TCL).
        appearance: weight of the contrastive loss of the instances' looks.
        recognition: weight of the binary cross-entropy of the claims about which query shows which instance.
    """

    classification: float = 2.0
    box_l1: float = 5.0
    box_giou: float = 2.0
    mask_focal: float = 2.0
    mask_dice: float = 5.0
    contrastive: float = 2.0
    appearance: float = 1.0
    recognition: float = 2.0


@dataclass(frozen=True)
class LossTerms:
    """The unweighted terms, scalars; all but the last three are sums over the decoder layers."""

    classification: Tensor
    box_l1: Tensor
    box_giou: Tensor
    mask_focal: Tensor
    mask_dice: Tensor
    contrastive: Tensor
    appearance: Tensor
    recognition: Tensor

    def total(self, weights: LossWeights) -> Tensor:
        """The weighted sum, equation 6."""
        return torch.stack([getattr(weights, f.name) * getattr(self, f.name) for f in fields(self)]).sum()


@dataclass(frozen=True)
class ClipOutputs:
    """The network's outputs for a batch of clips: B clips, T frames, D decoder layers, n instances.

    Attributes:
        logits: (T, D, B, N, K) of all queries.
        boxes: (T, D, B, n, 4) cxcywh, of the instances' queries, as are the next two.
        masks: (T, D, B, n, h, w) logits.
        queries: (T, B, n, C) final content.
        assigned: (D, B, n) int64, query of each instance, or -1; the same in all layers if T > 1.
        has_query: (T, D, B, n) bool, whether the instance has a query in that frame: from its first appearance on.
        recognition: one for each frame from a network with ``identity``; empty from others.
    """

    logits: Tensor
    boxes: Tensor
    masks: Tensor
    queries: Tensor
    assigned: Tensor
    has_query: Tensor
    recognition: Sequence[FrameRecognition] = ()


def clip_losses(outputs: ClipOutputs, targets: DenseTargets, normalizer: Tensor, window: int) -> LossTerms:
    """Compute the terms of equation 6 in float32.

    In a frame where an instance with a query is not visible, it has no box loss, its target mask is empty and its
    target class stays.

    Args:
        outputs: of the network.
        targets: of the batch.
        normalizer: scalar that every term is divided by: the number of instances with a query, summed over frames and
            averaged over ranks.
        window: d of the contrastive loss.
    """
    with torch.autocast(outputs.logits.device.type, enabled=False):
        has_query = outputs.has_query.float()
        visible = has_query * targets.visible[:, None]
        boxes = outputs.boxes.float()
        target_boxes = targets.boxes[:, None]
        focal, dice = mask_losses(outputs.masks.float(), targets.masks[:, None] / 16, targets.pixels.float())
        appearance = recognition = normalizer.new_zeros(())
        if outputs.recognition:
            appearance, recognition = identity_losses(outputs.recognition)
        terms = LossTerms(
            classification=sigmoid_focal_loss(outputs.logits.float(), class_targets(outputs, targets.labels)).sum(),
            box_l1=((boxes - target_boxes).abs().sum(dim=-1) * visible).sum(),
            box_giou=((1 - generalized_box_iou(boxes, target_boxes)) * visible).sum(),
            mask_focal=(focal * has_query).sum(),
            mask_dice=(dice * has_query).sum(),
            contrastive=temporal_contrastive_loss(outputs.queries, outputs.has_query[:, -1], window),
            appearance=appearance,
            recognition=recognition,
        )
        return LossTerms(**{f.name: getattr(terms, f.name) / normalizer for f in fields(terms)})


def class_targets(outputs: ClipOutputs, labels: Tensor) -> Tensor:
    """(T, D, B, N, K) float32: 1 for the class of a query's instance, from its first appearance on; otherwise 0."""
    targets = torch.zeros_like(outputs.logits, dtype=torch.float32)
    cells = outputs.assigned.clamp(min=0) * targets.shape[-1] + labels  # unique among instances with a query
    targets.flatten(3).scatter_add_(3, cells.expand_as(outputs.has_query), outputs.has_query.float())
    return targets


def mask_losses(logits: Tensor, target: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of masks (Lin et al.; Milletari et al.).

    Args:
        logits: (..., B, n, h, w).
        target: the same shape or one that broadcasts to it; covered fraction of every cell in [0, 1].
        pixels: (B, h, w) float, zero where padded.

    Returns:
        (..., B, n) focal loss, the mean over the clip's cells; (..., B, n) dice loss.
    """
    inside = pixels[:, None]
    area = pixels.sum(dim=(-2, -1))[:, None]
    target = target.expand_as(logits)
    focal = (sigmoid_focal_loss(logits, target) * inside).sum(dim=(-2, -1)) / area
    probability = logits.sigmoid() * inside
    intersection = (probability * target).sum(dim=(-2, -1))
    total = probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return focal, 1 - (2 * intersection + 1) / (total + 1)
