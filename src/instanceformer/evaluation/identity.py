"""How well identities are kept: HOTA, IDF1, switches, and the error analysis of ``decomposition``.

Luiten et al., "HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking", IJCV 2021; Ristani et al.,
"Performance Measures and a Data Set for Multi-Target, Multi-Camera Tracking", 2016 (IDF1); Bernardin and Stiefelhagen,
"Evaluating Multiple Object Tracking Performance: The CLEAR MOT Metrics", 2008 (switches). Details that these leave
open are as in TrackEval, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from instanceformer.data.annotations import Video
from instanceformer.evaluation.decomposition import (
    AGES,
    GROUPS,
    PERFECTIONS,
    STATES,
    Decomposition,
    compare_perfect,
    count_states,
)
from instanceformer.evaluation.ground_truth import GroundTruth
from instanceformer.evaluation.overlap import LEVELS, BoolArray, FloatArray, FrameComparison, IntArray, compare_frames
from instanceformer.evaluation.precision_recall import ComparedTrack, summarize
from instanceformer.evaluation.results import Track

ALPHAS = np.arange(0.05, 0.99, 0.05)
"""The 19 localization thresholds of HOTA."""
_EPSILON = np.finfo(np.float64).eps
SCORES = np.arange(1, 19) / 20
"""The score thresholds 0.05, 0.10, ..., 0.90; at each, only tracks with at least this score count."""


@dataclass(frozen=True)
class IdentityMetrics:
    """Identity metrics over all videos; -1 where undefined because no instance is visible.

    Each sequence of masks counts once, under its best class, and only if its score reaches a threshold: the one in
    ``SCORES`` with the best HOTA (the lowest such, if several tie). HOTA, IDF1 and switches compare tracks within a
    class; their counts are summed over videos and classes, which TrackEval calls averaging over detections. A mask that
    covers a crowd of its class with an IoU of at least 0.5, but no instance of its class, does not count.

    Attributes:
        hota: mean of sqrt(DetA AssA) over IoU thresholds from 0.05 to 0.95. This and the next four are in [0, 1].
        det_a: detection accuracy: Jaccard index of the detections, averaged over the same thresholds.
        ass_a: association accuracy: Jaccard index of the tracks of a matched pair, averaged over pairs and thresholds.
        idf1: F1 score of the best one-to-one assignment of tracks to instances, at an IoU of 0.5.
        hota_score: the score threshold.
        idsw: number of identity switches, at an IoU of 0.5.
        perfect: AP of all tracks if one part were perfect, by name: ``AP_identity`` (``decomposition.link``),
            ``AP_classes`` (``classify``), ``AP_masks`` (``sharpen``), and ``AP_all``, all three in turn. What AP_all
            still lacks is due to instances that no mask covers, false tracks, duplicates and the ranking by score.
        overall: what became of the instances, according to the tracks that count.
        by_occlusion: the same by the instance's occlusion label in the frame; levels that do not occur are left out.
        by_age: the same by the number of frames since the instance was found; only instances that were found.
    """

    hota: float
    det_a: float
    ass_a: float
    idf1: float
    hota_score: float
    idsw: int
    perfect: dict[str, float]
    overall: Decomposition
    by_occlusion: dict[str, Decomposition]
    by_age: dict[str, Decomposition]

    @property
    def numbers(self) -> dict[str, float]:
        """All scalar metrics, by the names under which they are shown and logged."""
        tracking = {"HOTA": self.hota, "DetA": self.det_a, "AssA": self.ass_a, "IDF1": self.idf1, "IDSW": self.idsw}
        states = {name: getattr(self.overall, name) for name in STATES}
        return {**tracking, "HOTA_score": self.hota_score, **states, **self.perfect}

    @property
    def groups(self) -> dict[str, Decomposition]:
        """All decompositions, by name."""
        ages = {f"age {name}": group for name, group in self.by_age.items()}
        return {"all": self.overall, **self.by_occlusion, **ages}

    def as_json(self) -> dict[str, Any]:
        """The object that ``instanceformer evaluate --json`` prints under ``identity``."""
        return {**self.numbers, "decomposition": {name: asdict(group) for name, group in self.groups.items()}}


@dataclass(frozen=True, eq=False)
class TrackSequence:
    """G true and D predicted tracks of one class in the T frames of a video.

    Attributes:
        similarity: (T, G, D) mask IoU in [0, 1]; 0 where either track has no mask.
        true_present: (T, G) bool, where the true tracks have a mask.
        present: (T, D) bool, where the predicted tracks have a mask.
    """

    similarity: FloatArray
    true_present: BoolArray
    present: BoolArray

    @property
    def lengths(self) -> tuple[FloatArray, FloatArray]:
        """Number of frames in which each track has a mask: (G, 1) for true and (D,) for predicted tracks."""
        return self.true_present.sum(axis=0)[:, None].astype(np.float64), self.present.sum(axis=0).astype(np.float64)


def hota_counts(sequence: TrackSequence) -> FloatArray:
    """Count detections and associations at each threshold in ``ALPHAS``.

    Returns:
        (4, 19): true positives, false negatives, false positives, and the sum of A(c) over the true positives c, where
        A(c) is the Jaccard index of the matches of c's two tracks (HOTA paper, equations 3 and 15).
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


