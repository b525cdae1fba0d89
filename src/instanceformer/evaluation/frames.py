"""The overlap of tracks in each frame of a video, from which everything about identity follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from instanceformer.data.annotations import OCCLUSION_LEVELS, Video
from instanceformer.data.formats.run_lengths import mask_areas
from instanceformer.evaluation.matching import BoolArray
from instanceformer.evaluation.results import Track
from instanceformer.evaluation.track_iou import FloatArray, IntArray, Masks

LEVELS = tuple(OCCLUSION_LEVELS)
"""Names of the levels of occlusion, ascending; elsewhere their places here."""


@dataclass(frozen=True)
class Entry:
    """A predicted track of a result file: a class and a score for a sequence of masks.

    Attributes:
        category_id: its class.
        score: of the class.
        mask: place of the masks among those of the video.
    """

    category_id: int
    score: float
    mask: int


@dataclass(frozen=True, eq=False)
class FrameComparison:
    """D predicted and G true sequences of masks in the T frames of a video, and their overlaps.

    A result file has a track for every class that a query may have, with the same masks. Here each sequence of masks is
    there once, under its best class. Predicted, true and one empty sequence, one after the other, are M = D + G + 1.

    Attributes:
        entries: the tracks of the file, in its order.
        scores: (D,) the best of each sequence, descending.
        classes: (D,) category ids, of the best scores.
        true_classes: (G,) category ids of the instances, crowds included, in the order of the file.
        is_crowd: (G,) whether each stands for a group that nobody told apart.
        occlusion: (T, G) places in ``LEVELS``; -1 without a label.
        areas: (T, M) in pixels; 0 where there is no mask.
        intersections: (T, M, G) of all with the true ones, in pixels.
    """

    entries: list[Entry]
    scores: FloatArray
    classes: IntArray
    true_classes: IntArray
    is_crowd: BoolArray
    occlusion: IntArray
    areas: IntArray
    intersections: IntArray

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.areas)

    @property
    def num_predicted(self) -> int:
        """D, also the place of the first true sequence of masks."""
        return len(self.scores)

    @cached_property
    def true_areas(self) -> IntArray:
        """(T, G) in pixels."""
        return self.areas[:, self.num_predicted : -1]

    @cached_property
    def ious(self) -> FloatArray:
        """(T, M, G) in [0, 1]; 0 where either has no mask."""
        unions = self.areas[:, :, None] + self.true_areas[:, None] - self.intersections
        ious: FloatArray = self.intersections / np.maximum(unions, 1)
        return ious


def compare_frames(video: Video, tracks: Sequence[Track]) -> FrameComparison:
    """Compare all tracks of a video with all its instances in every frame.

    Args:
        video: with its instances.
        tracks: of as many frames and of masks of the same size as the video.

    Raises:
        ValueError: a mask is damaged.
    """
    texts = [tuple(rle and rle["counts"].encode() for rle in track.segmentations) for track in tracks]
    best: dict[Masks, Track] = {}
    for masks, track in zip(texts, tracks, strict=True):
        if masks not in best or track.score > best[masks].score:
            best[masks] = track
    predicted = sorted(best, key=lambda masks: -best[masks].score)
    place = {masks: index for index, masks in enumerate(predicted)}
    truth = [instance.segmentations for instance in video.instances]
    areas, intersections = _overlaps([*predicted, *truth, (None,) * video.length], truth, (video.height, video.width))
    labels = [instance.occlusion or (None,) * video.length for instance in video.instances]
    levels = [[-1 if label is None else LEVELS.index(label) for label in row] for row in labels]
    return FrameComparison(
        entries=[Entry(t.category_id, t.score, place[masks]) for masks, t in zip(texts, tracks, strict=True)],
        scores=np.array([best[masks].score for masks in predicted], dtype=np.float64),
        classes=np.array([best[masks].category_id for masks in predicted], dtype=np.int64),
        true_classes=np.array([instance.category_id for instance in video.instances], dtype=np.int64),
        is_crowd=np.array([instance.is_crowd for instance in video.instances], dtype=np.bool_),
        occlusion=np.array(levels, dtype=np.int64).reshape(len(levels), video.length).T,
        areas=areas,
        intersections=intersections,
    )


def _overlaps(masks: Sequence[Masks], truth: Sequence[Masks], size: tuple[int, int]) -> tuple[IntArray, IntArray]:
    """(T, M) areas of M sequences of compressed masks, and (T, M, G) intersections with G true ones."""
    from pycocotools import mask as coco_mask  # here, so that a training starts without it

    frames = list(zip(*masks, strict=True))
    present = np.array([[mask is not None for mask in frame] for frame in frames]).reshape(len(frames), len(masks))
    areas = np.zeros(present.shape, dtype=np.int64)
    areas[present] = mask_areas([mask for frame in frames for mask in frame if mask is not None], size[0] * size[1])
    if areas.min(initial=0) < 0:  # of which pycocotools' iou would not return
        raise ValueError(f"expected run lengths that fill masks of {size[0]}x{size[1]} pixels, found damaged ones")
    intersections = np.zeros((*areas.shape, len(truth)), dtype=np.int64)
    first = len(masks) - 1 - len(truth)  # of the true ones
    for t, frame in enumerate(frames):
        rows = np.flatnonzero(areas[t])
        columns = rows[rows >= first]
        if len(columns):
            coded = {row: {"size": list(size), "counts": frame[row]} for row in rows}
            ious = coco_mask.iou([*coded.values()], [coded[column] for column in columns], [False] * len(columns))
            sums = areas[t, rows, None] + areas[t, columns]
            intersections[t, rows[:, None], columns - first] = np.rint(ious / (1 + ious) * sums)  # exact, being whole
    return areas, intersections
