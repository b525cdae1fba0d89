"""Labels of every kind to import, made of the tiny dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tests.data.conftest import TinyDataset

from instanceformer.data.annotations import Video, VideoDataset
from instanceformer.data.formats.youtube_vis import read_annotations, write_youtube_vis

MakeDataset = Callable[..., TinyDataset]


HEIGHT, WIDTH = 24, 40  # of the tiny dataset


def save(path: Path, labels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def save_palette(path: Path, labels: NDArray[np.uint8]) -> None:
    image = Image.fromarray(labels, mode="P")
    image.putpalette([value for index in range(256) for value in (index * 77 % 256, 255 - index, index)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def labels_of(masks: Sequence[NDArray[np.bool_]], values: Sequence[int], dtype: type = np.uint8) -> NDArray[Any]:
    labels = np.zeros(masks[0].shape, dtype=dtype)
    for mask, value in zip(masks, values, strict=True):
        labels[mask] = value
    return labels


def write_davis(made: TinyDataset, folder: Path, values: Sequence[int] = (1, 2), dtype: type = np.uint8) -> Path:
    """Label images of a tiny dataset with two instances in every video."""
    for v, video in enumerate(made.content["videos"]):
        for t, name in enumerate(video["file_names"]):
            masks = [made.masks[2 * v + 1][t], made.masks[2 * v + 2][t]]
            write = save_palette if dtype == np.uint8 else save
            write((folder / name).with_suffix(".png"), labels_of(masks, values, dtype))
    return folder


def round_trip(dataset: VideoDataset, path: Path) -> dict[str, Any]:
    """Write a dataset, assert that it is read back as it was, and return the file's content."""
    write_youtube_vis(path, dataset)
    assert [each.name for each in path.parent.iterdir() if each.suffix != ".png"] == [path.name]  # nothing temporary
    read = read_annotations(path)
    assert read.categories == dataset.categories
    for video, before in zip(read.videos, dataset.videos, strict=True):
        assert (video.id, video.height, video.width, video.file_names) == (
            before.id,
            before.height,
            before.width,
            before.file_names,
        )
        for instance, original in zip(video.instances, before.instances, strict=True):
            assert (instance.id, instance.category_id, instance.is_crowd, instance.segmentations) == (
                original.id,
                original.category_id,
                original.is_crowd,
                original.segmentations,
            )
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def masks_of(video: Video, index: int) -> NDArray[np.bool_]:
    return video.decode_masks([video.instances[index]], range(video.length))[:, 0].numpy().astype(bool)


def assert_same_masks(dataset: VideoDataset, made: TinyDataset) -> None:
    """The tiny dataset's instances of all videos, in its order."""
    masks = [masks_of(video, index) for video in dataset.videos for index in range(len(video.instances))]
    for mask, expected in zip(masks, made.masks.values(), strict=True):
        np.testing.assert_array_equal(mask, expected)


def cocovid(made: TinyDataset, identity: Callable[[int, int], dict[str, Any]], videos: bool = True) -> dict[str, Any]:
    """A tiny dataset as CocoVID; `identity` gives the fields that name instance i of video v. Images in odd order."""
    content: dict[str, Any] = {"categories": made.content["categories"], "images": [], "annotations": []}
    if videos:
        content["videos"] = [{"id": video["id"], "name": f"v{v}"} for v, video in enumerate(made.content["videos"])]
    for v, video in enumerate(made.content["videos"]):
        for t, file_name in enumerate(video["file_names"]):
            image = {"id": 1000 * v + t, "file_name": file_name, "height": HEIGHT, "width": WIDTH}
            content["images"].insert(0, {**image, "video_id": video["id"], "frame_id": t} if videos else image)
            for i, annotation in enumerate(made.content["annotations"][2 * v : 2 * v + 2]):
                segmentation = annotation["segmentations"][t]
                if segmentation is not None:
                    record = {"id": len(content["annotations"]), "image_id": image["id"], "segmentation": segmentation}
                    record |= {"category_id": annotation["category_id"], "iscrowd": 0, **identity(v, i)}
                    content["annotations"].append(record)
    return content


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path
