"""Annotation files in YouTube-VIS format, written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from pycocotools import mask as mask_utils

from instanceformer.data.annotations import VideoDataset
from instanceformer.files import replacing


def track_fields(segmentations: Sequence[bytes | None], height: int, width: int) -> dict[str, list[Any]]:
    """What an annotation says of every frame; null in all three lists where the instance is not visible.

    Args:
        segmentations: for each frame the compressed counts of a mask with at least one pixel, or None.
        height: of the video, in pixels.
        width: of the video, in pixels.

    Returns:
        segmentations: ``{size: [height, width], counts: text}``; bboxes: [x, y, width, height] in pixels; areas: in
        pixels, of the mask.
    """
    visible = [frame for frame, counts in enumerate(segmentations) if counts is not None]
    codes: list[dict[str, Any]] = [{"size": [height, width], "counts": segmentations[frame]} for frame in visible]
    fields: dict[str, list[Any]] = {key: [None] * len(segmentations) for key in ("segmentations", "bboxes", "areas")}
    for frame, code, box, area in zip(visible, codes, mask_utils.toBbox(codes), mask_utils.area(codes), strict=True):
        fields["segmentations"][frame] = {**code, "counts": code["counts"].decode("ascii")}
        fields["bboxes"][frame] = box.astype(int).tolist()
        fields["areas"][frame] = int(area)
    return fields


def write_youtube_vis(path: Path, dataset: VideoDataset) -> None:
    """Write an annotation file in YouTube-VIS format.

    Areas and boxes are those of the masks. The file appears under its name only when it is complete.

    Args:
        path: of the file; its folder is made if there is none.
        dataset: what to write; its videos have file names.
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


def _videos(dataset: VideoDataset) -> Iterable[dict[str, Any]]:
    for video in dataset.videos:
        size = {"height": video.height, "width": video.width, "length": video.length}
        yield {"id": video.id, **size, "file_names": video.file_names}


def _annotations(dataset: VideoDataset) -> Iterable[dict[str, Any]]:
    for video in dataset.videos:
        size = {"height": video.height, "width": video.width, "length": video.length}
        for instance in video.instances:
            record = {
                "id": instance.id,
                "video_id": video.id,
                "category_id": instance.category_id,
                "iscrowd": int(instance.is_crowd),
                **size,
                **track_fields(instance.segmentations, video.height, video.width),
            }
            if instance.occlusion is not None:
                record["occlusion"] = instance.occlusion
            yield record
