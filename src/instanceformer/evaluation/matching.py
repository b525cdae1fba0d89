"""Matching of predicted with true tracks, and the precision and recall that follow: COCO's rules.

These are the rules of pycocotools' COCOeval (``evaluateImg`` and ``accumulate``), worked out for all thresholds and
selections of the ground truth at once and only where there is something to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from instanceformer.evaluation.track_iou import FloatArray

BoolArray = npt.NDArray[np.bool_]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_TRACKS = 100
"""Most predicted tracks of a video and category that count."""

_WRONG, _RIGHT, _IGNORED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Cell:
    """The D predicted and G true tracks of one category in one video, and which of them count in each of S selections.

    Attributes:
        scores: (D,), descending; of equal ones the first ranks first.
        ious: (D, G).
        is_crowd: (G,) true tracks that any number of predicted ones may match.
        ignored: (S, G) true tracks that do not count, crowds always among them; nor does what matches them.
        outside: (S, D) predicted tracks that do not count if they match nothing.
    """

    scores: FloatArray
    ious: FloatArray
    is_crowd: BoolArray
    ignored: BoolArray
    outside: BoolArray


@dataclass(frozen=True, eq=False)
class Match:
    """What became of the tracks of a cell.

    Attributes:
        scores: (D,), those of the cell.
        num_true: (S,) how many true tracks count.
        outcomes: (S, 10, D): of each predicted track, at each of ``IOU_THRESHOLDS``.
    """

    scores: FloatArray
    num_true: npt.NDArray[np.int64]
    outcomes: npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Curves:
    """Precision and recall of one category in one selection.

    Attributes:
        precision: (10, 101) the best precision at each of ``RECALLS`` or more, for each of ``IOU_THRESHOLDS``.
        recall: (10,) of all predicted tracks.
    """

    precision: FloatArray
    recall: FloatArray


def match(cell: Cell) -> Match:
    """Match the tracks of one category in one video.

    By descending score, each predicted track takes the free true track with the highest IoU at or above the threshold:
    one that counts rather than one that is ignored; of equal IoUs the later.
    """
    num_predicted, num_true = cell.ious.shape
    outcomes = np.empty((len(cell.ignored), len(IOU_THRESHOLDS), num_predicted), dtype=np.int8)
    outcomes[:] = np.where(cell.outside, _IGNORED, _WRONG)[:, None]
    ranks = cell.ious.argsort(axis=1, kind="stable").argsort(axis=1)  # of equal IoUs the later has the higher rank
    preference = np.where(cell.ignored, 0, num_true)
    free = np.ones((*outcomes.shape[:2], num_true), dtype=np.bool_)
    for d in np.flatnonzero((cell.ious >= IOU_THRESHOLDS[0]).any(axis=1)):
        fits = free & (cell.ious[d] >= IOU_THRESHOLDS[:, None])
        best = np.where(fits, (preference + ranks[d])[:, None], -1).argmax(axis=2)
        selection, threshold = np.nonzero(fits.any(axis=2))
        taken = best[selection, threshold]
        outcomes[selection, threshold, d] = np.where(cell.ignored[selection, taken], _IGNORED, _RIGHT)
        free[selection, threshold, taken] = cell.is_crowd[taken]
    return Match(cell.scores, (~cell.ignored).sum(axis=1), outcomes)


def accumulate(matches: Sequence[Match], selection: int = 0, max_tracks: int = MAX_TRACKS) -> Curves | None:
    """Precision and recall of one category over videos.

    Args:
        matches: in the order in which equal scores of different videos rank.
        selection: of the ground truth.
        max_tracks: most predicted tracks of a video.

    Returns:
        None where no true track counts.
    """
    num_true = sum(int(found.num_true[selection]) for found in matches)
    if not num_true:
        return None
    order = np.argsort(-np.concatenate([found.scores[:max_tracks] for found in matches]), kind="stable")
    outcomes = np.concatenate([found.outcomes[selection, :, :max_tracks] for found in matches], axis=1)[:, order]
    right, wrong = (np.cumsum(outcomes == kind, axis=1) for kind in (_RIGHT, _WRONG))
    recall = right / num_true
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 at a recall that is never reached
    places = np.stack([np.searchsorted(row, RECALLS) for row in recall])
    return Curves(np.take_along_axis(precision, places, axis=1), recall.max(axis=1, initial=0.0))
