"""What a video shows: instances with their looks and paths, and distractors."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from instanceformer.data.synthetic.motion import choose_path, frame_times
from instanceformer.data.synthetic.options import SyntheticOptions
from instanceformer.data.synthetic.outlines import Array
from instanceformer.data.synthetic.painting import PATTERNS, Sprite, rgb


def make_instances(rng: Generator, options: SyntheticOptions) -> tuple[list[Sprite], list[int]]:
    """The instances of a video from back to front, and the number of the look that each of them wears."""
    count = int(rng.integers(options.min_instances, options.max_instances + 1))
    groups = _look_alike_groups(rng, count, options.look_alikes)
    hues = (rng.uniform() + rng.permutation(count) / count) % 1  # spread, so that only look-alikes look alike
    looks = [_look(rng, hue, options) for hue in hues]
    sizes = rng.uniform(options.min_size, options.max_size, count)[groups] * rng.uniform(0.92, 1.08, count)
    crossing = rng.permutation(count - 1) < int(options.occlusion * (count - 1) + rng.uniform())
    times = frame_times(options)
    sprites: list[Sprite] = []
    placed: list[tuple[Array, float]] = []
    for k in range(count):
        shape, pattern, colours, frequency = looks[groups[k]]
        mean = sizes[k] * options.height / 2
        swing = options.scale_change * rng.uniform(0.3, 1)
        centres = choose_path(rng, options, float(mean * (1 + swing)), placed, k > 0 and bool(crossing[k - 1]))
        placed.append((centres, float(mean)))
        sprites.append(
            Sprite(
                shape=shape,
                pattern=pattern,
                colours=np.clip(colours + rng.uniform(-0.02, 0.02, colours.shape), 0, 1).astype(np.float32),
                frequency=frequency,
                phase=rng.uniform(0, 2 * np.pi),
                centres=centres,
                radii=mean * (1 + swing * np.sin(rng.uniform(0, 2 * np.pi) + times * rng.uniform(0.1, 0.25))),
                angles=rng.uniform(0, 2 * np.pi) + times * np.deg2rad(rng.uniform(-1, 1) * options.rotation),
            )
        )
    order = rng.permutation(count)
    return [sprites[k] for k in order], [groups[k] for k in order]


def _look_alike_groups(rng: Generator, count: int, fraction: float) -> list[int]:
    """A look's number for each instance: pairs, and a triple where odd, share one; ``fraction`` of them on average."""
    members = int(fraction * count + rng.uniform())
    if members == 1:  # nothing looks like itself
        members = 2 * int(count > 1 and rng.uniform() < 0.5)
    pairs = members // 2
    return [min(k // 2, pairs - 1) if k < members else k for k in range(count)]


def _look(rng: Generator, hue: float, options: SyntheticOptions) -> tuple[str, str, Array, float]:
    """Shape, pattern, two colours and frequency of the pattern."""
    colours = np.stack(
        [
            rgb(hue, rng.uniform(0.65, 0.9), rng.uniform(0.8, 1)),
            rgb(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.2, 0.9), rng.choice([rng.uniform(0.2, 0.4), 1.0])),
        ]
    )
    return str(rng.choice(options.shapes)), str(rng.choice(list(PATTERNS))), colours, rng.uniform(6, 9)


def make_distractor(rng: Generator, options: SyntheticOptions, shift: Array) -> Sprite:
    """A dull blob on the background, which moves by ``shift`` (T, 2)."""
    middle = rng.integers(options.length)
    point = rng.uniform(0, [options.width, options.height])
    hue, still = rng.uniform(), np.ones(options.length)
    return Sprite(
        shape="blob",
        pattern="noise",
        colours=np.stack([rgb(hue, 0.2, value) for value in rng.uniform(0.25, 0.6, 2)]),
        frequency=rng.uniform(2, 4),
        phase=rng.uniform(0, 2 * np.pi),
        centres=point + shift[middle] - shift,
        radii=still * options.height / 2 * rng.uniform(options.min_size, options.max_size),
        angles=still * rng.uniform(0, 2 * np.pi),
    )
