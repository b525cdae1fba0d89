"""Paths of instances: smooth, crossing one another or keeping clear, and out of view for a while."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from instanceformer.data.synthetic.options import SyntheticOptions
from instanceformer.data.synthetic.outlines import REACH, Array

PATH_CANDIDATES = 12  # paths tried for an instance, of which the one that overlaps the others least is taken


def frame_times(options: SyntheticOptions) -> Array:
    """The numbers of a video's T frames, (T,) float64."""
    return np.arange(options.length, dtype=np.float64)


def choose_path(
    rng: Generator, options: SyntheticOptions, radius: float, placed: list[tuple[Array, float]], crossing: bool
) -> Array:
    """Choose the path of an instance, as clear of those that are placed as can be, or crossing one of them.

    Args:
        rng: Where everything random comes from.
        options: What the videos show.
        radius: Largest radius of the instance, in pixels.
        placed: Centres (T, 2) and mean radius of each instance that has its path, in pixels.
        crossing: Whether the path meets one of ``placed``, which then must not be empty.

    Returns:
        (T, 2) centres as (x, y) in pixels, outside the frame where the instance is out of view.
    """
    frame = np.array([options.width, options.height], dtype=np.float64)
    low, high = np.minimum(0.8 * radius, 0.5 * frame - 1), np.maximum(frame - 0.8 * radius, 0.5 * frame + 1)
    outside = None
    away = _time_away(rng, options)
    if away is not None:  # stays near the side where it enters and leaves
        axis, far = int(rng.integers(2)), bool(rng.integers(2))
        third = (high[axis] - low[axis]) / 3
        low[axis], high[axis] = (high[axis] - third, high[axis]) if far else (low[axis], low[axis] + third)
        outside = (axis, frame[axis] + REACH * radius + 1 if far else -REACH * radius - 1)

    def path(point: Array, time: float) -> Array:
        centres = _wander(rng, low, high, np.clip(point, low, high), time, options)
        if outside is not None and away is not None:
            axis, target = outside
            centres[:, axis] += away * (target - centres[:, axis])
        return centres

    if crossing:
        others, size = placed[int(rng.integers(len(placed)))]
        meeting = int(rng.uniform(0.15, 0.85) * options.length)
        point = others[meeting] + rng.uniform(-0.25, 0.25, 2) * size
        candidates = [path(point, meeting) for _ in range(PATH_CANDIDATES)]
    else:
        candidates = [path(rng.uniform(low, high), 0) for _ in range(PATH_CANDIDATES)]
    return min(candidates, key=lambda centres: _crowding(centres, radius, placed))


def _wander(rng: Generator, low: Array, high: Array, point: Array, time: float, options: SyntheticOptions) -> Array:
    """A smooth path (T, 2) within ``low`` and ``high``, a sine in x and in y, that is at ``point`` at ``time``."""
    heading = rng.uniform(0, 2 * np.pi)
    velocity = options.speed * options.height * rng.uniform(0.6, 1.4) * np.array([np.cos(heading), np.sin(heading)])
    reach = (high - low) / 2 * rng.uniform(0.6, 1, 2)
    middle = np.clip(point + reach * rng.uniform(-0.8, 0.8, 2), low + reach, high - reach)
    phase = np.arcsin(np.clip((point - middle) / reach, -1, 1))
    return np.asarray(middle + reach * np.sin(phase + velocity / reach * (frame_times(options)[:, None] - time)))


def _crowding(centres: Array, radius: float, placed: list[tuple[Array, float]]) -> float:
    """How much a path overlaps those of ``placed``, summed over frames and instances."""
    gaps = [np.linalg.norm(centres - others, axis=1) / (radius + size) for others, size in placed]
    return float(sum(np.clip(1 - gap, 0, 1).sum() for gap in gaps))


def _time_away(rng: Generator, options: SyntheticOptions) -> Array | None:
    """How far, (T,) from 0 to 1, an instance is on its way out of view; None if it stays."""
    length, ramp, draw = options.length, options.length / 4, rng.uniform()
    times = frame_times(options)

    def passed(start: float) -> Array:
        return _smooth_step((times - start) / ramp)

    if draw < options.late_entry:
        return 1 - passed(rng.uniform(1, length / 2))
    if draw < options.late_entry + options.absence:
        start = rng.uniform(0.08, 0.22) * length
        return passed(start) - passed(start + ramp + max(1, rng.uniform(0.08, 0.2) * length))
    if draw < options.late_entry + options.absence + options.leave:
        return passed(rng.uniform(length / 2, 0.75 * length - 1))
    return None


def _smooth_step(x: Array) -> Array:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
