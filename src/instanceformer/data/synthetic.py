"""Synthetic videos in YouTube-VIS format: textured shapes that cross, hide one another, leave, enter and come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_length

Array = NDArray[np.floating[Any]]
Shape = Literal["circle", "square", "triangle", "star", "ring", "cross"]

SPLITS = ("train", "valid")
PATH_CANDIDATES = 12  # paths tried for an instance, of which the one that overlaps the others least is taken
BACKGROUND_OCTAVES = 4
JPEG_QUALITY = 92
REACH = 1.3  # no outline goes farther from its centre, in radii


@dataclass(frozen=True)
class SyntheticOptions:
    """What the videos show and how hard they are.

    Attributes:
        train_videos: Number of videos of the train split; more of them leave the earlier ones as they are.
        valid_videos: Number of videos of the valid split, drawn from another random stream.
        length: Frames of each video.
        height: Height of the frames in pixels; every length below scales with it.
        width: Width of the frames in pixels.
        min_instances: Fewest instances of a video.
        max_instances: Most instances of a video.
        shapes: The classes in the order of their ids, out of circle, square, triangle, star, ring and cross.
        min_size: Smallest mean diameter of an instance, as a fraction of the height.
        max_size: Largest mean diameter of an instance, as a fraction of the height.
        speed: Typical peak speed of an instance, in heights per frame.
        rotation: Fastest rotation of an instance, in degrees per frame.
        scale_change: Largest change of an instance's size over the video, as a fraction of its mean size, in [0, 0.9].
        brightness_change: Swing of the brightness of a whole video, as a fraction of its mean, in [0, 0.9].
        texture: Contrast of the instances' textures: 0 paints them plain, 1 with two unlike colours.
        background_texture: Contrast of the moving background: 0 is one plain colour.
        distractors: Unannotated, dull blobs that drift with the background, per video.
        background_speed: Speed of the background, in heights per frame.
        occlusion: Fraction of instances, after a video's first, sent across the path of another; the rest keep clear.
        look_alikes: Fraction of instances with the class and almost the looks of another one of the same video.
        late_entry: Fraction of instances that are out of view at the start and enter during the first half.
        absence: Fraction of instances that leave the view and come back.
        leave: Fraction of instances that leave the view for good during the second half.
        seed: Seed of everything random.
        workers: Processes that render; the result does not depend on it.

    Raises:
        ValueError: If an option is out of its range or two options contradict each other.
    """

    train_videos: int = 240
    valid_videos: int = 24
    length: int = 24
    height: int = 96
    width: int = 160
    min_instances: int = 3
    max_instances: int = 6
    shapes: tuple[Shape, ...] = ("circle", "square", "triangle", "star")
    min_size: float = 0.25
    max_size: float = 0.5
    speed: float = 0.045
    rotation: float = 4.0
    scale_change: float = 0.15
    brightness_change: float = 0.12
    texture: float = 0.8
    background_texture: float = 0.6
    distractors: int = 2
    background_speed: float = 0.01
    occlusion: float = 0.5
    look_alikes: float = 0.35
    late_entry: float = 0.1
    absence: float = 0.08
    leave: float = 0.04
    seed: int = 4  # of 0 to 5, the one whose valid split is nearest in difficulty to what many videos average
    workers: int = 2

    def __post_init__(self) -> None:
        unbounded = float(2**31)
        limits: dict[str, tuple[float, float]] = {
            **dict.fromkeys(("train_videos", "valid_videos", "length", "min_instances", "workers"), (1, unbounded)),
            **dict.fromkeys(("height", "width"), (32, unbounded)),
            **dict.fromkeys(("rotation", "distractors", "seed"), (0, unbounded)),
            **dict.fromkeys(("scale_change", "brightness_change"), (0, 0.9)),
            "max_instances": (self.min_instances, unbounded),
            "min_size": (0.05, 1),
            "max_size": (self.min_size, 1),
        }
        for name in (field.name for field in fields(self) if field.name != "shapes"):
            low, high = limits.get(name, (0, 1))
            if not low <= getattr(self, name) <= high:
                expected = f"at least {low:g}" if high == unbounded else f"{low:g} to {high:g}"
                raise ValueError(f"SyntheticOptions.{name} is {getattr(self, name)}; expected {expected}")
        if not self.shapes or set(self.shapes) - set(get_args(Shape)) or len(set(self.shapes)) < len(self.shapes):
            raise ValueError(
                f"SyntheticOptions.shapes is {self.shapes}; expected some of {get_args(Shape)}, each at most once"
            )
        if self.max_size * self.height > self.width:
            raise ValueError(
                f"SyntheticOptions.max_size of {self.max_size} x height {self.height} is wider than the frame of "
                f"{self.width} pixels; lower max_size or raise width"
            )
        travellers = self.late_entry + self.absence + self.leave
        if travellers > 1:
            raise ValueError(
                f"SyntheticOptions.late_entry, absence and leave add up to {travellers:g}; expected at most 1, "
                "as an instance does one of them"
            )
        if travellers > 0 and self.length < 8:
            raise ValueError(
                f"SyntheticOptions.length is {self.length}, too short to enter or leave the view; expected at least 8, "
                "or late_entry, absence and leave of 0"
            )


DEFAULT_OPTIONS = SyntheticOptions()


@dataclass(frozen=True)
class SplitStatistics:
    """How hard one split turned out, measured on its masks.

    Attributes:
        videos: Number of videos.
        frames: Number of frames.
        instances: Number of annotated instances.
        hidden: Fraction, of the frames that show an instance, in which one or more instances are more than half hidden:
            the visible area is less than half of the area that the instance would have in the frame by itself.
        absent_at_start: Fraction of instances not visible in the first frame.
        returning: Fraction of instances that are visible, then not, then visible again, hidden or out of view.
        look_alikes: Fraction of instances with a look-alike among the instances of their video.
    """

    videos: int
    frames: int
    instances: int
    hidden: float
    absent_at_start: float
    returning: float
    look_alikes: float


@dataclass(frozen=True)
class SyntheticSummary:
    """What ``synthesize`` wrote; ``str()`` gives a table.

    Attributes:
        train: Statistics of the train split.
        valid: Statistics of the valid split.
    """

    train: SplitStatistics
    valid: SplitStatistics

    def __str__(self) -> str:
        labels = (
            "videos",
            "frames",
            "instances",
            "frames with an instance more than half hidden",
            "instances absent in the first frame",
            "instances that vanish and return",
            "instances with a look-alike",
        )
        columns = [
            [f"{value:.1%}" if isinstance(value, float) else str(value) for value in astuple(split)]
            for split in (self.train, self.valid)
        ]
        rows = [("", *SPLITS), *zip(labels, *columns, strict=True)]
        return "\n".join(f"{label:<46}{train:>8}{valid:>8}" for label, train, valid in rows)


def synthesize(
    directory: Path, options: SyntheticOptions = DEFAULT_OPTIONS, overwrite: bool = False
) -> SyntheticSummary:
    """Write a dataset of moving, occluding shapes in YouTube-VIS format.

    The files are ``directory/{train,valid}.json`` and ``directory/JPEGImages/<video>/00000.jpg`` and on. Masks cover
    what is visible; a frame in which nothing of an instance is visible is null, and an instance that is visible in no
    frame is not annotated. Annotations carry OVIS's ``occlusion`` level of every frame, null like the mask. The JSON
    files are written last, so a run that was cut short leaves none.

    Args:
        directory: Where to write; made if it does not exist.
        options: What the videos show and how hard they are.
        overwrite: Replace a dataset that was made here before. Other files in the directory stay.

    Returns:
        The difficulty of both splits, measured on what was drawn.

    Raises:
        FileExistsError: If ``directory`` is not empty and ``overwrite`` is false.
        NotADirectoryError: If ``directory`` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; expected a directory to write the dataset to")
    if directory.exists() and any(directory.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{directory} is not empty; give another directory, or overwrite to replace its dataset"
            )
        for split in SPLITS:
            (directory / f"{split}.json").unlink(missing_ok=True)
            for video in directory.glob(f"JPEGImages/{split}_[0-9]*"):
                shutil.rmtree(video)

    counts = {"train": options.train_videos, "valid": options.valid_videos}
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    work = partial(_make_video, directory, options)
    if options.workers == 1:
        videos = [work(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(options.workers) as pool:
            videos = list(pool.map(work, *zip(*jobs, strict=True), chunksize=4))

    statistics = {}
    for split in SPLITS:
        chosen = [video for video, (owner, _) in zip(videos, jobs, strict=True) if owner == split]
        statistics[split] = _measure(chosen)
        temporary = directory / f"{split}.json.partial"
        temporary.write_text(json.dumps(_dataset(chosen, options), separators=(",", ":")))
    for split in SPLITS:
        (directory / f"{split}.json.partial").replace(directory / f"{split}.json")
    return SyntheticSummary(**statistics)


# ---------------------------------------------------------------------------------------------------------- one video


@dataclass(frozen=True)
class _Sprite:
    """One thing to draw: outline, paint and, in each of T frames, centre (T, 2) as (x, y), radius (T,), angle (T,)."""

    shape: str
    pattern: str
    colours: Array  # (2, 3) float32, RGB in [0, 1]
    frequency: float  # of the pattern, in radians per radius
    phase: float
    centres: Array
    radii: Array
    angles: Array


@dataclass(frozen=True)
class _Video:
    """A written video: its entry, its annotations without ids, which instances have look-alikes, (T,) frame flags."""

    entry: dict[str, Any]
    annotations: list[dict[str, Any]]
    look_alikes: list[bool]
    shown: NDArray[np.bool_]
    hidden: NDArray[np.bool_]


def _make_video(directory: Path, options: SyntheticOptions, split: str, index: int) -> _Video:
    """Draw and write one video; it depends on nothing but the options, the split and the index."""
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    instances, groups = _instances(rng, options)
    backdrop, shift = _background(rng, options)
    blobs = [_distractor(rng, options, shift) for _ in range(options.distractors)]
    gain = 1 + options.brightness_change * np.sin(rng.uniform(0, 2 * np.pi) + _times(options) * rng.uniform(0.1, 0.3))

    name = f"{split}_{index:04d}"
    folder = directory / "JPEGImages" / name
    folder.mkdir(parents=True)
    size = {"height": options.height, "width": options.width, "length": options.length}
    annotations: list[dict[str, Any]] = [
        {
            "category_id": options.shapes.index(sprite.shape) + 1,
            "iscrowd": 0,
            **size,
            **{key: [] for key in ("segmentations", "bboxes", "areas", "occlusion")},
        }
        for sprite in instances
    ]
    shown, hidden = np.zeros((2, options.length), dtype=np.bool_)
    for t in range(options.length):
        canvas = backdrop(t)
        for blob in blobs:
            _draw(canvas, blob, t, options.texture)
        owner = np.full((options.width, options.height), -1, dtype=np.int16).T  # column by column, as run lengths go
        alone = np.zeros(len(instances), dtype=np.int64)  # area in the frame, as if no other instance were there
        for k, sprite in enumerate(instances):  # from back to front
            rows, columns, inside = _draw(canvas, sprite, t, options.texture)
            owner[rows, columns][inside] = k
            alone[k] = inside.sum()
        pixels = np.rint(np.clip(canvas * (255 * float(gain[t])), 0, 255)).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{t:05d}.jpg", quality=JPEG_QUALITY)

        masks = run_length.encode((np.arange(len(instances))[:, None, None] == owner.T).view(np.uint8).T)
        areas, boxes = run_length.area(masks), run_length.toBbox(masks)
        shown[t], hidden[t] = (areas > 0).any(), (2 * areas < alone).any()
        for k, annotation in enumerate(annotations):
            visible = areas[k] > 0
            mask = {"size": masks[k]["size"], "counts": masks[k]["counts"].decode("ascii")}
            annotation["segmentations"].append(mask if visible else None)
            annotation["bboxes"].append(boxes[k].astype(int).tolist() if visible else None)
            annotation["areas"].append(int(areas[k]) if visible else None)
            annotation["occlusion"].append(_occlusion_level(int(areas[k]), int(alone[k])) if visible else None)

    seen = [k for k, annotation in enumerate(annotations) if any(annotation["areas"])]
    files = [f"{name}/{t:05d}.jpg" for t in range(options.length)]
    return _Video(
        entry={**size, "file_names": files},
        annotations=[annotations[k] for k in seen],
        look_alikes=[sum(groups[k] == groups[other] for other in seen) > 1 for k in seen],
        shown=shown,
        hidden=hidden,
    )


def _occlusion_level(visible: int, alone: int) -> str:
    """OVIS's name for how much of an instance others hide; severe is more than half."""
    if visible == alone:
        return "no_occlusion"
    return "severe_occlusion" if 2 * visible < alone else "slight_occlusion"


def _dataset(videos: list[_Video], options: SyntheticOptions) -> dict[str, Any]:
    annotations = [(number, each) for number, video in enumerate(videos, 1) for each in video.annotations]
    return {
        "info": {"description": f"synthetic moving shapes, seed {options.seed}"},
        "videos": [{"id": number, **video.entry} for number, video in enumerate(videos, 1)],
        "annotations": [{"id": i, "video_id": number, **each} for i, (number, each) in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(options.shapes, 1)],
    }


def _measure(videos: list[_Video]) -> SplitStatistics:
    visible = [[area is not None for area in each["areas"]] for video in videos for each in video.annotations]
    returning = [sum(after > before for before, after in zip([False, *v], v, strict=False)) > 1 for v in visible]
    instances = max(len(visible), 1)
    return SplitStatistics(
        videos=len(videos),
        frames=sum(len(video.shown) for video in videos),
        instances=len(visible),
        hidden=float(sum(video.hidden.sum() for video in videos) / max(sum(video.shown.sum() for video in videos), 1)),
        absent_at_start=sum(not v[0] for v in visible) / instances,
        returning=sum(returning) / instances,
        look_alikes=sum(sum(video.look_alikes) for video in videos) / instances,
    )


# ------------------------------------------------------------------------------------------------- looks and movements


def _times(options: SyntheticOptions) -> Array:
    return np.arange(options.length, dtype=np.float64)


def _instances(rng: Generator, options: SyntheticOptions) -> tuple[list[_Sprite], list[int]]:
    """The instances of a video from back to front, and the number of the look that each of them wears."""
    count = int(rng.integers(options.min_instances, options.max_instances + 1))
    groups = _look_alike_groups(rng, count, options.look_alikes)
    hues = (rng.uniform() + rng.permutation(count) / count) % 1  # spread, so that only look-alikes look alike
    looks = [_look(rng, hue, options) for hue in hues]
    sizes = rng.uniform(options.min_size, options.max_size, count)[groups] * rng.uniform(0.92, 1.08, count)
    crossing = rng.permutation(count - 1) < int(options.occlusion * (count - 1) + rng.uniform())
    times = _times(options)
    sprites: list[_Sprite] = []
    placed: list[tuple[Array, float]] = []
    for k in range(count):
        shape, pattern, colours, frequency = looks[groups[k]]
        mean = sizes[k] * options.height / 2
        swing = options.scale_change * rng.uniform(0.3, 1)
        centres = _choose_path(rng, options, float(mean * (1 + swing)), placed, k > 0 and bool(crossing[k - 1]))
        placed.append((centres, float(mean)))
        sprites.append(
            _Sprite(
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
            _rgb(hue, rng.uniform(0.65, 0.9), rng.uniform(0.8, 1)),
            _rgb(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.2, 0.9), rng.choice([rng.uniform(0.2, 0.4), 1.0])),
        ]
    )
    return str(rng.choice(options.shapes)), str(rng.choice(list(_PATTERNS))), colours, rng.uniform(6, 9)


def _rgb(hue: float, saturation: float, value: float) -> Array:
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return np.asarray(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1), dtype=np.float32)