def hota(counts: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """HOTA, DetA and AssA, averaged over ``ALPHAS``: (...) each, from (..., 4, 19) counts or sums of them."""
    right, missed, wrong, association = np.moveaxis(counts, -2, 0)
    detection = right / np.maximum(1, right + missed + wrong)
    association = association / np.maximum(1, right)
    return np.sqrt(detection * association).mean(axis=-1), detection.mean(axis=-1), association.mean(axis=-1)


def identity_counts(sequence: TrackSequence) -> tuple[int, int, int]:
    """IDTP, IDFN and IDFP, in frames, for the best one-to-one assignment of tracks over the whole sequence."""
    true_lengths, lengths = sequence.lengths
    matches = (sequence.similarity >= 0.5).sum(axis=0)
    right = int(matches[linear_sum_assignment(matches, maximize=True)].sum())
    return right, int(true_lengths.sum()) - right, int(lengths.sum()) - right


def count_switches(sequence: TrackSequence) -> int:
    """Count how often a true track is matched to a different predicted track than the last time it was matched.

    Frames are matched in order, at an IoU of at least 0.5; pairs matched in the previous frame take precedence.
    """
    switches = 0
    last, previous = (np.full(sequence.similarity.shape[1], -1) for _ in range(2))
    both = sequence.true_present.any(axis=1) & sequence.present.any(axis=1)  # frames without both change nothing
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


@dataclass(frozen=True, eq=False)
class VideoIdentity:
    """What the metrics need from a video: counts, to be summed over videos, and tracks.

    The first dimension of the counts is the score threshold, one of ``SCORES``.

    Attributes:
        hota: (18, 4, 19); see ``hota_counts``.
        identity: (18, 4) IDTP, IDFN, IDFP, switches.
        states: (18, GROUPS, 5); see ``count_states``.
        perfect: the compared tracks for each AP in ``PERFECTIONS``, by its name.
    """

    hota: FloatArray
    identity: IntArray
    states: IntArray
    perfect: dict[str, list[ComparedTrack]]

    @classmethod
    def empty(cls) -> VideoIdentity:
        """Zero counts and no tracks."""
        return cls(
            np.zeros((len(SCORES), 4, len(ALPHAS))),
            np.zeros((len(SCORES), 4), dtype=np.int64),
            np.zeros((len(SCORES), GROUPS, len(STATES)), dtype=np.int64),
            {},
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> VideoIdentity:
        """Restore from the attributes as stored in JSON (arrays and tracks as lists); identical to the last bit."""
        return cls(
            np.array(content["hota"], dtype=np.float64),
            np.array(content["identity"], dtype=np.int64),
            np.array(content["states"], dtype=np.int64),
            {name: [ComparedTrack(*track) for track in tracks] for name, tracks in content["perfect"].items()},
        )


def compare_identity(video: Video, tracks: Sequence[Track]) -> VideoIdentity:
    """Compare all tracks of a video with its instances; ``compare_tracks`` must have accepted the tracks.

    Raises:
        ValueError: a mask is damaged.
    """
    compared = compare_frames(video, tracks)
    identity = replace(VideoIdentity.empty(), perfect=compare_perfect(compared))
    counts = _how_many(compared.scores)
    for count in np.unique(counts):
        identity.states[counts == count] = count_states(compared, int(count))
    for category_id in np.unique([*compared.classes, *compared.true_classes[~compared.is_crowd]]):
        sequence, scores = _of_class(compared, int(category_id))
        counts = _how_many(scores)
        for count in np.unique(counts):
            best = TrackSequence(sequence.similarity[..., :count], sequence.true_present, sequence.present[:, :count])
            identity.hota[counts == count] += hota_counts(best)
            identity.identity[counts == count] += (*identity_counts(best), count_switches(best))
    return identity


def _how_many(scores: FloatArray) -> IntArray:
    """(18,) how many of the scores reach each threshold in ``SCORES``."""
    counts: IntArray = (scores >= SCORES[:, None]).sum(axis=1)
    return counts


def _of_class(video: FrameComparison, category_id: int) -> tuple[TrackSequence, FloatArray]:
    """The tracks of a class and their scores, without masks that cover a crowd but no instance."""
    tracks = np.flatnonzero(video.classes == category_id)
    is_instance, is_crowd = ((video.true_classes == category_id) & crowd for crowd in (~video.is_crowd, video.is_crowd))
    ious = video.ious[:, tracks]
    on_instance, on_crowd = (
        ious[..., selected].max(axis=2, initial=0.0) >= 0.5 for selected in (is_instance, is_crowd)
    )
    counts = on_instance | ~on_crowd
    sequence = TrackSequence(
        similarity=np.where(counts[..., None], ious[..., is_instance], 0.0).transpose(0, 2, 1),
        true_present=video.true_areas[:, is_instance] > 0,
        present=(video.areas[:, tracks] > 0) & counts,
    )
    return sequence, video.scores[tracks]


def summarize_identity(
    ground_truth: GroundTruth, compared: Mapping[int, VideoIdentity], video_ids: Collection[int]
) -> IdentityMetrics:
    """Compute the metrics over several videos.

    Args:
        ground_truth: what the videos were compared with.
        compared: the results of ``compare_identity`` by video id; videos that are missing here have no tracks.
        video_ids: ids of the videos to include.
    """
    videos = {
        id_: compared[id_] if id_ in compared else compare_identity(ground_truth.videos[id_], [])
        for id_ in sorted(video_ids)  # in a fixed order, so that sums are reproducible bit by bit
    }
    total = VideoIdentity.empty()
    for video in videos.values():
        for name in ("hota", "identity", "states"):
            getattr(total, name)[:] += getattr(video, name)
    perfect = {
        name: summarize(ground_truth, {id_: video.perfect[name] for id_, video in videos.items()}, video_ids)
        for name in PERFECTIONS
    }
    by_score = np.stack(hota(total.hota))
    best = int(np.argmax(by_score[0]))
    right, missed, wrong, switches = total.identity[best].tolist()
    is_defined = right + missed > 0
    groups = [Decomposition.of(counts) for counts in total.states[best]]
    levels, ages = groups[1 : 1 + len(LEVELS)], groups[1 + len(LEVELS) :]
    hota_, det_a, ass_a = by_score[:, best].tolist() if is_defined else (-1.0, -1.0, -1.0)
    return IdentityMetrics(
        hota_,
        det_a,
        ass_a,
        idf1=right / (right + 0.5 * (missed + wrong)) if is_defined else -1.0,
        hota_score=float(SCORES[best]) if is_defined else -1.0,
        idsw=switches if is_defined else -1,
        perfect={name: evaluation.summary["AP"] for name, evaluation in perfect.items()},
        overall=groups[0],
        by_occlusion={name: group for name, group in zip(LEVELS, levels, strict=True) if group.pairs},
        by_age=dict(zip(AGES, ages, strict=True)),
    )
