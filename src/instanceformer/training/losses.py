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

    It differs because the paper takes its losses from Deformable-DETR, which compares every layer and whose box loss is
    L1 and generalized IoU; the mask's cross-entropy is the focal and dice loss of SeqFormer and the authors' release.
    The terms in brackets are past the paper, of a network with ``identity``.

    Attributes:
        classification: of the focal loss of all queries, over all classes.
        box_l1: of the L1 distance between boxes, cxcywh in [0, 1].
        box_giou: of one minus the generalized IoU.
        mask_focal: of the focal loss of the mask's pixels.
        mask_dice: of the dice loss of the mask.
        contrastive: of the temporal contrastive loss; 0 leaves it out (table 4, without TCL).
        appearance: of the contrastive loss of the looks of instances.
        recognition: of the binary cross-entropy of the claims, which query shows which instance.
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
    """The unweighted terms, scalars; each but the last three is a sum over the decoder layers."""

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
    """What the network said about a batch of clips: B clips, T frames, D decoder layers, n instances.

    Attributes:
        logits: (T, D, B, N, K) of all queries.
        boxes: (T, D, B, n, 4) cxcywh, of the instances' queries.
        masks: (T, D, B, n, h, w) logits.
        queries: (T, B, n, C) final content.
        assigned: (D, B, n) int64, query of each instance, or -1; the same in all layers if T > 1.
        held: (T, D, B, n) bool, whether the instance holds its query at that frame: from its first appearance on.
        recognition: of every frame, from a network with ``identity``; of others nothing.
    """

    logits: Tensor
    boxes: Tensor
    masks: Tensor
    queries: Tensor
    assigned: Tensor
    held: Tensor
    recognition: Sequence[FrameRecognition] = ()


def clip_losses(outputs: ClipOutputs, targets: DenseTargets, normaliser: Tensor, window: int) -> LossTerms:
    """Compute the terms of equation 6 in float32.

    Where an instance that holds a query is not visible, its box is not asked for, its mask is empty and its class
    stays.

    Args:
        outputs: of the network.
        targets: of the batch.
        normaliser: scalar; every term is divided by it: the number of held instances over all frames, averaged over
            ranks.
        window: d of the contrastive loss.
    """
    with torch.autocast(outputs.logits.device.type, enabled=False):
        held = outputs.held.float()
        visible = held * targets.visible[:, None]
        boxes = outputs.boxes.float()
        target_boxes = targets.boxes[:, None]
        focal, dice = mask_losses(outputs.masks.float(), targets.masks[:, None] / 16, targets.pixels.float())
        appearance = recognition = normaliser.new_zeros(())
        if outputs.recognition:
            appearance, recognition = identity_losses(outputs.recognition)
        terms = LossTerms(
            classification=sigmoid_focal_loss(outputs.logits.float(), class_targets(outputs, targets.labels)).sum(),
            box_l1=((boxes - target_boxes).abs().sum(dim=-1) * visible).sum(),
            box_giou=((1 - generalized_box_iou(boxes, target_boxes)) * visible).sum(),
            mask_focal=(focal * held).sum(),
            mask_dice=(dice * held).sum(),
            contrastive=temporal_contrastive_loss(outputs.queries, outputs.held[:, -1], window),
            appearance=appearance,
            recognition=recognition,
        )
        return LossTerms(**{f.name: getattr(terms, f.name) / normaliser for f in fields(terms)})


def class_targets(outputs: ClipOutputs, labels: Tensor) -> Tensor:
    """(T, D, B, N, K) float32, one for the class of the instance that holds a query, from its first appearance on."""
    targets = torch.zeros_like(outputs.logits, dtype=torch.float32)
    cells = outputs.assigned.clamp(min=0) * targets.shape[-1] + labels  # of held ones no two are the same
    targets.flatten(3).scatter_add_(3, cells.expand_as(outputs.held), outputs.held.float())
    return targets


def mask_losses(logits: Tensor, target: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of masks (Lin et al.; Milletari et al.).

    Args:
        logits: (..., B, n, h, w).
        target: the same shape or broadcast to it, covered fraction of every cell in [0, 1].
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
