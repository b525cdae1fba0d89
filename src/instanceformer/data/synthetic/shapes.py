"""Paints textured shapes and a background into a frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from instanceformer.data.synthetic.options import SyntheticOptions

Array = NDArray[np.floating[Any]]


REACH = 1.3  # no outline extends farther from its center, in radii


def _polygon(corners: Array) -> Callable[[Array, Array], Array]:
    """The signed distance function of a slightly rounded polygon with ``corners`` (n, 2)."""
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
            crossed = ((py >= 0) != (py >= dy)) & ((px * dy < py * dx) == (dy > 0))  # by a ray toward +u
            inside ^= crossed
        return np.asarray(np.where(inside, -1, 1) * np.sqrt(squared) - 0.06, dtype=u.dtype)

    return distance


def _corners(radii: list[float], count: int) -> Array:
    """``count`` corners at equal angles; their distances from the center cycle through ``radii``."""
    angle = 2 * np.pi * np.arange(count) / count
    return np.asarray(np.resize(radii, count)[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1))


def _box(u: Array, v: Array, width: float, height: float) -> Array:
    return np.asarray(np.maximum(np.abs(u) - width, np.abs(v) - height))


def _blob(u: Array, v: Array) -> Array:
    angle = np.arctan2(v, u)
    return np.asarray(np.hypot(u, v) - (0.8 + 0.2 * np.sin(2 * angle) + 0.12 * np.cos(3 * angle)))


# Signed distance to the outline, in radii. All shapes have about the area of a circle of radius 1.
OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: _box(u, v, 0.88, 0.88),
    "triangle": _polygon(_corners([1.24], 3)),
    "star": _polygon(_corners([1.24, 0.56], 10)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.3,
    "cross": lambda u, v: np.minimum(_box(u, v, 1.15, 0.4), _box(u, v, 0.4, 1.15)),
    "blob": _blob,
}


BACKGROUND_OCTAVES = 4


@dataclass(frozen=True)
class Sprite:
    """A thing to draw: its outline, its paint, and for T frames its centers, radii and angles."""

    shape: str
    pattern: str
    colors: Array  # (2, 3) float32, RGB in [0, 1]
    frequency: float  # of the pattern, in radians per radius
    phase: float
    centers: Array  # (T, 2) as (x, y) in pixels
    radii: Array  # (T,) in pixels
    angles: Array  # (T,) in radians


def rgb(hue: float, saturation: float, value: float) -> Array:
    """Convert HSV to (3,) float32 RGB in [0, 1]; hue is in turns (any number), saturation and value are in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return np.asarray(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1), dtype=np.float32)


def make_background(rng: Generator, options: SyntheticOptions) -> tuple[Callable[[int], Array], Array]:
    """Make a background of smooth noise that moves at constant velocity.

    Returns:
        A function from the frame index to a (3, H, W) float32 RGB picture with 1 as full brightness, and the (T, 2)
        shift of the view as (x, y) in pixels.
    """
    heading = rng.uniform(0, 2 * np.pi)
    pace = options.background_speed * options.height * rng.uniform(0.5, 1.5)
    shift = options.frame_times[:, None] * pace * np.array([np.cos(heading), np.sin(heading)])
    shift -= shift.min(axis=0)
    extent = np.array([options.width, options.height]) + shift.max(axis=0)
    cells = [options.height / 2 / 2**octave for octave in range(BACKGROUND_OCTAVES)]
    grids = [rng.normal(size=(2, *(np.ceil(extent[::-1] / cell).astype(int) + 3))).astype(np.float32) for cell in cells]
    hue = rng.uniform()
    base = rgb(hue, rng.uniform(0.15, 0.4), rng.uniform(0.3, 0.55))
    tints = np.stack([rgb(hue + rng.uniform(0.2, 0.8), 0.4, 0.5) - 0.35, np.full(3, 0.25, dtype=np.float32)])

    def picture(t: int) -> Array:
        field = np.zeros((2, options.height, options.width), dtype=np.float32)
        for octave, (cell, grid) in enumerate(zip(cells, grids, strict=True)):
            x = _spline_weights((np.arange(options.width) + shift[t, 0]) / cell, grid.shape[2])
            y = _spline_weights((np.arange(options.height) + shift[t, 1]) / cell, grid.shape[1])
            field += 0.7**octave * (y @ grid @ x.T)
        return np.asarray(base[:, None, None] + np.tensordot(options.background_texture * tints.T, field, axes=1))

    return picture, shift