def _choose_path(
    rng: Generator, options: SyntheticOptions, radius: float, placed: list[tuple[Array, float]], crossing: bool
) -> Array:
    """Centres (T, 2) of an instance, as clear of the paths and radii in ``placed`` as can be, or crossing one."""
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
    return np.asarray(middle + reach * np.sin(phase + velocity / reach * (_times(options)[:, None] - time)))


def _crowding(centres: Array, radius: float, placed: list[tuple[Array, float]]) -> float:
    """How much a path overlaps those of ``placed``, summed over frames and instances."""
    gaps = [np.linalg.norm(centres - others, axis=1) / (radius + size) for others, size in placed]
    return float(sum(np.clip(1 - gap, 0, 1).sum() for gap in gaps))


def _time_away(rng: Generator, options: SyntheticOptions) -> Array | None:
    """How far, (T,) from 0 to 1, an instance is on its way out of view; None if it stays."""
    length, ramp, draw = options.length, options.length / 4, rng.uniform()
    times = _times(options)

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


def _distractor(rng: Generator, options: SyntheticOptions, shift: Array) -> _Sprite:
    """A dull blob on the background, which moves by ``shift`` (T, 2)."""
    middle = rng.integers(options.length)
    point = rng.uniform(0, [options.width, options.height])
    hue, still = rng.uniform(), np.ones(options.length)
    return _Sprite(
        shape="blob",
        pattern="noise",
        colours=np.stack([_rgb(hue, 0.2, value) for value in rng.uniform(0.25, 0.6, 2)]),
        frequency=rng.uniform(2, 4),
        phase=rng.uniform(0, 2 * np.pi),
        centres=point + shift[middle] - shift,
        radii=still * options.height / 2 * rng.uniform(options.min_size, options.max_size),
        angles=still * rng.uniform(0, 2 * np.pi),
    )


