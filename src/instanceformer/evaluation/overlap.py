"""Overlap of predicted and true tracks, over all frames of a video and frame by frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from instanceformer.data.annotations import OCCLUSION_LEVELS, Video
from instanceformer.data.formats.run_lengths import BATCH, decode_runs, mask_areas
from instanceformer.evaluation.results import Track

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Masks = Sequence[bytes | None]
"""The compressed counts of a track's mask in each frame, or None."""

FRAMES = 32
"""Number of frames compared at once, which bounds memory for long videos."""
LEVELS = tuple(OCCLUSION_LEVELS)
"""Names of the occlusion levels, ascending. Arrays hold indices into this tuple."""


@dataclass(frozen=True, eq=False)
class TrackRuns:
    """A track as n runs of pixels, read frame by frame over F frames, and each frame column by column.

    Attributes:
        bounds: (2n,) float64, start and end (exclusive) of each run as pixel indices, ascending; whole numbers, but
            float64 because interpolation needs it.
        areas: (F,) int64, area in pixels in each frame.
        columns: (F, 2) int64, first and last column that the track touches in each frame; if it touches none, the last
            is less than the first.
    """

    bounds: FloatArray
    areas: IntArray
    columns: IntArray

    @cached_property
    def filled(self) -> FloatArray:
        """(2n,) float64, how many of the track's own pixels come before each bound."""
        filled = np.zeros_like(self.bounds)
        np.cumsum(self.bounds[1::2] - self.bounds[::2], out=filled[1::2])
        filled[2::2] = filled[1:-1:2]
        return filled


def track_ious(
    predicted: Sequence[Masks], truth: Sequence[Masks], size: tuple[int, int], comparable: BoolArray
) -> tuple[IntArray, FloatArray]:
    """Compare D predicted tracks of a video with G true ones, over all frames.

    Args:
        predicted: D tracks.
        truth: G tracks with the same number of frames.
        size: (height, width) of the video in pixels.
        comparable: (D, G) bool, which pairs to compare.

    Returns:
        (D, frames) areas of the predicted masks in pixels, and (D, G) IoUs: the sum of the intersections over all
        frames divided by the sum of the unions (Yang et al., "Video Instance Segmentation", ICCV 2019, section 3). The
        IoU is 0 if both tracks are empty, and for pairs that are not compared.

    Raises:
        ValueError: a mask is damaged.
    """
    num_frames = len(predicted[0]) if predicted else 0
    areas = np.zeros((len(predicted), num_frames), dtype=np.int64)
    true_areas = np.zeros(len(truth), dtype=np.int64)
    intersections = np.zeros((len(predicted), len(truth)))
    for start in range(0, num_frames, FRAMES):
        stop = min(start + FRAMES, num_frames)
        tracks = decode_tracks([masks[start:stop] for masks in predicted], size)
        true_tracks = decode_tracks([masks[start:stop] for masks in truth], size)
        areas[:, start:stop] = [track.areas for track in tracks]
        true_areas += np.array([track.areas.sum() for track in true_tracks], dtype=np.int64)
        if truth:
            first, last = np.stack([track.columns for track in tracks]).transpose(2, 0, 1)[:, :, None]
            true_first, true_last = np.stack([track.columns for track in true_tracks]).transpose(2, 0, 1)
            meet = ((first <= true_last) & (true_first <= last)).any(axis=2)
            for d, g in zip(*np.nonzero(meet & comparable), strict=True):
                intersections[d, g] += _intersection(tracks[d], true_tracks[g])
    unions = areas.sum(axis=1)[:, None] + true_areas - intersections
    ious: FloatArray = np.divide(intersections, unions, out=np.zeros_like(intersections), where=unions > 0)
    return areas, np.where(comparable, ious, 0.0)


def _intersection(track: TrackRuns, other: TrackRuns) -> float:
    """Pixels that two tracks share. Interpolation is exact, since between bounds the slope is 0 or 1."""
    before = np.interp(track.bounds, other.bounds, other.filled)
    return float((before[1::2] - before[::2]).sum())


