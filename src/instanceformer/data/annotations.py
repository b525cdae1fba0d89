"""The types that represent annotated videos, whatever dataset they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from instanceformer.data.formats.run_lengths import decode_runs

if TYPE_CHECKING:
    from torch import Tensor

OCCLUSION_LEVELS = {"no_occlusion": 0.0, "slight_occlusion": 0.25, "severe_occlusion": 0.75}
"""OVIS's labels for how much of an instance is hidden in a frame, each with the degree its evaluator assigns."""


@dataclass(frozen=True)
class Category:
    """A category as its file declares it.

    Attributes:
        id: category id in the file; any integer.
        name: display name.
    """

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Instance:
    """One object followed through one video.

    Attributes:
        id: unique among all instances of the dataset.
        category_id: id of one of the dataset's categories.
        is_crowd: whether this is a group of objects labeled as one. Crowds are not trained on.
        segmentations: one entry per frame of the video: the mask's compressed run-length counts in pycocotools' format,
            at the video's size, or None if the instance is not visible.
        areas: area in pixels in every frame, as given in the file, with null read as 0; None if the file has no areas.
        has_box_areas: whether ``areas`` are box areas (as in OVIS) in every frame.
        occlusion: occlusion level in every frame (as in OVIS); None if the file has no levels.
    """

    id: int
    category_id: int
    is_crowd: bool
    segmentations: tuple[bytes | None, ...]
    areas: tuple[float, ...] | None = None
    has_box_areas: bool = False
    occlusion: tuple[str | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """One video and the instances in it.

    Attributes:
        id: unique among the videos of the dataset.
        height: frame height in pixels.
        width: frame width in pixels.
        file_names: the frames in temporal order, as paths relative to the dataset's image folder; empty if the file
            gives only their number.
        length: number of frames.
        instances: the ground truth, including crowds; empty if the file has none.
    """

    id: int
    height: int
    width: int
    file_names: tuple[str, ...]
    length: int
    instances: tuple[Instance, ...] = ()

    def decode_masks(
        self,
        instances: Sequence[Instance],
        frames: Sequence[int],
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Decode the masks of n instances in T frames, either whole or restricted to some rows and columns.

        Args:
            instances: the n instances.
            frames: indices of the T frames.
            rows: (h,) int64 indices of the rows to take, in any order, with repeats allowed; None takes all.
            columns: (w,) int64 indices of the columns to take, likewise.

        Returns:
            (T, n, h, w) uint8, 1 inside the instance and 0 elsewhere.
        """
        import torch  # imported here so that commands that only read annotations do not load it

        row_indices = np.arange(self.height) if rows is None else rows.numpy()
        column_indices = np.arange(self.width) if columns is None else columns.numpy()
        masks = np.zeros((len(frames), len(instances), len(row_indices), len(column_indices)), dtype=np.uint8)
        codes = {
            (t, i): counts
            for t, frame in enumerate(frames)
            for i, instance in enumerate(instances)
            if (counts := instance.segmentations[frame]) is not None
        }
        if codes:
            runs = decode_runs(list(codes.values()), self.height * self.width)
            alternating = np.tile(np.array([0, 1], dtype=np.uint8), runs.lengths.shape[1])
            for index, lengths in zip(codes, np.split(runs.lengths, runs.first[1:], axis=1), strict=True):
                pixels = np.repeat(alternating[: lengths.size], lengths.T.ravel())
                chosen = pixels.reshape(self.width, self.height).take(column_indices, axis=0)
                masks[index] = chosen.T.take(row_indices, axis=0)
        return torch.from_numpy(masks)


@dataclass(frozen=True)
class VideoDataset:
    """The categories and annotated videos of a dataset.

    Attributes:
        categories: in ascending order of id; a category's position is its class index.
        videos: in file order; either a tuple or ``PackedVideos``, which builds each video on access.

    Raises:
        ValueError: category ids are not unique and ascending.
    """

    categories: tuple[Category, ...]
    videos: Sequence[Video]

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
