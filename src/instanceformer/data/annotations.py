"""Annotated videos: the typed form that every dataset takes on the data side, and the reader of YouTube-VIS files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor

from instanceformer.data.run_lengths import compress_masks, show


@dataclass(frozen=True)
class Category:
    """A category as its file declares it.

    Attributes:
        id: the file's own id, any integer.
        name: the name to show.
    """

    id: int
    name: str


@dataclass(frozen=True)
class Instance:
    """One object followed through one video.

    Attributes:
        id: unique among all instances of its dataset.
        category_id: id of one of the dataset's categories.
        is_crowd: whether it stands for a group that nobody told apart; not trained on.
        segmentations: for each frame of the video the mask's compressed run-length counts, as pycocotools writes them
            for the video's size; None where the instance is not visible.
    """

    id: int
    category_id: int
    is_crowd: bool
    segmentations: tuple[bytes | None, ...]


@dataclass(frozen=True)
class Video:
    """One video and the instances in it.

    Attributes:
        id: unique among the videos of its dataset.
        height: of every frame, in pixels.
        width: of every frame, in pixels.
        file_names: the frames in temporal order, relative to the folder of the dataset's images.
        instances: the ground truth, crowds included; empty when the file has none.
    """

    id: int
    height: int
    width: int
    file_names: tuple[str, ...]
    instances: tuple[Instance, ...] = ()

    @property
    def length(self) -> int:
        """Number of frames."""
        return len(self.file_names)

    def decode_masks(self, instances: Sequence[Instance], frames: Sequence[int]) -> Tensor:
        """Masks of n of the video's instances in T of its frames.

        Returns:
            (T, n, height, width) uint8, one inside the instance and zero elsewhere.
        """
        masks = np.zeros((len(frames), len(instances), self.height, self.width), dtype=np.uint8)
        for t, frame in enumerate(frames):
            for i, instance in enumerate(instances):
                counts = instance.segmentations[frame]
                if counts is not None:
                    code = {"size": [self.height, self.width], "counts": counts}
                    masks[t, i] = mask_utils.decode(code)
        return torch.from_numpy(masks)


@dataclass(frozen=True)
class VideoDataset:
    """Everything that the data side knows about a dataset: its categories and its annotated videos.

    Attributes:
        categories: in ascending order of id; a category's place is its class index.
        videos: in the order of the file.
    """

    categories: tuple[Category, ...]
    videos: tuple[Video, ...]

    def __post_init__(self) -> None:
        ids = [category.id for category in self.categories]
        if any(a >= b for a, b in pairwise(ids)):
            raise ValueError(f"categories must come in ascending order of unique ids, found {ids}")

    @cached_property
    def _classes(self) -> dict[int, int]:
        return {category.id: index for index, category in enumerate(self.categories)}

    @property
    def num_classes(self) -> int:
        """Number of categories, K."""
        return len(self.categories)

    @property
    def is_annotated(self) -> bool:
        """Whether any video has an instance."""
        return any(video.instances for video in self.videos)

    def class_of(self, category_id: int) -> int:
        """Class index in [0, K) of a category id."""
        return self._classes[category_id]

    def category_of(self, class_index: int) -> int:
        """Category id of a class index in [0, K)."""
        return self.categories[class_index].id


def read_youtube_vis(path: Path | str) -> VideoDataset:
    """Read an annotation file in the format of YouTube-VIS and OVIS.

    A video has as many frames as ``file_names``; every ``length`` in the file is ignored, since some files have none
    and OVIS writes 1 on each annotation. Where a segmentation is null, has no counts or no pixel, the instance is not
    visible. Masks may be compressed or uncompressed run lengths or lists of polygons; sizes may be integral floats.
    A missing ``iscrowd`` is 0; files for evaluation servers have no ``annotations``, and then there are no instances.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in the format; the message says where, what was found and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file; expected a JSON file in YouTube-VIS format")
    try:
        root = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); is the file complete?") from error
    return _Reader(path).dataset(root)