def _spline_weights(x: Array, count: int) -> Array:
    """(n, count) weights of the cubic B-splines at knots -1, 0, ... for (n,) points with 0 <= x <= count - 3."""
    distance = np.abs(x[:, None] + 1 - np.arange(count)).astype(np.float32)
    outer, inner = np.maximum(2 - distance, 0), np.maximum(1 - distance, 0)
    return np.asarray((outer * outer * outer - 4 * inner * inner * inner) / 6)


def draw(canvas: Array, sprite: Sprite, t: int, texture: float) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Paint a sprite into ``canvas`` in place, with a soft shadow around it.

    Args:
        canvas: (3, H, W) float32 RGB picture with 1 as full brightness.
        sprite: What to paint.
        t: Frame index.
        texture: Contrast of the sprite's pattern, in [0, 1].

    Returns:
        The rows and columns that the sprite may touch, and a bool array of the pixels in them that it covers by half or
        more.
    """
    _, height, width = canvas.shape
    (cx, cy), radius, angle = sprite.centers[t], sprite.radii[t], sprite.angles[t]
    halo = 0.04 * height
    reach = REACH * radius + halo + 1
    rows = slice(max(0, int(cy - reach)), max(0, min(height, int(cy + reach) + 1)))
    columns = slice(max(0, int(cx - reach)), max(0, min(width, int(cx + reach) + 1)))
    y = ((np.arange(rows.start, rows.stop) - cy) / radius).astype(np.float32)[:, None]
    x = ((np.arange(columns.start, columns.stop) - cx) / radius).astype(np.float32)[None, :]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    distance = OUTLINES[sprite.shape](u, v) * np.float32(radius)  # pixels to the outline, negative inside

    shadow = 1 - 0.4 * np.clip(1 - distance / halo, 0, 1) ** 2
    mix = np.float32(texture) * PATTERNS[sprite.pattern](u * sprite.frequency, v * sprite.frequency, sprite.phase)
    light = (1 - 0.12 * (x + y)) * (1 - 0.35 * np.clip(1 + distance / 1.5, 0, 1))  # from the top left; a dark rim
    first, second = sprite.colors[..., None, None]
    cover = np.clip(0.5 - distance, 0, 1)
    patch = canvas[:, rows, columns]
    patch *= shadow * (1 - cover)
    patch += (first + mix * (second - first)) * (cover * light)
    return rows, columns, distance <= 0


def _soft(wave: Array) -> Array:
    """Turn a wave in [-1, 1] into bands in [0, 1] with soft edges."""
    return 0.5 + 0.5 * np.tanh(3 * wave)


# How much of its second color a sprite shows, in [0, 1], as a function of coordinates and a phase in radians.
PATTERNS: dict[str, Callable[[Array, Array, float], Array]] = {
    "stripes": lambda u, v, phase: _soft(np.sin(u + phase) + 0 * v),
    "checks": lambda u, v, phase: _soft(np.sin(0.8 * u + phase) * np.sin(0.8 * v + phase)),
    "dots": lambda u, v, phase: _soft(np.cos(u) + np.cos(v) - 0.8),
    "noise": lambda u, v, phase: _soft(
        0.5 * (np.sin(0.9 * u + 1.3 * np.sin(0.7 * v + phase)) + np.sin(0.8 * v + 1.7 * np.sin(0.5 * u - phase)))
    ),
    "gradient": lambda u, v, phase: 0.5 + 0.5 * np.sin(0.3 * (u + v)),
}