# ------------------------------------------------------------------------------------------------------------ painting


def _background(rng: Generator, options: SyntheticOptions) -> tuple[Callable[[int], Array], Array]:
    """A function from frame to (3, H, W) picture, and the view's shift (T, 2) in pixels as (x, y)."""
    heading = rng.uniform(0, 2 * np.pi)
    pace = options.background_speed * options.height * rng.uniform(0.5, 1.5)
    shift = _times(options)[:, None] * pace * np.array([np.cos(heading), np.sin(heading)])
    shift -= shift.min(axis=0)
    extent = np.array([options.width, options.height]) + shift.max(axis=0)
    cells = [options.height / 2 / 2**octave for octave in range(BACKGROUND_OCTAVES)]
    grids = [rng.normal(size=(2, *(np.ceil(extent[::-1] / cell).astype(int) + 3))).astype(np.float32) for cell in cells]
    hue = rng.uniform()
    base = _rgb(hue, rng.uniform(0.15, 0.4), rng.uniform(0.3, 0.55))
    tints = np.stack([_rgb(hue + rng.uniform(0.2, 0.8), 0.4, 0.5) - 0.35, np.full(3, 0.25, dtype=np.float32)])

    def picture(t: int) -> Array:
        field = np.zeros((2, options.height, options.width), dtype=np.float32)
        for octave, (cell, grid) in enumerate(zip(cells, grids, strict=True)):
            x = _spline_weights((np.arange(options.width) + shift[t, 0]) / cell, grid.shape[2])
            y = _spline_weights((np.arange(options.height) + shift[t, 1]) / cell, grid.shape[1])
            field += 0.7**octave * (y @ grid @ x.T)
        return np.asarray(base[:, None, None] + np.tensordot(options.background_texture * tints.T, field, axes=1))

    return picture, shift


