"""The temporal contrastive loss (3.4, equation 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_contrastive_loss(queries: Tensor, has_query: Tensor, window: int, temperature: float = 0.07) -> Tensor:
    """Pull each instance toward its own past and away from the past of all others.

    Equation 5 as printed, for instance i at frame t::

        L_t^i = - sum_{f=t-d}^{t-1} log( exp(q_t^i . q_f^i / tau) / sum_{j=0}^{t-1} exp(q_t^i . q_f^j / tau) )

    and as computed, with unit vectors u = q / |q|, P the frames of [t - d, t - 1] in which i has a query, and S all
    (f, j) with f < t in which another instance j has a query, together with the (f, i) of P::

        L_t^i = - 1/|P| sum_{f in P} log( exp(u_t^i . u_f^i / tau) / sum_{(g, j) in S} exp(u_t^i . u_g^j / tau) )

    It differs because (a) j of the printed denominator runs over frames, not instances; it is read as all instances in
    all earlier frames, except the anchor's own past beyond the window, which is neither positive nor negative; (b) the
    mean over positives and the unit vectors come from supervised contrastive learning (Khosla et al.), which the paper
    adopts; with the printed sum, an anchor's weight would depend on the window. An anchor without a positive or without
    a negative contributes zero.

    Args:
        queries: (T, B, n, C) final content of the instances' queries.
        has_query: (T, B, n) bool, whether the instance has a query in that frame.
        window: d, in frames.
        temperature: tau.

    Returns:
        Scalar float32, summed over all anchors.
    """
    frames, _, n, _ = queries.shape
    with torch.autocast(queries.device.type, enabled=False):
        unit = F.normalize(queries.float(), dim=-1)
        similarity = torch.einsum("tbic,fbjc->btifj", unit, unit) / temperature
    time = torch.arange(frames, device=queries.device)
    age = time[:, None] - time[None, :]
    both = has_query.permute(1, 0, 2)[:, :, :, None, None] & has_query.permute(1, 0, 2)[:, None, None, :, :]
    earlier = both & (age > 0)[None, :, None, :, None]
    same = torch.eye(n, dtype=torch.bool, device=queries.device)[None, None, :, None, :]
    positive = earlier & same & (age <= window)[None, :, None, :, None]
    negative = earlier & ~same
    contrast = positive | negative

    counted = positive.any(dim=(-2, -1)) & negative.any(dim=(-2, -1))
    # anchors that do not count keep all of their similarities rather than none, so that nothing is infinite
    logits = similarity.masked_fill(~contrast & counted[..., None, None], -torch.inf)
    share = similarity - logits.flatten(-2).logsumexp(dim=-1)[..., None, None]
    mean = (share * positive).sum(dim=(-2, -1)) / positive.sum(dim=(-2, -1)).clamp(min=1)
    return -(mean * counted).sum()
