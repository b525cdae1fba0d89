"""The overlap of tracks over all frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from instanceformer.data.runs import decode_runs

FloatArray = npt.NDArray[np.float64]

_BATCH = 2**18  # characters of compressed counts that are decoded at once: enough that calls cost little


@dataclass(frozen=True, eq=False)
class TrackRuns:
    """A track as runs over its video, whose frames are read one after the other, each column by column.

    Attributes:
        bounds: (2n,) the pixels before the beginning and before the end of each of its n runs, ascending; whole
            numbers, float64 as interpolation wants them.
        areas: (F,) its pixels in each frame.
    """

    bounds: FloatArray
    areas: npt.NDArray[np.int64]

    @cached_property
    def filled(self) -> FloatArray:
        """(2n,) how many of the track's own pixels come before each bound."""
        filled = np.zeros_like(self.bounds)
        np.cumsum(self.bounds[1::2] - self.bounds[::2], out=filled[1::2])
        filled[2::2] = filled[1:-1:2]
        return filled


def decode_tracks(tracks: Sequence[Sequence[bytes | None]], pixels: int) -> list[TrackRuns]:
    """Decode the compressed counts of the masks of a video's tracks, many at once.

    Args:
        tracks: of each the masks, one for each frame; None where it is absent.
        pixels: height x width of the video.

    Raises:
        ValueError: a mask is damaged.
    """
    decoded: list[TrackRuns] = []
    batch: list[Sequence[bytes | None]] = []
    size = 0
    for masks in tracks:
        batch.append(masks)
        size += sum(map(len, filter(None, masks)))
        if size > _BATCH:
            decoded += _decode_batch(batch, pixels)
            batch, size = [], 0
    return decoded + _decode_batch(batch, pixels)


def _decode_batch(tracks: Sequence[Sequence[bytes | None]], pixels: int) -> list[TrackRuns]:
    masks = [mask for track in tracks for mask in track if mask is not None]
    if not masks:
        return [TrackRuns(np.zeros(0), np.zeros(len(track), dtype=np.int64)) for track in tracks]
    runs = decode_runs(masks, pixels)
    if runs.areas.min() < 0:
        raise ValueError(f"expected run lengths that fill {pixels} pixels, found damaged ones")
    present = np.array([[mask is not None for mask in track] for track in tracks])
    areas = np.zeros(present.shape, dtype=np.int64)
    areas[present] = runs.areas
    zeros, ones = runs.lengths
    bounds = np.empty((len(ones), 2))
    ends = (zeros + ones).cumsum()  # with the masks one after the other, as if all were frames of one track
    first = np.append(runs.first, len(ones))
    ends += (pixels * (present.nonzero()[1] - np.arange(len(masks)))).repeat(np.diff(first))
    bounds[:, 0], bounds[:, 1] = ends - ones, ends
    parts = np.split(bounds, first[present.sum(axis=1).cumsum()[:-1]])
    return [TrackRuns(part.ravel(), row) for part, row in zip(parts, areas, strict=True)]


def track_ious(predicted: Sequence[TrackRuns], truth: Sequence[TrackRuns]) -> FloatArray:
    """Compare D predicted tracks with G true ones of the same video.

    Returns:
        (D, G): the sum over frames of the intersections divided by that of the unions (Yang et al., "Video Instance
        Segmentation", ICCV 2019, section 3), from whole numbers; two tracks that are empty throughout have 0.
    """
    intersections = np.zeros((len(predicted), len(truth)))
    for g, instance in enumerate(truth):
        for d, track in enumerate(predicted):
            if len(instance.bounds) and len(track.bounds):
                # The instance's pixels before each bound of the track: exact, as between bounds the slope is 0 or 1.
                before = np.interp(track.bounds, instance.bounds, instance.filled)
                intersections[d, g] = (before[1::2] - before[::2]).sum()
    sums = np.array([t.areas.sum() for t in predicted])[:, None] + np.array([t.areas.sum() for t in truth])
    unions = sums - intersections
    ious: FloatArray = np.divide(intersections, unions, out=np.zeros_like(intersections), where=unions > 0)
    return ious


def mean_visible(areas: Sequence[float] | npt.NDArray[np.int64]) -> float:
    """The mean of the areas that are not zero; 0 where all are."""
    visible = [float(area) for area in areas if area]
    return sum(visible) / len(visible) if visible else 0.0
