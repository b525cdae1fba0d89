"""A synthetic video: instances and their paths, frames, and annotations of what is visible."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_length

from instanceformer.data.formats.youtube_vis import track_fields
from instanceformer.data.synthetic.options import SPLITS, SyntheticOptions
from instanceformer.data.synthetic.shapes import PATTERNS, REACH, Array, Sprite, draw, make_background, rgb

JPEG_QUALITY = 92
PATH_CANDIDATES = 12  # paths tried per instance; the one that overlaps others least is used


@dataclass(frozen=True)
class DrawnVideo:
    """A video whose frames have been written.

    Attributes:
        entry: the video's entry in the annotation file, without id.
        annotations: the annotations of its visible instances, without ids.
        look_alikes: whether each annotated instance has a look-alike.
        shown: (T,) bool, whether a frame shows any instance.
        hidden: (T,) bool, whether a frame has an instance that is more than half hidden.
    """

    entry: dict[str, Any]
    annotations: list[dict[str, Any]]
    look_alikes: list[bool]
    shown: NDArray[np.bool_]
    hidden: NDArray[np.bool_]


def make_video(directory: Path, options: SyntheticOptions, split: str, index: int) -> DrawnVideo:
    """Draw one video and write its frames. The result depends only on the options, the split and the index.

    Args:
        directory: The dataset's directory. Frames go to ``JPEGImages/<split>_<index>`` in it, which must not exist yet.
        options: What the videos show.
        split: Name of the split, train or valid.
        index: Index of the video in its split.
    """
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    instances, groups = _make_instances(rng, options)
    backdrop, shift = make_background(rng, options)
    blobs = [_make_distractor(rng, options, shift) for _ in range(options.distractors)]
    gain = 1 + options.brightness_change * np.sin(
        rng.uniform(0, 2 * np.pi) + options.frame_times * rng.uniform(0.1, 0.3)
    )

    name = f"{split}_{index:04d}"
    folder = directory / "JPEGImages" / name
    folder.mkdir(parents=True)
    size = {"height": options.height, "width": options.width, "length": options.length}
    annotations: list[dict[str, Any]] = [
        {"category_id": options.shapes.index(s.shape) + 1, "iscrowd": 0, **size, "segmentations": [], "occlusion": []}
        for s in instances
    ]
    shown, hidden = np.zeros((2, options.length), dtype=np.bool_)
    for t in range(options.length):
        canvas = backdrop(t)
        for blob in blobs:
            draw(canvas, blob, t, options.texture)
        owner = np.full((options.width, options.height), -1, dtype=np.int16).T  # column-major, like run lengths
        alone = np.zeros(len(instances), dtype=np.int64)  # area in the frame without the other instances
        for k, sprite in enumerate(instances):  # from back to front
            rows, columns, inside = draw(canvas, sprite, t, options.texture)
            owner[rows, columns][inside] = k
            alone[k] = inside.sum()
        pixels = np.rint(np.clip(canvas * (255 * float(gain[t])), 0, 255)).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{t:05d}.jpg", quality=JPEG_QUALITY)

        masks = run_length.encode((np.arange(len(instances))[:, None, None] == owner.T).view(np.uint8).T)
        areas = run_length.area(masks)
        shown[t], hidden[t] = (areas > 0).any(), (2 * areas < alone).any()
        for k, annotation in enumerate(annotations):
            visible = areas[k] > 0
            annotation["segmentations"].append(masks[k]["counts"] if visible else None)
            annotation["occlusion"].append(_occlusion_level(int(areas[k]), int(alone[k])) if visible else None)
    for annotation in annotations:
        annotation.update(track_fields(annotation["segmentations"], options.height, options.width))

    seen = [k for k, annotation in enumerate(annotations) if any(annotation["areas"])]
    files = [f"{name}/{t:05d}.jpg" for t in range(options.length)]
    return DrawnVideo(
        entry={**size, "file_names": files},
        annotations=[annotations[k] for k in seen],
        look_alikes=[sum(groups[k] == groups[other] for other in seen) > 1 for k in seen],
        shown=shown,
        hidden=hidden,
    )


def _occlusion_level(visible: int, alone: int) -> str:
    """OVIS's level for how much of an instance others hide; here, severe means more than half."""
    if visible == alone:
        return "no_occlusion"
    return "severe_occlusion" if 2 * visible < alone else "slight_occlusion"


