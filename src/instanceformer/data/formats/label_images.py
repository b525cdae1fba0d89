"""Videos labeled by images: instance numbers (DAVIS, YouTube-VOS, MOTS) or binary masks per instance (SA-V, SAM 2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instanceformer.data.annotations import Category, Instance, Video, VideoDataset
from instanceformer.data.formats.folders import (
    Frames,
    InstanceNames,
    find_frames,
    find_labels,
    read_labels,
    subfolders,
)
from instanceformer.data.formats.records import with_unique_ids
from instanceformer.data.formats.run_lengths import compress_array

DAVIS_IGNORED = 255
MOTS_IGNORED = 10000
MOTS_CATEGORIES = (Category(1, "car"), Category(2, "pedestrian"))
_SHADES = "nothing but thin edges of others, as anti-aliasing and blur make them"
_REMEDY = (
    "export the labels without anti-aliasing and resize them by nearest neighbor, or threshold each instance's mask, "
    "in Pillow by mask.point(lambda value: 255 * (value > 127)), and import them as binary masks"
)
MAX_DIGITS = 18
"""Maximum number of digits of an instance number, so that it fits into 64 bits."""
MAX_COLORS = 254
"""Maximum number of colors in a video that are taken for instances."""
MAX_RIMS = 8
"""Minimum number of rims in an image (see ``find_rims``) that, if most of its labels are rims, count as edge shades."""
MAX_INSIDE = 0.1
"""A rim has less than this fraction of its pixels surrounded by its own label; in a 4x4 square it is a quarter."""
MIN_TOUCHING = 0.5
"""A rim has more than this fraction of its pixels next to another label that is not background."""


def import_davis(source: Path, images: Path, names: Path | None = None, *, other_videos: bool = False) -> VideoDataset:
    """Read the labels of DAVIS 2017 and of datasets with the same layout, such as YouTube-VOS.

    ``source/<video>/<frame>.png`` is an 8-bit image, with or without a palette, whose values are instance numbers, the
    same throughout a video; 0 is background, and 255 is ignored (treated as background). Alternatively it is an RGB
    image in which each color except black is an instance, numbered per video in order of appearance. Frames are the
    images in ``images/<video>`` that have a label image, in natural order of their names. Instance ids are these
    numbers; if they recur in other videos, see ``with_unique_ids``.

    Args:
        source: folder of the videos' label images, such as ``DAVIS/Annotations/480p``.
        images: folder of the videos' frames, such as ``DAVIS/JPEGImages/480p``.
        names: JSON file with the categories of the instances; see ``InstanceNames``.
        other_videos: allow ``names`` to include videos that are not in ``source``.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: an image cannot be read, has an unsupported mode, or differs in size from its video; a label has no
            frame; an instance has no name; 255 is the only label in a video, as in the binary masks of DAVIS 2016; or
            the labels look like the edge shades that anti-aliasing and blur produce.
    """
    categories = InstanceNames(names, source, other_videos)
    videos = []
    for number, video in enumerate(_label_videos(source, images, ("P", "L", "RGB")), 1):
        ignored = video.masks.pop(DAVIS_IGNORED, None)
        if ignored and not video.masks:
            raise ValueError(
                f"{video.labels}: expected the numbers of instances, 1 to 254, found no value but 0 and 255; "
                "if these are masks of one instance, put them into a folder of its own and import them as binary masks"
            )
        instances = tuple(
            Instance(
                label,
                categories.category_id(video.labels.name, video.colors.get(label, str(label))),
                False,
                tuple(masks),
            )
            for label, masks in sorted(video.masks.items())
        )
        videos.append(_video(number, video.frames, instances))
    categories.check()
    return VideoDataset(categories.categories, with_unique_ids(videos))


def import_mots(source: Path, images: Path) -> VideoDataset:
    """Read the labels of KITTI MOTS and MOTSChallenge.

    ``source/<video>/<frame>.png`` is a 16-bit grayscale image of class * 1000 + instance, where class 1 is a car and 2
    a pedestrian; 0 is background. The value 10000 marks regions to ignore; they become one crowd in each category, with
    the id 10000 + category. Frames and ids are as in ``import_davis``: car 7 has the id 1007.

    Args:
        source: folder of the videos' label images, such as ``instances``.
        images: folder of the videos' frames, such as ``training/image_02``.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: an image cannot be read, has an unsupported mode, or differs in size from its video; a label has no
            frame or no known class; or the labels look like edge shades.
    """
    known = {category.id for category in MOTS_CATEGORIES}
    videos = []
    for number, video in enumerate(_label_videos(source, images, ("I;16", "I")), 1):
        instances = []
        for label, masks in sorted(video.masks.items()):
            if label == MOTS_IGNORED:
                instances += [Instance(label + id_, id_, True, tuple(masks)) for id_ in sorted(known)]
            elif label // 1000 in known:
                instances.append(Instance(label, label // 1000, False, tuple(masks)))
            else:
                frame = next(name for name, mask in zip(video.frames.names, masks, strict=True) if mask)
                expected = f"class * 1000 + instance, class {' or '.join(map(str, sorted(known)))}, or {MOTS_IGNORED}"
                raise ValueError(f"{video.labels / frame}.png: expected labels {expected}, found {label}")
        videos.append(_video(number, video.frames, tuple(instances)))
    return VideoDataset(MOTS_CATEGORIES, with_unique_ids(videos))


@dataclass(frozen=True)
class _LabelVideo:
    """A video and its labels.

    Attributes:
        labels: folder of the label images.
        frames: the labeled frames.
        masks: for each label, its compressed mask or None in every frame.
        colors: for each label, its color such as ``#ff0000``; empty if labels are numbers.
    """

    labels: Path
    frames: Frames
    masks: dict[int, list[bytes | None]]
    colors: dict[int, str]


def _label_videos(source: Path, images: Path, modes: Sequence[str]) -> Iterator[_LabelVideo]:
    for folder in subfolders(source, "video"):
        frames = find_frames(images, folder.name)
        files = find_labels(folder, frames)
        frames = frames.labeled(files)
        masks: dict[int, list[bytes | None]] = {}
        colors, dimensions, objects = Colors(), set(), set()
        for frame, name in enumerate(frames.names):
            labels = read_labels(files[name], frames, modes)
            dimensions.add(labels.ndim)
            if len(dimensions) > 1:
                raise ValueError(f"{files[name]}: expected labels of one kind in a video, found numbers and RGB colors")
            if labels.ndim == 3:
                labels = colors.number(labels, files[name])
            values = [label for label in np.flatnonzero(np.bincount(labels.ravel())).tolist() if label > 0]
            rims = find_rims(labels)
            if are_shades(len(rims), len(values)):
                raise ValueError(f"{files[name]}: found {len(values)} values, {len(rims)} of them {_SHADES}; {_REMEDY}")
            objects |= {*values}.difference(rims)
            for label in values:
                masks.setdefault(label, [None] * len(frames))[frame] = compress_array(labels == label)
        rims = sorted(masks.keys() - objects)
        if len(rims) > 1:
            warnings.warn(
                f"{folder}: the labels {', '.join(map(str, rims))} are {_SHADES}; if so, {_REMEDY}", stacklevel=2
            )
        yield _LabelVideo(folder, frames, masks, colors.names)


def _video(number: int, frames: Frames, instances: tuple[Instance, ...]) -> Video:
    return Video(number, frames.height, frames.width, frames.file_names, len(frames), instances)


def import_binary_masks(
    source: Path, images: Path, names: Path | None = None, *, other_videos: bool = False
) -> VideoDataset:
    """Read binary masks, one PNG per instance and frame, in the layout of SA-V and of SAM 2's own output.

    ``source/<video>/<instance>/<frame>.png`` has zeros and one other value; ``<instance>`` is a number. Masks may
    overlap. Frames are the images in ``images/<video>`` for which any instance has a mask, in natural order of their
    names. An instance without a mask in a frame, or with an empty one, is not visible there; instances that are never
    visible are left out. Instance ids are these numbers; if they recur in other videos, see ``with_unique_ids``.

    Args:
        source: folder of the videos' masks.
        images: folder of the videos' frames.
        names: JSON file with the categories of the instances; see ``InstanceNames``.
        other_videos: allow ``names`` to include videos that are not in ``source``.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: a mask cannot be read, is not binary, differs in size from its video, or has no frame; an instance
            folder's name is not a number, or two stand for the same number; or an instance has no name.
    """
    categories = InstanceNames(names, source, other_videos)
    videos = []
    for number, folder in enumerate(subfolders(source, "video"), 1):
        frames = find_frames(images, folder.name)
        instances: dict[int, Instance] = {}
        paths: dict[int, Path] = {}
        labels = {path: find_labels(path, frames) for path in subfolders(folder, "instance")}
        frames = frames.labeled({name for files in labels.values() for name in files})
        for path, files in labels.items():
            if not path.name.isdecimal() or len(path.name) > MAX_DIGITS:
                raise ValueError(f"{path}: expected a folder for each instance, named by its number")
            id_ = int(path.name)
            if id_ in paths:
                raise ValueError(f"{path}: expected a number of its own, found {paths[id_].name} too")
            paths[id_] = path
            masks = _masks(files, frames)
            if any(masks):
                instances[id_] = Instance(id_, categories.category_id(folder.name, str(id_)), False, masks)
        videos.append(_video(number, frames, tuple(instances.values())))
    categories.check()
    return VideoDataset(categories.categories, with_unique_ids(videos))


def _masks(files: dict[str, Path], frames: Frames) -> tuple[bytes | None, ...]:
    """The compressed mask in each frame, or None."""
    masks: list[bytes | None] = []
    for name in frames.names:
        if name not in files:
            masks.append(None)
            continue
        path = files[name]
        labels = read_labels(path, frames, ("1", "L", "P"))
        values = np.flatnonzero(np.bincount(labels.ravel()))
        if len(values[values > 0]) > 1:
            raise ValueError(
                f"{path}: expected zeros and one other value, found {len(values)} values up to {values[-1]}; if they "
                "come of anti-aliasing or blur, threshold the masks, in Pillow by "
                "mask.point(lambda value: 255 * (value > 127))"
            )
        masks.append(compress_array(labels != 0))
    return tuple(masks)


class Colors:
    """Numbers the colors in a video's label images by first appearance; within an image, by ascending value."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        """The color, such as ``#ff0000``, of each number."""
        self._numbers = {0: 0}

    def number(self, image: NDArray[np.uint8], path: Path) -> NDArray[np.int64]:
        """Convert (height, width, 3) colors to (height, width) instance numbers; black is background, 0.

        Raises:
            ValueError: the video has too many colors.
        """
        packed = image.astype(np.int64) @ np.array([2**16, 2**8, 1])
        values, inverse = np.unique(packed, return_inverse=True)
        for value in values.tolist():
            if value not in self._numbers:
                self._numbers[value] = len(self._numbers)
                self.names[self._numbers[value]] = f"#{value:06x}"
        if len(self.names) > MAX_COLORS:
            raise ValueError(
                f"{path}: expected one color for each instance, {MAX_COLORS} at most in a video, found "
                f"{len(self.names)}; are the colors blended at edges, or is this a photograph? Export the labels "
                "without anti-aliasing, as lossless PNGs"
            )
        return np.array([self._numbers[value] for value in values.tolist()])[inverse].reshape(packed.shape)


def find_rims(labels: NDArray[Any]) -> list[int]:
    """Find rims: labels that have almost no interior and lie along other labels, like the shades of a blurred edge.

    Small and thin objects have no interior either, but they border on background more than on other labels.

    Args:
        labels: (height, width) non-negative integers, 0 for background.

    Returns:
        The rims, ascending.
    """
    around = np.pad(labels, 1, mode="edge")  # treat objects as continuing beyond the frame
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
    """Whether this many rims among this many labels in an image must be edge shades rather than objects."""
    return rims >= MAX_RIMS and 2 * rims > labels
