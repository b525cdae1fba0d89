"""Outlines of shapes, as signed distance functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


REACH = 1.3  # no outline goes farther from its centre, in radii


def _polygon(corners: Array) -> Callable[[Array, Array], Array]:
    """The signed distance function of a polygon with ``corners`` (n, 2), slightly rounded."""
    edges = []
    for (x, y), (next_x, next_y) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        edges.append((x, y, next_x - x, next_y - y))

    def distance(u: Array, v: Array) -> Array:
        squared = np.full(u.shape, np.inf, dtype=u.dtype)
        inside = np.zeros(u.shape, dtype=np.bool_)
        for x, y, dx, dy in edges:
            px, py = u - x, v - y
            along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
            squared = np.minimum(squared, (px - along * dx) ** 2 + (py - along * dy) ** 2)
            crossed = ((py >= 0) != (py >= dy)) & ((px * dy < py * dx) == (dy > 0))  # by a ray towards +u
            inside ^= crossed
        return np.asarray(np.where(inside, -1, 1) * np.sqrt(squared) - 0.06, dtype=u.dtype)

    return distance


def _corners(radii: list[float], count: int) -> Array:
    """``count`` corners at equal angles whose distances from the centre repeat ``radii``."""
    angle = 2 * np.pi * np.arange(count) / count
    return np.asarray(np.resize(radii, count)[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1))


def _box(u: Array, v: Array, width: float, height: float) -> Array:
    return np.asarray(np.maximum(np.abs(u) - width, np.abs(v) - height))


def _blob(u: Array, v: Array) -> Array:
    angle = np.arctan2(v, u)
    return np.asarray(np.hypot(u, v) - (0.8 + 0.2 * np.sin(2 * angle) + 0.12 * np.cos(3 * angle)))


# Signed distance to the outline in radii; the areas are about those of the circle of radius 1.
OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: _box(u, v, 0.88, 0.88),
    "triangle": _polygon(_corners([1.24], 3)),
    "star": _polygon(_corners([1.24, 0.56], 10)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.3,
    "cross": lambda u, v: np.minimum(_box(u, v, 1.15, 0.4), _box(u, v, 0.4, 1.15)),
    "blob": _blob,
}