def _make_instances(rng: Generator, options: SyntheticOptions) -> tuple[list[Sprite], list[int]]:
    """The instances of a video from back to front, and the number of each one's look."""
    count = int(rng.integers(options.min_instances, options.max_instances + 1))
    groups = _look_alike_groups(rng, count, options.look_alikes)
    hues = (rng.uniform() + rng.permutation(count) / count) % 1  # evenly spread, so that only look-alikes look alike
    looks = [_look(rng, hue, options) for hue in hues]
    sizes = rng.uniform(options.min_size, options.max_size, count)[groups] * rng.uniform(0.92, 1.08, count)
    crossing = rng.permutation(count - 1) < int(options.occlusion * (count - 1) + rng.uniform())
    times = options.frame_times
    sprites: list[Sprite] = []
    placed: list[tuple[Array, float]] = []
    for k in range(count):
        shape, pattern, colors, frequency = looks[groups[k]]
        mean = sizes[k] * options.height / 2
        swing = options.scale_change * rng.uniform(0.3, 1)
        centers = _choose_path(rng, options, float(mean * (1 + swing)), placed, k > 0 and bool(crossing[k - 1]))
        placed.append((centers, float(mean)))
        sprites.append(
            Sprite(
                shape=shape,
                pattern=pattern,
                colors=np.clip(colors + rng.uniform(-0.02, 0.02, colors.shape), 0, 1).astype(np.float32),
                frequency=frequency,
                phase=rng.uniform(0, 2 * np.pi),
                centers=centers,
                radii=mean * (1 + swing * np.sin(rng.uniform(0, 2 * np.pi) + times * rng.uniform(0.1, 0.25))),
                angles=rng.uniform(0, 2 * np.pi) + times * np.deg2rad(rng.uniform(-1, 1) * options.rotation),
            )
        )
    order = rng.permutation(count)
    return [sprites[k] for k in order], [groups[k] for k in order]


