"""What anti-aliasing and blur make of the edges of a mask: labels that are no objects."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_RIMS = 8
"""As many labels without an inside, and more than half of an image's, are no objects but shades of an edge."""
MAX_INSIDE = 0.1
"""Most of a rim's pixels that have its label on all sides; of a square of 4 x 4 pixels it is a quarter."""
MIN_TOUCHING = 0.5
"""Least of a rim's pixels beside which there is another label that is not background."""


def find_rims(labels: NDArray[Any]) -> list[int]:
    """The labels that have hardly an inside and lie along others, as the shades of a blurred edge do.

    Small and thin objects have no inside either, but more of background than of others beside them.

    Args:
        labels: (height, width) integers, zero for background.
    """
    around = np.pad(labels, 1, mode="edge")  # what the frame cuts off goes on
    sides = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    is_inside, touches = labels > 0, np.zeros(labels.shape, dtype=np.bool_)
    for side in sides:
        differs = side != labels
        is_inside &= ~differs
        touches |= differs & (side > 0)
    count = np.bincount(labels.ravel())
    inside = np.bincount(labels[is_inside], minlength=len(count))
    touching = np.bincount(labels[touches], minlength=len(count))
    is_rim = (count > 0) & (inside < MAX_INSIDE * count) & (touching > MIN_TOUCHING * count)
    return [label for label in np.flatnonzero(is_rim).tolist() if label > 0]


def are_shades(rims: int, labels: int) -> bool:
    """Whether so many rims among so many labels of an image are no objects."""
    return rims >= MAX_RIMS and 2 * rims > labels
