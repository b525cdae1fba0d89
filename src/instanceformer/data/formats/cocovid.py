"""Videos labeled frame by frame in COCO-style JSON: CocoVID files and exports of labeling tools."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from pycocotools import mask as mask_utils

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.formats.records import Records, load_json, with_unique_ids
from instanceformer.data.formats.run_lengths import compress_tracks, show
from instanceformer.files import natural_order


def import_cocovid(source: Path, *, merge_parts: bool = False) -> VideoDataset:
    """Read a COCO file whose images are video frames and whose annotations carry the id of the instance they show.

    If the file has ``videos``, an image belongs to the video with its ``video_id``, and frames are ordered by
    ``frame_id``. Otherwise each folder in the images' file names is a video; videos are numbered from 1, and frames are
    in natural order of their names. An image without a size has the size of its video.

    Annotations in a video that share an ``instance_id``, ``track_id`` or ``attributes.track_id`` (CVAT) form one
    instance with that id; if ids recur in other videos, see ``with_unique_ids``. Masks are polygons or run lengths,
    compressed or not. An instance is not visible in frames where it has no annotation or an empty mask; instances that
    are never visible are left out. ``iscrowd`` is ignored if the id is ``attributes.track_id``, because CVAT sets it on
    everything drawn with a brush.

    Args:
        source: the JSON file.
        merge_parts: if an instance has several annotations in a frame, as some tools export for the parts of an object,
            use the union of their masks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed; an annotation has no instance id, or only a box; an instance changes its
            category, or occurs twice in a frame without ``merge_parts``; the images of a video differ in size; a video
            has no images; or, in a file without ``videos``, two images have the same name. The message says where, what
            was expected and what was found.
    """
    records = _CocoVid(str(source), merge_parts)
    with records.tolerate():
        return records.dataset(load_json(source))


@dataclass(frozen=True)
class _Image:
    location: str
    id: int
    file_name: str
    size: tuple[int, int]
    position: int | tuple[Any, ...]  # in its video; anything sortable


@dataclass(frozen=True)
class _Track:
    location: str  # of its first annotation
    category_id: int
    is_crowd: bool
    frames: dict[int, tuple[str, bytes | None]]  # location and mask of each annotated frame


class _CocoVid(Records):
    def __init__(self, name: str, merge_parts: bool) -> None:
        super().__init__(name)
        self.merge_parts = merge_parts

    def dataset(self, root: object) -> VideoDataset:
        categories = self.categories(root)
        has_videos = isinstance(root, dict) and "videos" in root
        images = dict(self.images_of_videos(root) if has_videos else self.images_of_folders(root))
        frame_of = {image.id: (video, t) for video, frames in images.items() for t, image in enumerate(frames)}
        tracks: dict[int, dict[int, _Track]] = {video: {} for video in images}
        for location, record in self.objects(root, "annotations", optional=True):
            video, t = frame_of[self.known_id(record, "image_id", location, "images")]
            if has_videos and "video_id" in record and self.integer(record, "video_id", location) != video:
                self.fail(f"{location}.video_id", f"{video}, the video of its image", show(record["video_id"]))
            identity, is_crowd = self.identity(record, location)
            category_id = self.known_id(record, "category_id", location, "categories")
            track = tracks[video].setdefault(identity, _Track(location, category_id, is_crowd, {}))
            if (category_id, is_crowd) != (track.category_id, track.is_crowd):
                expected = f"category {track.category_id} and iscrowd {track.is_crowd:d} of instance {identity}"
                found = f"category {category_id} and iscrowd {is_crowd:d}"
                self.fail(location, f"{expected}, as in {track.location}", found)
            mask = self.mask_of_size(record, images[video][t].size, location)
            if t in track.frames:
                first, other = track.frames[t]
                if not self.merge_parts:
                    expected = f"one annotation of instance {identity} in image {record['image_id']}"
                    remedy = "if they are parts of one object, give --merge_parts to take the union of their masks"
                    self.fail(location, expected, f"{first} too; {remedy}", "duplicate id")
                track.frames[t] = (first, _union(mask, other, images[video][t].size))
            else:
                track.frames[t] = (location, mask)
        self.warn_of_fragments()
        self.warn_of_shared_names(images)
        return VideoDataset(categories, with_unique_ids([_video(v, images[v], tracks[v]) for v in images]))

    def images_of_videos(self, root: object) -> Iterator[tuple[int, list[_Image]]]:
        """Yield the id and the ordered images of each of the file's ``videos``."""
        videos = {self.new_id(record, location): record for location, record in self.objects(root, "videos")}
        images: dict[int, list[_Image]] = {id_: [] for id_ in videos}
        for location, record in self.objects(root, "images"):
            id_ = self.known_id(record, "video_id", location, "videos")
            frame = self.integer(record, "frame_id", location)
            size = self.size(record if "height" in record else videos[id_], location)
            images[id_].append(self.image(record, location, size, frame))
        for id_, frames in images.items():
            if not frames:
                self.fail(self.location_of("videos", id_), "an image or more of this video_id", "none")
            yield id_, self.in_order(frames)

    def images_of_folders(self, root: object) -> Iterator[tuple[int, list[_Image]]]:
        """Yield the number and the ordered images of each video, with one video per folder."""
        folders: dict[str, list[_Image]] = {}
        names: dict[str, str] = {}
        for location, record in self.objects(root, "images"):
            name = self.text(record, "file_name", location)
            if names.setdefault(name, location) != location:
                self.fail(
                    f"{location}.file_name",
                    "a name of its own (without `videos` in the file, folders in the names tell videos apart)",
                    f"{show(name)}, the name of {names[name]} too; if several videos have frames under the same names, "
                    "as in the export of a CVAT project, export each video by itself, or put a folder for each video "
                    "before the names, in the file and on the disk",
                    "duplicate id",
                )
            path = PurePosixPath(name)
            image = self.image(record, location, self.size(record, location), natural_order(path.name))
            folders.setdefault(str(path.parent), []).append(image)
        for number, folder in enumerate(sorted(folders, key=natural_order), 1):
            yield number, self.in_order(folders[folder])

    def warn_of_shared_names(self, videos: dict[int, list[_Image]]) -> None:
        """Warn about images that share a file name, which is right only for clips that share frames."""
        counts = Counter(image.file_name for images in videos.values() for image in images)
        shared = [name for name, count in counts.items() if count > 1]
        if shared:
            warnings.warn(
                f"{self.name}: found {len(shared)} file names of several images, such as {show(shared[0])}; if they "
                "are frames of several videos, put a folder for each video before the names, in the file and on the "
                "disk",
                stacklevel=2,
            )

    def image(
        self, record: dict[str, Any], location: str, size: tuple[int, int], position: int | tuple[Any, ...]
    ) -> _Image:
        return _Image(location, self.new_id(record, location), self.text(record, "file_name", location), size, position)

    def in_order(self, images: list[_Image]) -> list[_Image]:
        """Sort the images of a video; fails if two have the same position or if sizes differ."""
        images = sorted(images, key=lambda image: image.position)
        for before, image in pairwise(images):
            if image.position == before.position:
                self.fail(
                    image.location, "a frame of its own in its video", f"that of {before.location} too", "duplicate id"
                )
            if image.size != before.size:
                (height, width), (other_height, other_width) = before.size, image.size
                expected = f"{height}x{width} pixels, as {before.location} of the same video"
                self.fail(image.location, expected, f"{other_height}x{other_width}")
        return images

    def identity(self, record: dict[str, Any], location: str) -> tuple[int, bool]:
        """The id of the instance that an annotation shows, and whether it is a crowd."""
        attributes = record.get("attributes")
        if isinstance(attributes, dict) and "track_id" in attributes:
            owner, key, location = attributes, "track_id", f"{location}.attributes"
            is_crowd = False
        else:
            owner, key = record, "instance_id" if "instance_id" in record else "track_id"
            is_crowd = self.flag(record, "iscrowd", location)
        if key not in owner:
            expected = "instance_id, track_id or attributes.track_id, the same in all frames of one object"
            self.fail(location, expected, "none of them (label tracks, not single shapes)")
        identity = self.integer(owner, key, location)
        if identity < 0:
            self.fail(f"{location}.{key}", "zero or more", str(identity))
        return identity, is_crowd

    def mask_of_size(self, record: dict[str, Any], size: tuple[int, int], location: str) -> bytes | None:
        """The compressed mask of an annotation; None if it is empty."""
        segmentation, box = record.get("segmentation"), record.get("bbox")
        if not segmentation and isinstance(box, list) and any(box[2:]):
            self.fail(f"{location}.segmentation", "polygons or run lengths", f"{show(segmentation)}, but a box")
        (track,) = compress_tracks([([self.segmentation(record, location)], *size)])
        return self.mask(track, location)


def _union(mask: bytes | None, other: bytes | None, size: tuple[int, int]) -> bytes | None:
    codes: list[dict[str, Any]] = [{"size": list(size), "counts": counts} for counts in (mask, other) if counts]
    return bytes(mask_utils.merge(codes)["counts"]) if codes else None


def _video(id_: int, images: list[_Image], tracks: dict[int, _Track]) -> Video:
    instances = []
    for identity, track in sorted(tracks.items()):
        masks = tuple(track.frames[t][1] if t in track.frames else None for t in range(len(images)))
        if any(masks):
            instances.append(Instance(identity, track.category_id, track.is_crowd, masks))
    return Video(id_, *images[0].size, tuple(image.file_name for image in images), len(images), tuple(instances))