class _Reader:
    """Turns the parsed JSON of one file into dataclasses; ``where`` is a place in the file, such as ``videos[3]``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def dataset(self, root: object) -> VideoDataset:
        categories = [
            Category(id=self.integer(record, "id", where), name=self.text(record, "name", where))
            for where, record in self.records(root, "categories")
        ]
        self.check_unique("categories", (category.id for category in categories))
        known = {category.id for category in categories}

        videos: dict[int, Video] = {}
        records = self.records(root, "videos")
        for where, record in records:
            video = self.video(record, where)
            videos[video.id] = video
        self.check_unique("videos", (record["id"] for _, record in records))

        instances: dict[int, list[Instance]] = {}
        assert isinstance(root, dict)  # records() has looked
        annotations = self.records(root, "annotations") if root.get("annotations") else []
        for where, record in annotations:
            video_id = self.integer(record, "video_id", where)
            if video_id not in videos:
                self.fail(f"{where}.video_id", f"{video_id}", "the id of one of the file's videos")
            instance = self.instance(record, videos[video_id], where)
            if instance.category_id not in known:
                self.fail(f"{where}.category_id", f"{instance.category_id}", "the id of one of the file's categories")
            instances.setdefault(video_id, []).append(instance)
        self.check_unique("annotations", (record["id"] for _, record in annotations))

        return VideoDataset(
            categories=tuple(sorted(categories, key=lambda category: category.id)),
            videos=tuple(
                Video(v.id, v.height, v.width, v.file_names, tuple(instances.get(v.id, ()))) for v in videos.values()
            ),
        )

    def video(self, record: dict[str, Any], where: str) -> Video:
        file_names = record.get("file_names")
        if not isinstance(file_names, list) or not file_names or not all(isinstance(n, str) for n in file_names):
            expected = "a list of the video's frames (a file with a list of `images` instead must be converted first)"
            self.fail(f"{where}.file_names", show(file_names), expected)
        height, width = (self.integer(record, key, where) for key in ("height", "width"))
        if height <= 0 or width <= 0:
            self.fail(where, f"height {height} and width {width}", "positive sizes in pixels")
        return Video(self.integer(record, "id", where), height, width, tuple(file_names))

    def instance(self, record: dict[str, Any], video: Video, where: str) -> Instance:
        segmentations = record.get("segmentations")
        if not isinstance(segmentations, list):
            self.fail(f"{where}.segmentations", show(segmentations), "a list with one entry for each frame")
        if len(segmentations) != video.length:
            expected = f"{video.length}, one for each of the file_names of video {video.id}"
            self.fail(f"{where}.segmentations", f"{len(segmentations)} entries", expected)
        try:
            masks = compress_masks(segmentations, video.height, video.width)
        except ValueError as error:
            raise ValueError(f"{self.path}: {where}.{error}") from error
        return Instance(
            id=self.integer(record, "id", where),
            category_id=self.integer(record, "category_id", where),
            is_crowd=bool(record.get("iscrowd", 0)),
            segmentations=tuple(masks),
        )

    def records(self, root: object, key: str) -> list[tuple[str, dict[str, Any]]]:
        """The objects of one of the file's lists, each with its place."""
        found = root.get(key) if isinstance(root, dict) else root
        if not isinstance(found, list) or not found or not all(isinstance(record, dict) for record in found):
            self.fail(key, show(found), "a list of objects with at least one entry, as in YouTube-VIS files")
        return [(f"{key}[{index}]", record) for index, record in enumerate(found)]

    def integer(self, record: dict[str, Any], key: str, where: str) -> int:
        value = record.get(key)
        if not isinstance(value, (int, float)) or value != int(value):
            self.fail(f"{where}.{key}", show(value), "a whole number")
        return int(value)

    def text(self, record: dict[str, Any], key: str, where: str) -> str:
        value = record.get(key)
        if not isinstance(value, str):
            self.fail(f"{where}.{key}", show(value), "a string")
        return value

    def check_unique(self, key: str, ids: Iterable[int]) -> None:
        seen: dict[int, int] = {}
        for index, id_ in enumerate(ids):
            if id_ in seen:
                self.fail(f"{key}[{index}].id", f"{id_}, the id of {key}[{seen[id_]}] too", "an id of its own")
            seen[id_] = index

    def fail(self, where: str, found: str, expected: str) -> NoReturn:
        raise ValueError(f"{self.path}: {where}: expected {expected}, found {found}")
