"""Prior propagation (3.2): where a query starts looking (equation 1) and its class in earlier frames (equation 2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from instanceformer.model.attention import xavier_

LocationRule = Literal["none", "paper", "refined"]


class LocationPropagation(nn.Module):
    """Reference points for a frame, from the queries and their previous locations (equation 1).

    The paper: ref_t = sigmoid(sigmoid(W_ref(q_t)) * ref_{t-1}), and sigmoid(W_ref(q_t)) in the first frame. Ours, by
    ``rule``:

    - ``paper``: the same; for a query that is not carried over from the previous frame, this frame counts as its first.
      References of carried queries all lie between 0.5 and 0.73, which the decoder's box refinement has to undo;
    - ``refined``: sigmoid(W_step(q_t) + logit(center_{t-1})), with the center of the query's last box. Differs because
      the text describes an incremental change. W_step starts at zero: an untrained network moves nothing;
    - ``none``: sigmoid(W_ref(q_t)) in every frame, without propagation (a row of table 4).
    """

    def __init__(self, dim: int, rule: LocationRule) -> None:
        super().__init__()
        self.rule = rule
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
            position: (N, C) position embedding; only the release's variant reads it.
            previous: (B, N, 2) in [0, 1]: ref_{t-1}, or the center of the last box under ``refined``.
            carried: (B, N) bool, true where a query has a previous location.

        Returns:
            (B, N, 2) float32 (x, y) in (0, 1).
        """
        start = self.start(queries, position)
        if self.rule == "none":
            return start
        return torch.where(carried[..., None], self.move(queries, start, previous), start)

    def start(self, queries: Tensor, position: Tensor) -> Tensor:
        """(B, N, 2) sigmoid(W_ref(q_t)); arguments as in ``forward``."""
        start: Tensor = self.reference(queries).float().sigmoid()
        return start

    def move(self, queries: Tensor, start: Tensor, previous: Tensor) -> Tensor:
        """(B, N, 2) ref_t of carried queries; ``start`` is sigmoid(W_ref(q_t)), other arguments as in ``forward``."""
        if self.rule == "refined":
            step: Tensor = self.step(queries).float()
            return (step + logit(previous)).sigmoid()
        return (start * previous).sigmoid()


class ClassPrior(nn.Module):
    """Class logits of a frame as a weighted sum over the last frames (equation 2).

    The paper: c_t = sigmoid(W_cls(q_t)) * Softmax(sigmoid(T_cls([c_f], f = t-d to t-1))).
    Ours: c_t = sum over f in {t-d, ..., t} of w_f * c_f, with w = softmax over f of sigmoid(T_cls(c_f)): one weight per
    frame and class, over the frames that exist. Differs because, as printed, the weights multiply the current logits
    alone; they sum to one over time and would change nothing.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.temporal = nn.Linear(num_classes, num_classes)

    def forward(self, logits: Tensor, history: Tensor, filled: Tensor) -> Tensor:
        """Smooth the logits over time.

        Args:
            logits: (B, N, K) raw logits of the current frame.
            history: (B, d, N, K) raw logits of the previous frames.
            filled: (B, d, N) bool, which of them exist.

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
    """Inverse of the sigmoid, for values in [0, 1], which are clamped to [eps, 1 - eps]."""
    fraction = fraction.clamp(eps, 1 - eps)
    return torch.log(fraction / (1 - fraction))
