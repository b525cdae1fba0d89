"""Losses that teach a network with ``identity`` to recognize instances; beyond the paper, see ``model.identity``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from instanceformer.data.batch import DenseTargets
from instanceformer.model.encoder import FrameFeatures
from instanceformer.model.identity import Appearance, Sighting
from instanceformer.model.state import gather_queries
from instanceformer.training.contrastive import temporal_contrastive_loss

TEMPERATURE = 0.1
"""Temperature of the contrastive loss of looks."""

FREE_WRONG, FREE_RIGHT = 0.1, 0.5
"""Weights of a free query that does not show the instance and of one that does; the instance's own query has 1."""

STRANGE = 0.25
"""Weight of claims on instances of another clip, which the frame cannot show; those of its own clip have 1."""

SMALLEST = 4
"""Fewest cells of the mask logits that an instance must cover for its true mask to show what it looks like."""


@dataclass(frozen=True)
class FrameRecognition:
    """One frame of B clips, with n instances.

    Attributes:
        looks: (2, B, n, E) under the predicted mask of each instance's query, and under its true mask.
        shown: (2, B, n) bool, whether these are indeed the looks of the instance.
        loss: scalar, binary cross-entropy of the claims, summed over instances.
    """

    looks: Tensor
    shown: Tensor
    loss: Tensor


def recognize_frame(
    appearance: Appearance,
    features: FrameFeatures,
    sighting: Sighting,
    held: Tensor,
    assigned: Tensor,
    targets: DenseTargets,
    t: int,
) -> FrameRecognition:
    """Compare what the network recognizes in a frame with the ground truth.

    Args:
        appearance: the network's module.
        features: of the frame.
        sighting: of the frame, from the state that the network's own claims have led to, as in inference.
        held: (B, N) bool, queries that held an instance before the frame.
        assigned: (B, n) int64, query of each instance, or -1.
        targets: of the batch.
        t: index of the frame.
    """
    assert features.looks is not None
    truth, visible = targets.masks[t].float() / 16, targets.visible[t]
    has_query, query = assigned >= 0, assigned.clamp(min=0)
    large = visible & (truth.sum(dim=(-2, -1)) >= SMALLEST)
    if truth.shape[-2:] != sighting.masks.shape[-2:]:
        truth = F.avg_pool2d(truth, 2, ceil_mode=True)
    covering = torch.zeros(*held.shape, len(assigned[0]), dtype=torch.bool, device=held.device)
    rows = sighting.queries[..., None].expand(-1, -1, covering.shape[2])
    covering = covering.scatter(1, rows, covers(sighting.masks, truth) & visible[:, None])  # (B, N, n)
    right = covering.transpose(1, 2)

    claims = gather_queries(sighting.claims, query)  # (B, n, N)
    holds = query[..., None] == torch.arange(held.shape[1], device=held.device)
    weights = holds + torch.where(right, FREE_RIGHT, FREE_WRONG) * ~held[:, None]
    known = gather_queries(sighting.known, query) & has_query
    loss = F.binary_cross_entropy_with_logits(claims, right.float(), reduction="none") * weights * known[..., None]
    total = loss.sum()
    if sighting.strange is not None:
        strange, holds_stranger = sighting.strange
        is_own = torch.eye(strange.shape[1], dtype=torch.bool, device=strange.device)
        weights = torch.where(is_own, STRANGE, STRANGE * FREE_WRONG) * holds_stranger[..., None]
        total = total + (F.softplus(strange) * weights).sum()
    return FrameRecognition(
        looks=torch.stack((gather_queries(sighting.looks, query), appearance(features.looks, 20 * truth - 10))),
        shown=torch.stack(((right & holds).any(dim=-1) & has_query, large)),
        loss=total,
    )


def covers(masks: Tensor, truth: Tensor) -> Tensor:
    """Whether (B, M, h, w) mask logits have an IoU above 0.5 with (B, n, h, w) true masks in [0, 1]: (B, M, n) bool."""
    predicted, true = (x.float().flatten(2) for x in (masks > 0, truth > 0.5))
    shared = predicted @ true.transpose(1, 2)
    return shared > 0.5 * (predicted.sum(dim=-1)[..., None] + true.sum(dim=-1)[:, None] - shared)


def identity_losses(frames: Sequence[FrameRecognition]) -> tuple[Tensor, Tensor]:
    """Losses over the T frames of a batch of clips, summed over the instances of all frames.

    Returns:
        The contrastive loss of looks, which compares an instance at any distance in time with all others of all clips;
        the loss of the claims.
    """
    looks, shown = (torch.stack(x, dim=1) for x in zip(*((f.looks, f.shown) for f in frames), strict=True))
    looks, shown = looks.flatten(0, 1).flatten(1, 2)[:, None], shown.flatten(0, 1).flatten(1)[:, None]  # (2 T, 1, B n)
    contrast = temporal_contrastive_loss(looks, shown, len(looks), TEMPERATURE) / 2  # each instance is there twice
    return contrast, torch.stack([frame.loss for frame in frames]).sum()
