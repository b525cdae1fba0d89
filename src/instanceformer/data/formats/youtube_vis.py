"""Annotation files: reads and writes YouTube-VIS (and OVIS); reads COCO, whose images become videos of one frame."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.formats.records import BATCH, Problem, Records, is_finite, load_json
from instanceformer.data.formats.run_lengths import MaskError, compress_tracks, mask_areas, show
from instanceformer.files import replacing


def read_annotations(path: Path | str, problems: list[Problem] | None = None) -> VideoDataset:
    """Read an annotation file in YouTube-VIS (or OVIS) or COCO format; see ``parse_annotations``.

    Args:
        path: the JSON file.
        problems: list that collects the problems of single objects, which are then left out; None: the first problem is
            raised.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed; the message says where, what was expected and what was found.
    """
    return parse_annotations(load_json(Path(path)), str(path), problems)


def parse_annotations(content: object, name: str, problems: list[Problem] | None = None) -> VideoDataset:
    """Convert the content of an annotation file to dataclasses.

    A file with ``images`` but no ``videos`` is in COCO format; each image becomes a one-frame video with its id.

    A video's number of frames is that of its ``file_names`` or, without these, its ``length``. The ``length`` of an
    annotation is ignored, since OVIS always writes 1. An instance is not visible in frames where its segmentation is
    null, has no counts, or is empty. Masks may be run lengths, compressed or not, or lists of polygons. Integers may be
    written as floats. A missing ``iscrowd`` means 0. ``annotations`` may be missing, as in files for evaluation
    servers; then no video has instances.

    Args:
        content: the parsed JSON.
        name: name of the file, for messages.
        problems: as in ``read_annotations``.

    Raises:
        ValueError: the content is malformed; the message says where, what was expected and what was found.
    """
    is_coco = isinstance(content, dict) and "images" in content and "videos" not in content
    return (_Coco if is_coco else _YouTubeVis)(name, problems).dataset(content)


class _YouTubeVis(Records):
    videos_key, video_id_key = "videos", "video_id"

    def dataset(self, root: object) -> VideoDataset:
        categories = self.categories(root)
        videos: dict[int, Video] = {}
        for location, record in self.objects(root, self.videos_key):
            with self.tolerate():
                video = self.video(record, location)
                videos[video.id] = video
        instances: dict[int, list[Instance]] = {}
        records = self.objects(root, "annotations", optional=True)
        for start in range(0, len(records), BATCH):
            batch = []
            for location, record in records[start : start + BATCH]:
                with self.tolerate():
                    video = videos[self.known_id(record, self.video_id_key, location, self.videos_key)]
                    batch.append((location, record, video, self.segmentations(record, video, location)))
            tracks = compress_tracks([(masks, video.height, video.width) for _, _, video, masks in batch])
            for (location, record, video, _), track in zip(batch, tracks, strict=True):
                with self.tolerate():
                    instances.setdefault(video.id, []).append(self.instance(record, video, track, location))
        self.warn_of_fragments()
        return VideoDataset(
            categories=categories,
            videos=tuple(replace(video, instances=tuple(instances.get(video.id, ()))) for video in videos.values()),
        )

    def video(self, record: dict[str, Any], location: str) -> Video:
        file_names = record.get("file_names")
        if file_names is None and "length" in record:
            length = self.integer(record, "length", location)
            if length < 1:
                self.fail(f"{location}.length", "one frame or more", str(length))
            file_names = []
        elif isinstance(file_names, list) and file_names and all(isinstance(name, str) for name in file_names):
            length = len(file_names)
        else:
            expected = "a list of the video's frames (a file with a list of `images` instead must be imported first)"
            self.fail(f"{location}.file_names", expected, show(file_names))
        height, width = self.size(record, location)
        return Video(self.new_id(record, location), height, width, tuple(file_names), length)

    def segmentations(self, record: dict[str, Any], video: Video, location: str) -> list[Any]:
        segmentations = self.per_frame(record, "segmentations", location, video.length)
        if segmentations is None:
            self.fail(f"{location}.segmentations", "a list with one entry for each frame", "nothing")
        return [self.whole(mask, f"{location}.segmentations[{frame}]") for frame, mask in enumerate(segmentations)]

    def instance(
        self, record: dict[str, Any], video: Video, track: list[bytes | None] | MaskError, location: str
    ) -> Instance:
        category_id = self.known_id(record, "category_id", location, "categories")
        masks = self.masks(track, location)
        areas = self.per_frame(record, "areas", location, video.length)
        if areas is not None and not all(area is None or (is_finite(area) and area >= 0) for area in areas):
            self.fail(f"{location}.areas", "an area in pixels or null for each frame", show(areas))
        boxes = self.per_frame(record, "bboxes", location, video.length)
        occlusion = self.per_frame(record, "occlusion", location, video.length)
        if occlusion is not None and not all(level is None or isinstance(level, str) for level in occlusion):
            self.fail(f"{location}.occlusion", "a string or null for each frame", show(occlusion))
        return Instance(
            id=self.new_id(record, location),
            category_id=category_id,
            is_crowd=self.flag(record, "iscrowd", location),
            segmentations=masks,
            areas=None if areas is None else tuple(float(area or 0) for area in areas),
            has_box_areas=areas is not None and boxes is not None and all(map(_is_area_of, areas, boxes)),
            occlusion=None if occlusion is None else tuple(occlusion),
        )


def _is_area_of(area: float | None, box: object) -> bool:
    """Whether an area equals that of the box [x, y, width, height], to half a pixel; true if both are missing."""
    match box:
        case None | []:
            return not area
        case [_, _, width, height] if is_finite(width) and is_finite(height):
            return abs((area or 0) - float(width) * float(height)) < 0.5
        case _:
            return False


class _Coco(_YouTubeVis):
    videos_key, video_id_key = "images", "image_id"

    def video(self, record: dict[str, Any], location: str) -> Video:
        height, width = self.size(record, location)
        file_name = self.text(record, "file_name", location)
        return Video(self.new_id(record, location), height, width, (file_name,), 1)

    def segmentations(self, record: dict[str, Any], video: Video, location: str) -> list[Any]:
        return [self.segmentation(record, location)]

    def instance(
        self, record: dict[str, Any], video: Video, track: list[bytes | None] | MaskError, location: str
    ) -> Instance:
        return Instance(
            id=self.new_id(record, location),
            category_id=self.known_id(record, "category_id", location, "categories"),
            is_crowd=self.flag(record, "iscrowd", location),
            segmentations=(self.mask(track, location),),
        )


def track_fields(segmentations: Sequence[bytes | None], height: int, width: int) -> dict[str, list[Any]]:
    """The per-frame fields of an annotation; all three are None in frames where the instance is not visible.

    Args:
        segmentations: for each frame, the compressed counts of a non-empty mask, or None.
        height: height of the video in pixels.
        width: width of the video in pixels.

    Returns:
        ``segmentations``: ``{size: [height, width], counts: text}``; ``bboxes``: [x, y, width, height] in pixels;
        ``areas``: mask areas in pixels.
    """
    from pycocotools import mask as mask_utils  # imported here so that training does not load it

    visible = {frame: counts for frame, counts in enumerate(segmentations) if counts is not None}
    codes: list[dict[str, Any]] = [{"size": [height, width], "counts": counts} for counts in visible.values()]
    areas = mask_areas(list(visible.values()), height * width)  # with NumPy 2, pycocotools' area fails for 256 masks
    fields: dict[str, list[Any]] = {key: [None] * len(segmentations) for key in ("segmentations", "bboxes", "areas")}
    for frame, code, box, area in zip(visible, codes, mask_utils.toBbox(codes), areas, strict=True):
        fields["segmentations"][frame] = {**code, "counts": code["counts"].decode("ascii")}
        fields["bboxes"][frame] = box.astype(int).tolist()
        fields["areas"][frame] = area
    return fields


def write_youtube_vis(path: Path, dataset: VideoDataset) -> None:
    """Write an annotation file in YouTube-VIS format.

    Areas and boxes are computed from the masks. The file appears under its name only once it is complete.

    Args:
        path: file to write; its folder is created if necessary.
        dataset: the dataset to write; its videos must have file names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write('{"categories": [')
        _write_items(file, (vars(category) for category in dataset.categories))
        file.write('], "videos": [')
        _write_items(file, _videos(dataset))
        file.write('], "annotations": [')
        _write_items(file, _annotations(dataset))
        file.write("]}\n")


def _write_items(file: TextIO, items: Iterable[dict[str, Any]]) -> None:
    for index, item in enumerate(items):
        file.write((",\n" if index else "\n") + json.dumps(item))


def _size(video: Video) -> dict[str, int]:
    return {"height": video.height, "width": video.width, "length": video.length}


def _videos(dataset: VideoDataset) -> Iterable[dict[str, Any]]:
    for video in dataset.videos:
        yield {"id": video.id, **_size(video), "file_names": video.file_names}


def _annotations(dataset: VideoDataset) -> Iterable[dict[str, Any]]:
    for video in dataset.videos:
        for instance in video.instances:
            record = {
                "id": instance.id,
                "video_id": video.id,
                "category_id": instance.category_id,
                "iscrowd": int(instance.is_crowd),
                **_size(video),
                **track_fields(instance.segmentations, video.height, video.width),
            }
            if instance.occlusion is not None:
                record["occlusion"] = instance.occlusion
            yield record
