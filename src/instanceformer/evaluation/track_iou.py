"""The overlap of tracks over all frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from instanceformer.data.formats.run_lengths import BATCH, decode_runs

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Masks = Sequence[bytes | None]  # compressed counts, one for each frame; None where a track is absent

FRAMES = 32
"""Frames of a video that are compared at once, which bounds the memory that a long video takes."""


@dataclass(frozen=True, eq=False)
class TrackRuns:
    """A track as runs over F frames, which are read one after the other, each column by column.

    Attributes:
        bounds: (2n,) the pixels before the beginning and before the end of each of its n runs, ascending; whole
            numbers, float64 as interpolation wants them.
        areas: (F,) its pixels in each frame.
        columns: (F, 2) the first and the last column that it touches in each frame, the last before the first where
            it touches none.
    """

    bounds: FloatArray
    areas: IntArray
    columns: IntArray

    @cached_property
    def filled(self) -> FloatArray:
        """(2n,) how many of the track's own pixels come before each bound."""
        filled = np.zeros_like(self.bounds)
        np.cumsum(self.bounds[1::2] - self.bounds[::2], out=filled[1::2])
        filled[2::2] = filled[1:-1:2]
        return filled


def track_ious(
    predicted: Sequence[Masks], truth: Sequence[Masks], size: tuple[int, int], comparable: npt.NDArray[np.bool_]
) -> tuple[IntArray, FloatArray]:
    """Compare D predicted tracks of a video with G true ones.

    Args:
        predicted: D tracks of as many frames.
        truth: G tracks likewise.
        size: (height, width) of the video in pixels.
        comparable: (D, G) which pairs are to be compared.

    Returns:
        (D, frames) areas of the predicted masks in pixels, and (D, G) IoUs: the sum over frames of the intersections
        divided by that of the unions (Yang et al., "Video Instance Segmentation", ICCV 2019, section 3), from whole
        numbers; 0 of two tracks that are empty throughout, and of pairs that are not compared.

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
    """The other's pixels before each bound of the track: exact, as between bounds the slope is 0 or 1."""
    before = np.interp(track.bounds, other.bounds, other.filled)
    return float((before[1::2] - before[::2]).sum())


def decode_tracks(tracks: Sequence[Masks], size: tuple[int, int]) -> list[TrackRuns]:
    """Decode the compressed counts of the masks of a video's tracks, many at once.

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
        raise ValueError(f"expected run lengths that fill {pixels} pixels, found damaged ones")
    areas[present] = runs.areas
    zeros, ones = runs.lengths
    bounds = np.empty((len(ones), 2))
    ends = (zeros + ones).cumsum()  # with the masks one after the other, as if all were frames of one track
    begins = np.append(runs.first, len(ones))
    first, last = begins[:-1], begins[1:] - 1
    last_ones = last - (ones[last] == 0)  # a mask that ends with zeros has an empty run after them
    shown = np.stack([ends[first] - ones[first], ends[np.maximum(first, last_ones)] - 1], axis=1)
    columns[present] = (shown - pixels * np.arange(len(masks))[:, None]) // height
    ends += (pixels * (present.nonzero()[1] - np.arange(len(masks)))).repeat(last + 1 - first)
    bounds[:, 0], bounds[:, 1] = ends - ones, ends
    parts = np.split(bounds, begins[present.sum(axis=1).cumsum()[:-1]])
    return [TrackRuns(part.ravel(), *row) for part, *row in zip(parts, areas, columns, strict=True)]


def mean_visible(areas: Sequence[float] | IntArray) -> float:
    """The mean of the areas that are not zero; 0 where all are."""
    visible = [float(area) for area in areas if area]
    return sum(visible) / len(visible) if visible else 0.0