def decode_tracks(tracks: Sequence[Masks], size: tuple[int, int]) -> list[TrackRuns]:
    """Decode the masks of a video's tracks from compressed counts, many at once.

    Raises:
        ValueError: a mask is damaged.
    """
    decoded: list[TrackRuns] = []
    batch: list[Masks] = []
    length = 0
    for masks in tracks:
        batch.append(masks)
        length += sum(map(len, filter(None, masks)))
        if length > BATCH:
            decoded += _decode_batch(batch, size)
            batch, length = [], 0
    return decoded + _decode_batch(batch, size)


def _decode_batch(tracks: Sequence[Masks], size: tuple[int, int]) -> list[TrackRuns]:
    masks = [mask for track in tracks for mask in track if mask is not None]
    height, pixels = size[0], size[0] * size[1]
    present = np.array([[mask is not None for mask in track] for track in tracks], dtype=np.bool_)
    areas = np.zeros(present.shape, dtype=np.int64)
    columns = np.zeros((*present.shape, 2), dtype=np.int64)
    columns[..., 1] = -1
    if not masks:
        return [TrackRuns(np.zeros(0), *row) for row in zip(areas, columns, strict=True)]
    runs = decode_runs(masks, pixels)
    if runs.areas.min() < 0:
        raise ValueError(f"found damaged masks, expected run lengths that fill {pixels} pixels")
    areas[present] = runs.areas
    zeros, ones = runs.lengths
    bounds = np.empty((len(ones), 2))
    ends = (zeros + ones).cumsum()  # as if all masks were successive frames of one track
    begins = np.append(runs.first, len(ones))
    first, last = begins[:-1], begins[1:] - 1
    last_ones = last - (ones[last] == 0)  # a mask that ends with zeros has an empty run of ones
    shown = np.stack([ends[first] - ones[first], ends[np.maximum(first, last_ones)] - 1], axis=1)
    columns[present] = (shown - pixels * np.arange(len(masks))[:, None]) // height
    ends += (pixels * (present.nonzero()[1] - np.arange(len(masks)))).repeat(last + 1 - first)
    bounds[:, 0], bounds[:, 1] = ends - ones, ends
    parts = np.split(bounds, begins[present.sum(axis=1).cumsum()[:-1]])
    return [TrackRuns(part.ravel(), *row) for part, *row in zip(parts, areas, columns, strict=True)]


def mean_visible(areas: Iterable[float]) -> float:
    """The mean of a track's nonzero areas; 0 if there are none."""
    visible = [float(area) for area in areas if area]
    return sum(visible) / len(visible) if visible else 0.0


@dataclass(frozen=True, eq=False)
class ComposedTrack:
    """A track composed of the video's predicted or true masks.

    Attributes:
        category_id: category id of the track.
        score: score of the track.
        masks: (T,) int64, for each frame, which of the video's M mask sequences the mask is taken from.
    """

    category_id: int
    score: float
    masks: IntArray


@dataclass(frozen=True, eq=False)
class FrameComparison:
    """The D predicted and G true mask sequences of a video, and their overlaps in each of its T frames.

    A result file may have several tracks with the same masks, one for each likely class of a query. Here each distinct
    mask sequence occurs once, under its best class. There are M = D + G + 1 sequences, in this order: predicted, true,
    and an empty one.

    Attributes:
        tracks: the tracks of the result file, in file order; each uses a single predicted sequence in all frames.
        scores: (D,) float64, best score of each predicted sequence, descending.
        classes: (D,) int64, category id with that score.
        true_classes: (G,) int64, category ids of the instances, including crowds, in file order.
        is_crowd: (G,) bool, whether the instance is a crowd: a group annotated as one.
        occlusion: (T, G) int64, indices into ``LEVELS``; -1 if there is no label.
        areas: (T, M) int64, in pixels; 0 where there is no mask.
        intersections: (T, M, G) int64, of all sequences with the true ones, in pixels.
    """

    tracks: list[ComposedTrack]
    scores: FloatArray
    classes: IntArray
    true_classes: IntArray
    is_crowd: BoolArray
    occlusion: IntArray
    areas: IntArray
    intersections: IntArray

    @property
    def num_frames(self) -> int:
        """Number of frames, T."""
        return len(self.areas)

    @property
    def num_predicted(self) -> int:
        """Number of predicted mask sequences, D; also the index of the first true one."""
        return len(self.scores)

    @cached_property
    def true_areas(self) -> IntArray:
        """(T, G) int64, areas of the true masks in pixels."""
        return self.areas[:, self.num_predicted : -1]

    @cached_property
    def ious(self) -> FloatArray:
        """(T, M, G) float64, mask IoUs in [0, 1]; 0 where either has no mask."""
        unions = self.areas[:, :, None] + self.true_areas[:, None] - self.intersections
        ious: FloatArray = self.intersections / np.maximum(unions, 1)
        return ious


