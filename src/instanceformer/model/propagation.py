"""Prior propagation (3.2): where a query looks first, equation 1, and what it was taken for before, equation 2."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from instanceformer.model.attention import xavier_

LocationRule = Literal["none", "paper", "additive", "refined"]
LocationSource = Literal["content", "position"]


class LocationPropagation(nn.Module):
    """Reference points of a frame from the queries and their previous location (equation 1).

    A query that is not carried from the previous frame starts at sigmoid(W_ref q), under every rule. One that is:

    - ``none``: sigmoid(W_ref q), the previous location is not used;
    - ``paper``: sigmoid(sigmoid(W_ref q) * ref_{t-1}), equation 1 to the letter, which puts every reference between
      0.5 and 0.73 and leaves the way back to the decoder's box refinement;
    - ``additive``: sigmoid(sigmoid(W_ref q) + ref_{t-1}), a variant of the authors' release;
    - ``refined``: sigmoid(W_step q + logit(centre_{t-1})), the incremental change that the text describes, from the
      centre of the query's last box. W_step is zero at first: without having learned, nothing moves.

    What W_ref sees as q is the current content, as equation 1 says, or under source ``position`` the query's position
    embedding, which never changes: so do Deformable-DETR and the authors' release.
    """

    def __init__(self, dim: int, rule: LocationRule, source: LocationSource = "content") -> None:
        super().__init__()
        self.rule, self.source = rule, source
        self.reference = nn.Linear(dim, 2)
        xavier_(self.reference)
        if rule == "refined":
            self.step = nn.Linear(dim, 2)
            nn.init.zeros_(self.step.weight)
            nn.init.zeros_(self.step.bias)

    def forward(self, queries: Tensor, position: Tensor, previous: Tensor, carried: Tensor) -> Tensor:
        """Compute ref_t.

        Args:
            queries: (B, N, C) current content q_t.
            position: (N, C) position embedding.
            previous: (B, N, 2) in [0, 1]: ref_{t-1}, or the centre of the last box under ``refined``.
            carried: (B, N) bool, whether there is a previous location.

        Returns:
            (B, N, 2) float32 (x, y) in (0, 1).
        """
        seen = queries if self.source == "content" else position.expand_as(queries)
        start: Tensor = self.reference(seen).float().sigmoid()
        if self.rule == "none":
            return start
        if self.rule == "paper":
            moved = (start * previous).sigmoid()
        elif self.rule == "additive":
            moved = (start + previous).sigmoid()
        else:
            moved = (self.step(queries).float() + logit(previous)).sigmoid()
        return torch.where(carried[..., None], moved, start)


class ClassPrior(nn.Module):
    """Class logits of a frame as a weighted sum over the last frames (equation 2).

    c_t = sum over f in {t-d, ..., t} of w_f * c_f with w = softmax over f of sigmoid(T_cls c_f), one weight for each
    frame and class. (Weights on the current logits alone, the other reading, would sum to one and change nothing.)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.temporal = nn.Linear(num_classes, num_classes)

    def forward(self, logits: Tensor, history: Tensor, filled: Tensor) -> Tensor:
        """Smooth the logits over time.

        Args:
            logits: (B, N, K) raw logits of the current frame.
            history: (B, d, N, K) raw logits of the previous frames.
            filled: (B, d, N) bool, which of them are there.

        Returns:
            (B, N, K) float32; the raw logits where there is no history.
        """
        frames = torch.cat((logits[:, None], history), dim=1).float()
        scores = self.temporal(frames).float().sigmoid()
        present = torch.cat((torch.ones_like(filled[:, :1]), filled), dim=1)
        weights = scores.masked_fill(~present[..., None], -torch.inf).softmax(dim=1)
        smoothed: Tensor = (weights * frames).sum(dim=1)
        return smoothed


def logit(fraction: Tensor, eps: float = 1e-5) -> Tensor:
    """Inverse of the sigmoid for values in [0, 1], kept ``eps`` away from both ends."""
    fraction = fraction.clamp(eps, 1 - eps)
    return torch.log(fraction / (1 - fraction))
