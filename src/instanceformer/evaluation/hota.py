"""The counts behind HOTA, IDF1 and identity switches of one sequence: a class in a video.

Luiten et al., "HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking", IJCV 2021; Ristani et al.,
"Performance Measures and a Data Set for Multi-Target, Multi-Camera Tracking", 2016 (IDF1); Bernardin and Stiefelhagen,
"Evaluating Multiple Object Tracking Performance: The CLEAR MOT Metrics", 2008 (switches). What these leave open is as
in TrackEval, with which the tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from instanceformer.evaluation.matching import BoolArray
from instanceformer.evaluation.track_iou import FloatArray

ALPHAS = np.arange(0.05, 0.99, 0.05)
"""The 19 localization thresholds of HOTA."""
_EPSILON = np.finfo(np.float64).eps


@dataclass(frozen=True, eq=False)
class Sequence:
    """G true and D predicted tracks in T frames.

    Attributes:
        similarity: (T, G, D) IoU of their masks, 0 where either has none.
        true_visible: (T, G) where the true tracks have a mask.
        visible: (T, D) where the predicted ones have.
    """

    similarity: FloatArray
    true_visible: BoolArray
    visible: BoolArray

    @property
    def lengths(self) -> tuple[FloatArray, FloatArray]:
        """(G, 1) and (D,) in how many frames each track has a mask."""
        return self.true_visible.sum(axis=0)[:, None].astype(np.float64), self.visible.sum(axis=0).astype(np.float64)


def hota_counts(sequence: Sequence) -> FloatArray:
    """Detections and associations at each of ``ALPHAS``.

    Returns:
        (4, 19): true positives, false negatives, false positives, and the sum over the true positives c of A(c), the
        Jaccard index of the matches of c's two tracks (equations 3 and 15 of the paper).
    """
    similarity, (true_lengths, lengths) = sequence.similarity, sequence.lengths
    unions = similarity.sum(axis=1, keepdims=True) + similarity.sum(axis=2, keepdims=True) - similarity
    potential = np.divide(similarity, unions, out=np.zeros_like(similarity), where=unions > 0).sum(axis=0)
    alignment = potential / np.maximum(1, true_lengths + lengths - potential)
    matches = np.zeros((len(ALPHAS), *alignment.shape))
    for frame in similarity[similarity.any(axis=(1, 2))]:
        rows, columns = linear_sum_assignment(alignment * frame, maximize=True)
        matches[:, rows, columns] += frame[rows, columns] >= ALPHAS[:, None] - _EPSILON
    right = matches.sum(axis=(1, 2))
    association = matches * matches / np.maximum(1, true_lengths + lengths - matches)
    return np.stack([right, true_lengths.sum() - right, lengths.sum() - right, association.sum(axis=(1, 2))])


def hota(counts: FloatArray) -> tuple[float, float, float]:
    """HOTA, DetA and AssA, means over ``ALPHAS``, of the (4, 19) counts, which may be sums over sequences."""
    right, missed, wrong, association = counts
    detection = right / np.maximum(1, right + missed + wrong)
    association = association / np.maximum(1, right)
    return float(np.sqrt(detection * association).mean()), float(detection.mean()), float(association.mean())


def identity_counts(sequence: Sequence) -> tuple[int, int, int]:
    """IDTP, IDFN and IDFP: the frames of the best assignment of predicted to true tracks over the whole sequence."""
    true_lengths, lengths = sequence.lengths
    matches = (sequence.similarity >= 0.5).sum(axis=0)
    right = int(matches[linear_sum_assignment(matches, maximize=True)].sum())
    return right, int(true_lengths.sum()) - right, int(lengths.sum()) - right


def count_switches(sequence: Sequence) -> int:
    """Identity switches: how often a true track is matched to another predicted one than when it was matched last.

    Frames are matched one after the other, with an IoU of at least 0.5; whom the last frame matched stays matched.
    """
    switches = 0
    last, previous = (np.full(sequence.similarity.shape[1], -1) for _ in range(2))
    both = sequence.true_visible.any(axis=1) & sequence.visible.any(axis=1)  # other frames change nothing
    for similarity in sequence.similarity[both]:
        scores = 1000.0 * (np.arange(similarity.shape[1]) == previous[:, None]) + similarity
        scores[similarity < 0.5 - _EPSILON] = 0
        rows, columns = linear_sum_assignment(scores, maximize=True)
        matched = scores[rows, columns] > 0
        rows, columns = rows[matched], columns[matched]
        switches += int(((last[rows] >= 0) & (last[rows] != columns)).sum())
        previous[:] = -1
        last[rows] = previous[rows] = columns
    return switches
