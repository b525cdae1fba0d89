"""The temporal contrastive loss (3.4, equation 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_contrastive_loss(queries: Tensor, held: Tensor, window: int, temperature: float = 0.07) -> Tensor:
    """Pull an instance towards its own past and away from everything else's.

    An anchor is an instance at frame t. Its positives are itself in the frames t - window to t - 1; its negatives every
    other instance of the clip in any earlier frame. For every positive the loss is minus the logarithm of its share in
    the softmax over all of them. An anchor's loss is the mean over its positives, as in supervised contrastive learning
    (Khosla et al.), where equation 5 has the sum, so that its weight does not depend on the window; the softmax leaves
    out the anchor's own past beyond the window. Anchors without a positive or without a negative give zero.

    Args:
        queries: (T, B, n, C) final content of the instances' queries.
        held: (T, B, n) bool, whether the instance holds its query at that frame.
        window: d, in frames.
        temperature: of the softmax.

    Returns:
        Scalar float32, the sum over all anchors.
    """
    frames, _, n, _ = queries.shape
    with torch.autocast(queries.device.type, enabled=False):
        unit = F.normalize(queries.float(), dim=-1)
        similarity = torch.einsum("tbic,fbjc->btifj", unit, unit) / temperature
    time = torch.arange(frames, device=queries.device)
    age = time[:, None] - time[None, :]
    both = held.permute(1, 0, 2)[:, :, :, None, None] & held.permute(1, 0, 2)[:, None, None, :, :]
    earlier = both & (age > 0)[None, :, None, :, None]
    same = torch.eye(n, dtype=torch.bool, device=queries.device)[None, None, :, None, :]
    positive = earlier & same & (age <= window)[None, :, None, :, None]
    negative = earlier & ~same
    contrast = positive | negative

    counted = positive.any(dim=(-2, -1)) & negative.any(dim=(-2, -1))
    # anchors that do not count see all of their similarities instead of none, so that nothing is infinite
    logits = similarity.masked_fill(~contrast & counted[..., None, None], -torch.inf)
    share = similarity - logits.flatten(-2).logsumexp(dim=-1)[..., None, None]
    mean = (share * positive).sum(dim=(-2, -1)) / positive.sum(dim=(-2, -1)).clamp(min=1)
    return -(mean * counted).sum()