def distinct_tracks(tracks: Sequence[Track]) -> list[Track]:
    """The best track of each distinct mask sequence, in descending order of score."""
    best: dict[Masks, Track] = {}
    for track in tracks:
        masks = track.counts
        if masks not in best or track.score > best[masks].score:
            best[masks] = track
    return sorted(best.values(), key=lambda track: -track.score)


def compare_frames(video: Video, tracks: Sequence[Track]) -> FrameComparison:
    """Compare all tracks of a video with all its instances in every frame.

    Args:
        video: the video and its instances.
        tracks: predicted tracks with the same number of frames and the same mask size as the video.

    Raises:
        ValueError: a mask is damaged.
    """
    distinct = distinct_tracks(tracks)
    predicted = [track.counts for track in distinct]
    index = {masks: i for i, masks in enumerate(predicted)}
    truth = [instance.segmentations for instance in video.instances]
    areas, intersections = _overlaps([*predicted, *truth, (None,) * video.length], truth, (video.height, video.width))
    labels = [instance.occlusion or (None,) * video.length for instance in video.instances]
    levels = [[-1 if label is None else LEVELS.index(label) for label in row] for row in labels]
    return FrameComparison(
        tracks=[
            ComposedTrack(track.category_id, track.score, np.full(video.length, index[track.counts]))
            for track in tracks
        ],
        scores=np.array([track.score for track in distinct], dtype=np.float64),
        classes=np.array([track.category_id for track in distinct], dtype=np.int64),
        true_classes=np.array([instance.category_id for instance in video.instances], dtype=np.int64),
        is_crowd=np.array([instance.is_crowd for instance in video.instances], dtype=np.bool_),
        occlusion=np.array(levels, dtype=np.int64).reshape(len(levels), video.length).T,
        areas=areas,
        intersections=intersections,
    )


def _overlaps(masks: Sequence[Masks], truth: Sequence[Masks], size: tuple[int, int]) -> tuple[IntArray, IntArray]:
    """(T, M) areas of M compressed mask sequences, and (T, M, G) intersections with the G true ones, in pixels."""
    from pycocotools import mask as coco_mask  # imported here so that training does not load it

    frames = list(zip(*masks, strict=True))
    present = np.array([[mask is not None for mask in frame] for frame in frames]).reshape(len(frames), len(masks))
    areas = np.zeros(present.shape, dtype=np.int64)
    areas[present] = mask_areas([mask for frame in frames for mask in frame if mask is not None], size[0] * size[1])
    if areas.min(initial=0) < 0:  # these would make pycocotools' iou hang
        raise ValueError(f"found damaged masks, expected run lengths that fill masks of {size[0]}x{size[1]} pixels")
    intersections = np.zeros((*areas.shape, len(truth)), dtype=np.int64)
    first = len(masks) - 1 - len(truth)  # index of the first true sequence
    for t, frame in enumerate(frames):
        rows = np.flatnonzero(areas[t])
        columns = rows[rows >= first]
        if len(columns):
            coded = {row: {"size": list(size), "counts": frame[row]} for row in rows}
            ious = coco_mask.iou([*coded.values()], [coded[column] for column in columns], [False] * len(columns))
            sums = areas[t, rows, None] + areas[t, columns]
            intersections[t, rows[:, None], columns - first] = np.rint(ious / (1 + ious) * sums)  # integers, so exact
    return areas, intersections