def _look_alike_groups(rng: Generator, count: int, fraction: float) -> list[int]:
    """The number of each instance's look; on average, ``fraction`` of them share looks in pairs (or one triple)."""
    members = int(fraction * count + rng.uniform())
    if members == 1:  # a look-alike needs a partner
        members = 2 * int(count > 1 and rng.uniform() < 0.5)
    pairs = members // 2
    return [min(k // 2, pairs - 1) if k < members else k for k in range(count)]


def _look(rng: Generator, hue: float, options: SyntheticOptions) -> tuple[str, str, Array, float]:
    """Draw a look: shape, pattern, two colors and the frequency of the pattern."""
    colors = np.stack(
        [
            rgb(hue, rng.uniform(0.65, 0.9), rng.uniform(0.8, 1)),
            rgb(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.2, 0.9), rng.choice([rng.uniform(0.2, 0.4), 1.0])),
        ]
    )
    return str(rng.choice(options.shapes)), str(rng.choice(list(PATTERNS))), colors, rng.uniform(6, 9)


def _make_distractor(rng: Generator, options: SyntheticOptions, shift: Array) -> Sprite:
    """A dull blob that drifts with the background, whose view moves by ``shift`` (T, 2)."""
    middle = rng.integers(options.length)
    point = rng.uniform(0, [options.width, options.height])
    hue, still = rng.uniform(), np.ones(options.length)
    return Sprite(
        shape="blob",
        pattern="noise",
        colors=np.stack([rgb(hue, 0.2, value) for value in rng.uniform(0.25, 0.6, 2)]),
        frequency=rng.uniform(2, 4),
        phase=rng.uniform(0, 2 * np.pi),
        centers=point + shift[middle] - shift,
        radii=still * options.height / 2 * rng.uniform(options.min_size, options.max_size),
        angles=still * rng.uniform(0, 2 * np.pi),
    )


def _choose_path(
    rng: Generator, options: SyntheticOptions, radius: float, placed: list[tuple[Array, float]], crossing: bool
) -> Array:
    """Choose the path of an instance: as clear as possible of those already placed, or crossing one of them.

    Args:
        rng: Random number generator.
        options: What the videos show.
        radius: Maximum radius of the instance in pixels.
        placed: (T, 2) centers and mean radius, in pixels, of each instance already placed.
        crossing: Whether the path must meet one of ``placed``, which then must not be empty.

    Returns:
        (T, 2) centers as (x, y) in pixels; outside the frame where the instance is out of view.
    """
    frame = np.array([options.width, options.height], dtype=np.float64)
    low, high = np.minimum(0.8 * radius, 0.5 * frame - 1), np.maximum(frame - 0.8 * radius, 0.5 * frame + 1)
    outside = None
    away = _time_away(rng, options)
    if away is not None:  # stay near the side where it enters and leaves
        axis, far = int(rng.integers(2)), bool(rng.integers(2))
        third = (high[axis] - low[axis]) / 3
        low[axis], high[axis] = (high[axis] - third, high[axis]) if far else (low[axis], low[axis] + third)
        outside = (axis, frame[axis] + REACH * radius + 1 if far else -REACH * radius - 1)

    def path(point: Array, time: float) -> Array:
        centers = _wander(rng, low, high, np.clip(point, low, high), time, options)
        if outside is not None and away is not None:
            axis, target = outside
            centers[:, axis] += away * (target - centers[:, axis])
        return centers

    if crossing:
        others, size = placed[int(rng.integers(len(placed)))]
        meeting = int(rng.uniform(0.15, 0.85) * options.length)
        point = others[meeting] + rng.uniform(-0.25, 0.25, 2) * size
        candidates = [path(point, meeting) for _ in range(PATH_CANDIDATES)]
    else:
        candidates = [path(rng.uniform(low, high), 0) for _ in range(PATH_CANDIDATES)]
    return min(candidates, key=lambda centers: _crowding(centers, radius, placed))


def _wander(rng: Generator, low: Array, high: Array, point: Array, time: float, options: SyntheticOptions) -> Array:
    """A smooth (T, 2) path between ``low`` and ``high``, a sine in x and in y, that is at ``point`` at ``time``."""
    heading = rng.uniform(0, 2 * np.pi)
    velocity = options.speed * options.height * rng.uniform(0.6, 1.4) * np.array([np.cos(heading), np.sin(heading)])
    reach = (high - low) / 2 * rng.uniform(0.6, 1, 2)
    middle = np.clip(point + reach * rng.uniform(-0.8, 0.8, 2), low + reach, high - reach)
    phase = np.arcsin(np.clip((point - middle) / reach, -1, 1))
    return np.asarray(middle + reach * np.sin(phase + velocity / reach * (options.frame_times[:, None] - time)))


def _crowding(centers: Array, radius: float, placed: list[tuple[Array, float]]) -> float:
    """How much a path overlaps those in ``placed``, summed over frames and instances."""
    gaps = [np.linalg.norm(centers - others, axis=1) / (radius + size) for others, size in placed]
    return float(sum(np.clip(1 - gap, 0, 1).sum() for gap in gaps))


def _time_away(rng: Generator, options: SyntheticOptions) -> Array | None:
    """How far out of view an instance has moved in each frame, (T,) from 0 to 1; None if it stays in view."""
    length, ramp, draw = options.length, options.length / 4, rng.uniform()
    times = options.frame_times

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