def _spline_weights(x: Array, count: int) -> Array:
    """Weights (n, count) of the cubic B-splines at knots -1, 0, ... for the points ``x`` (n,), 0 <= x <= count - 3."""
    distance = np.abs(x[:, None] + 1 - np.arange(count)).astype(np.float32)
    outer, inner = np.maximum(2 - distance, 0), np.maximum(1 - distance, 0)
    return np.asarray((outer * outer * outer - 4 * inner * inner * inner) / 6)


def _draw(canvas: Array, sprite: _Sprite, t: int, texture: float) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Paint a sprite into ``canvas`` (3, H, W) in place, with a soft shadow around it.

    Returns:
        The rows and columns that it may touch, and which pixels of these it covers by half or more.
    """
    _, height, width = canvas.shape
    (cx, cy), radius, angle = sprite.centres[t], sprite.radii[t], sprite.angles[t]
    halo = 0.04 * height
    reach = REACH * radius + halo + 1
    rows = slice(max(0, int(cy - reach)), max(0, min(height, int(cy + reach) + 1)))
    columns = slice(max(0, int(cx - reach)), max(0, min(width, int(cx + reach) + 1)))
    y = ((np.arange(rows.start, rows.stop) - cy) / radius).astype(np.float32)[:, None]
    x = ((np.arange(columns.start, columns.stop) - cx) / radius).astype(np.float32)[None, :]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    distance = _SHAPES[sprite.shape](u, v) * np.float32(radius)  # pixels to the outline, negative inside

    shadow = 1 - 0.4 * np.clip(1 - distance / halo, 0, 1) ** 2
    mix = np.float32(texture) * _PATTERNS[sprite.pattern](u * sprite.frequency, v * sprite.frequency, sprite.phase)
    light = (1 - 0.12 * (x + y)) * (1 - 0.35 * np.clip(1 + distance / 1.5, 0, 1))  # from the top left; a dark rim
    first, second = sprite.colours[..., None, None]
    cover = np.clip(0.5 - distance, 0, 1)
    patch = canvas[:, rows, columns]
    patch *= shadow * (1 - cover)
    patch += (first + mix * (second - first)) * (cover * light)
    return rows, columns, distance <= 0


def _soft(wave: Array) -> Array:
    """A wave in [-1, 1] to bands in [0, 1] with soft edges."""
    return 0.5 + 0.5 * np.tanh(3 * wave)


_PATTERNS: dict[str, Callable[[Array, Array, float], Array]] = {
    "stripes": lambda u, v, phase: _soft(np.sin(u + phase) + 0 * v),
    "checks": lambda u, v, phase: _soft(np.sin(0.8 * u + phase) * np.sin(0.8 * v + phase)),
    "dots": lambda u, v, phase: _soft(np.cos(u) + np.cos(v) - 0.8),
    "noise": lambda u, v, phase: _soft(
        0.5 * (np.sin(0.9 * u + 1.3 * np.sin(0.7 * v + phase)) + np.sin(0.8 * v + 1.7 * np.sin(0.5 * u - phase)))
    ),
    "gradient": lambda u, v, phase: 0.5 + 0.5 * np.sin(0.3 * (u + v)),
}


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
_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: _box(u, v, 0.88, 0.88),
    "triangle": _polygon(_corners([1.24], 3)),
    "star": _polygon(_corners([1.24, 0.56], 10)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.3,
    "cross": lambda u, v: np.minimum(_box(u, v, 1.15, 0.4), _box(u, v, 0.4, 1.15)),
    "blob": _blob,
}
