"""Videos labelled by images whose pixels are the numbers of instances: the formats of DAVIS and MOTS."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instanceformer.data.annotations import Category, Instance, Video, VideoDataset
from instanceformer.data.importers.colors import Colors
from instanceformer.data.importers.frames import Frames, compress, find_frames, find_labels, read_labels, subfolders
from instanceformer.data.importers.identities import with_unique_ids
from instanceformer.data.importers.names import InstanceNames
from instanceformer.data.rims import are_shades, find_rims

DAVIS_IGNORED = 255
MOTS_IGNORED = 10000
_SHADES = "nothing but thin edges of others, as anti-aliasing and blur make them"
_REMEDY = (
    "export the labels without anti-aliasing and resize them by nearest neighbor, or threshold each instance's mask, "
    "in Pillow by mask.point(lambda value: 255 * (value > 127)), and import them as binary masks"
)
MOTS_CATEGORIES = (Category(1, "car"), Category(2, "pedestrian"))


def import_davis(source: Path, images: Path, names: Path | None = None, *, other_videos: bool = False) -> VideoDataset:
    """Read the labels of DAVIS 2017 and of what has its form, such as YouTube-VOS.

    ``source/<video>/<frame>.png`` is an 8-bit image, with or without a palette, whose values are the numbers of
    instances, the same all through a video; 0 is background, 255 is ignored (it becomes background). Or it is an RGB
    image, whose colors but for black are the instances, numbered in each video in order of appearance. Frames are the
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

    ``source/<video>/<frame>.png`` is a 16-bit grey image of class * 1000 + instance, class 1 a car and 2 a pedestrian;
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
    """A video: the folder of its label images, and of each label the compressed mask or None in every frame.

    In a video of colored labels, ``colors`` has the color of each.
    """

    labels: Path
    frames: Frames
    masks: dict[int, list[bytes | None]]
    colors: dict[int, str]


def _label_videos(source: Path, images: Path, modes: Sequence[str]) -> Iterator[_LabelVideo]:
    for folder in subfolders(source, "video"):
        frames = find_frames(images, folder.name)
        files = find_labels(folder, frames)
        frames = frames.labelled(files)
        masks: dict[int, list[bytes | None]] = {}
        colors, dimensions, objects = Colors(), set(), set()
        for frame, name in enumerate(frames.names):
            labels = read_labels(files[name], frames, modes)
            dimensions.add(labels.ndim)
            if len(dimensions) > 1:
                raise ValueError(f"{files[name]}: expected labels of one kind in a video, found numbers and RGB colors")
            if labels.ndim == 3:
                labels = colors.number(labels, files[name])
            found = [label for label in np.flatnonzero(np.bincount(labels.ravel())).tolist() if label > 0]
            rims = find_rims(labels)
            if are_shades(len(rims), len(found)):
                raise ValueError(f"{files[name]}: found {len(found)} values, {len(rims)} of them {_SHADES}; {_REMEDY}")
            objects |= {*found}.difference(rims)
            for label in found:
                masks.setdefault(label, [None] * len(frames))[frame] = compress(labels == label)
        rims = sorted(masks.keys() - objects)
        if len(rims) > 1:
            warnings.warn(
                f"{folder}: the labels {', '.join(map(str, rims))} are {_SHADES}; if so, {_REMEDY}", stacklevel=2
            )
        yield _LabelVideo(folder, frames, masks, colors.names)


def _video(number: int, frames: Frames, instances: tuple[Instance, ...]) -> Video:
    return Video(number, frames.height, frames.width, frames.file_names, len(frames), instances)
