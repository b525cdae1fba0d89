"""Videos labeled by images: numbers of instances (DAVIS, YouTube-VOS, MOTS) or one binary mask each (SA-V, SAM 2)."""

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
"""Most digits of an instance's number, so that it fits into 64 bits."""
MAX_COLORS = 254
"""Most colors of a video that are taken for instances."""
MAX_RIMS = 8
"""Fewest labels without an inside that, if they are most of an image's labels, are taken for the shades of an edge."""
MAX_INSIDE = 0.1
"""Greatest fraction of a rim's pixels that have its label on all sides; in a square of 4 x 4 pixels it is a quarter."""
MIN_TOUCHING = 0.5
"""Least fraction of a rim's pixels beside which there is another label that is not background."""


def import_davis(source: Path, images: Path, names: Path | None = None, *, other_videos: bool = False) -> VideoDataset:
    """Read the labels of DAVIS 2017 and of datasets in its layout, such as YouTube-VOS.

    ``source/<video>/<frame>.png`` is an 8-bit image, with or without a palette, whose values are the numbers of
    instances, the same all through a video; 0 is background, 255 is ignored (it becomes background). Or it is an RGB
    image whose colors, except black, are the instances, numbered in each video in order of appearance. Frames are the
    images of ``images/<video>`` that have a label image, in order of the numbers in their names. Ids of instances are
    their numbers, see ``with_unique_ids`` where videos share them.

    Args:
        source: folder of the videos' label images, such as ``DAVIS/Annotations/480p``.
        images: folder of the videos' frames, such as ``DAVIS/JPEGImages/480p``.
        names: JSON file of the instances' categories, see ``InstanceNames``.
        other_videos: allow it to name videos that are not there.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: an image cannot be read, is of another kind, or of another size than the rest of its video; a label
            has no frame; an instance has no name; a video has 255 as its only label, as the binary masks of DAVIS 2016;
            the labels are shades of edges, as anti-aliasing and blur make them.
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

    ``source/<video>/<frame>.png`` is a 16-bit gray image of class * 1000 + instance, class 1 a car and 2 a pedestrian;
    0 is background. 10000, a region to ignore whatever is in it, becomes one crowd in each category, with the id
    10000 + category. Frames and ids are as in ``import_davis``: the id of car 7 is 1007.

    Args:
        source: folder of the videos' label images, such as ``instances``.
        images: folder of the videos' frames, such as ``training/image_02``.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: an image cannot be read, is of another kind, or of another size than the rest of its video; a label
            has no frame, or is of no class; the labels are shades of edges.
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
    """A video: the folder of its label images, the compressed mask or None of each label in every frame, and its color.

    Labels that are numbers have no colors.
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
    """Read binary masks, one PNG for each instance and frame, in the layout of SA-V and of SAM 2's own output.

    ``source/<video>/<instance>/<frame>.png`` is an image of zeros and one other value, ``<instance>`` a number. Masks
    may overlap. Frames are the images of ``images/<video>`` for which any instance has a mask, in order of the numbers
    in their names; an instance that has none there, or an empty one, is not visible; one that never is is left out. Ids
    of instances are their numbers, see ``with_unique_ids`` where videos share them.

    Args:
        source: folder of the videos' masks.
        images: folder of the videos' frames.
        names: JSON file of the instances' categories, see ``InstanceNames``.
        other_videos: allow it to name videos that are not there.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: a mask cannot be read, is not binary, of another size than its video or without a frame; a folder is
            not named by a number, or two by the same; an instance has no name.
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
    """For each frame the compressed mask, or None."""
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
    """Numbers the colors of a video's label images in order of first appearance, in one image by ascending value."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        """By number the color, such as ``#ff0000``."""
        self._numbers = {0: 0}

    def number(self, image: NDArray[np.uint8], path: Path) -> NDArray[np.int64]:
        """Turn (height, width, 3) colors into (height, width) numbers of instances; black is background, 0.

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
    """The labels that have hardly an inside and lie along others, as the shades of a blurred edge do.

    Small and thin objects have no inside either, but more of background than of others beside them.

    Args:
        labels: (height, width) integers, zero for background.
    """
    around = np.pad(labels, 1, mode="edge")  # as if objects continued beyond the frame
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
    """Whether that many rims among that many labels of an image are shades of an edge and no objects."""
    return rims >= MAX_RIMS and 2 * rims > labels
