"""Annotation files in the format of YouTube-VIS and OVIS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.records import BATCH, Problem, Records, is_finite
from instanceformer.data.run_lengths import compress_tracks, show


def parse_youtube_vis(content: object, name: str, problems: list[Problem] | None = None) -> VideoDataset:
    """Turn the content of a YouTube-VIS file into dataclasses.

    A video has as many frames as ``file_names``, or ``length`` where it has none; the ``length`` of an annotation is
    ignored, since OVIS writes 1 on each. Where a segmentation is null, has no counts or no pixel, the instance is not
    visible. Masks may be compressed or uncompressed run lengths or lists of polygons; sizes may be integral floats.
    A missing ``iscrowd`` is 0; files for evaluation servers have no ``annotations``, and then there are no instances.

    Args:
        content: the parsed JSON.
        name: of the file, for messages.
        problems: takes what is wrong with single objects, which are then left out; None: the first problem is raised.

    Raises:
        ValueError: the file is not in the format; the message says where, what was expected and what was found.
    """
    return _YouTubeVis(name, problems).dataset(content)


class _YouTubeVis(Records):
    def dataset(self, root: object) -> VideoDataset:
        categories = self.categories(root)
        category_ids = {category.id for category in categories}
        videos: dict[int, Video] = {}
        places: dict[int, str] = {}
        for where, record in self.objects(root, "videos"):
            with self.tolerate():
                video = self.video(record, where, places)
                videos[video.id] = video
        instances: dict[int, list[Instance]] = {}
        places = {}
        records = self.objects(root, "annotations", optional=True)
        for start in range(0, len(records), BATCH):
            batch = []
            for where, record in records[start : start + BATCH]:
                with self.tolerate():
                    video = videos[self.known_id(record, "video_id", where, videos, "videos")]
                    batch.append((where, record, video, self.segmentations(record, video, where)))
            found = compress_tracks([(masks, video.height, video.width) for _, _, video, masks in batch])
            for (where, record, video, _), masks in zip(batch, found, strict=True):
                with self.tolerate():
                    category_id = self.known_id(record, "category_id", where, category_ids, "categories")
                    instance = self.instance(record, video, category_id, self.masks(masks, where), where, places)
                    instances.setdefault(video.id, []).append(instance)
        self.warn_of_fragments()
        return VideoDataset(
            categories=categories,
            videos=tuple(replace(video, instances=tuple(instances.get(video.id, ()))) for video in videos.values()),
        )

    def video(self, record: dict[str, Any], where: str, places: dict[int, str]) -> Video:
        file_names = record.get("file_names")
        if file_names is None and "length" in record:
            length = self.integer(record, "length", where)
            if length < 1:
                self.fail(f"{where}.length", "one frame or more", str(length))
            file_names = []
        elif isinstance(file_names, list) and file_names and all(isinstance(name, str) for name in file_names):
            length = len(file_names)
        else:
            expected = "a list of the video's frames (a file with a list of `images` instead must be imported first)"
            self.fail(f"{where}.file_names", expected, show(file_names))
        height, width = self.size(record, where)
        return Video(self.new_id(record, where, places), height, width, tuple(file_names), length)

    def segmentations(self, record: dict[str, Any], video: Video, where: str) -> list[Any]:
        segmentations = self.per_frame(record, "segmentations", where, video.length)
        if segmentations is None:
            self.fail(f"{where}.segmentations", "a list with one entry for each frame", "nothing")
        return [self.whole(mask, f"{where}.segmentations[{frame}]") for frame, mask in enumerate(segmentations)]

    def instance(
        self,
        record: dict[str, Any],
        video: Video,
        category_id: int,
        masks: tuple[bytes | None, ...],
        where: str,
        places: dict[int, str],
    ) -> Instance:
        areas = self.per_frame(record, "areas", where, video.length)
        if areas is not None and not all(area is None or (is_finite(area) and area >= 0) for area in areas):
            self.fail(f"{where}.areas", "an area in pixels or null for each frame", show(areas))
        boxes = self.per_frame(record, "bboxes", where, video.length)
        occlusion = self.per_frame(record, "occlusion", where, video.length)
        if occlusion is not None and not all(level is None or isinstance(level, str) for level in occlusion):
            self.fail(f"{where}.occlusion", "a string or null for each frame", show(occlusion))
        return Instance(
            id=self.new_id(record, where, places),
            category_id=category_id,
            is_crowd=self.flag(record, "iscrowd", where),
            segmentations=masks,
            areas=None if areas is None else tuple(float(area or 0) for area in areas),
            has_box_areas=areas is not None and boxes is not None and all(map(_is_area_of, areas, boxes)),
            occlusion=None if occlusion is None else tuple(occlusion),
        )


def _is_area_of(area: float | None, box: object) -> bool:
    """Whether an area is that of its box [x, y, width, height]; so it is where both are missing."""
    match box:
        case None | []:
            return not area
        case [_, _, width, height] if is_finite(width) and is_finite(height):
            return abs((area or 0) - float(width) * float(height)) < 0.5
        case _:
            return False
