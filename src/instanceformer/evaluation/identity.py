"""How well identities are kept: HOTA, IDF1, switches, what became of instances, and the AP if a part were perfect.

Luiten et al., "HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking", IJCV 2021; Ristani et al.,
"Performance Measures and a Data Set for Multi-Target, Multi-Camera Tracking", 2016 (IDF1); Bernardin and Stiefelhagen,
"Evaluating Multiple Object Tracking Performance: The CLEAR MOT Metrics", 2008 (switches). What these leave open is as
in TrackEval, with which the tests compare.
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
"""The scores 0.05, 0.10, ..., 0.90 that are tried as the lowest of a track that counts."""


@dataclass(frozen=True)
class IdentityMetrics:
    """Identity over all videos; -1 where undefined, without a visible instance.

    Each sequence of masks counts once, under its best class, if its score is high enough: at least the one of
    ``SCORES`` that gives the best HOTA; of equal ones the lowest. HOTA, IDF1 and switches compare tracks of one class,
    and their counts are summed over videos and classes, which TrackEval calls averaging over detections. A mask that
    covers a crowd of its class, with an IoU of at least 0.5, and no instance of it does not count.

    Attributes:
        hota: the mean over IoUs of 0.05 to 0.95 of sqrt(DetA AssA), in [0, 1], as the next four.
        det_a: detection accuracy, the Jaccard index of detections, its mean over the same IoUs.
        ass_a: association accuracy: the Jaccard index of the tracks of a matched pair, its mean over pairs and IoUs.
        idf1: of the best one-to-one assignment of tracks to instances, at an IoU of 0.5.
        hota_score: the lowest score of a track that counts.
        idsw: identity switches, at an IoU of 0.5.
        perfect: by name the AP, of all tracks, if a part were perfect, see ``decomposition``: ``AP_identity``
            (``link``), ``AP_classes`` (``classify``), ``AP_masks`` (``sharpen``), and ``AP_all``, one after the other,
            which leaves instances that no mask covers, tracks of nothing and duplicates, and the order of the scores.
        overall: what became of the instances, by the tracks that count.
        by_occlusion: the same by the label of the frame; levels without any are left out.
        by_age: the same by frames since the instance was found, of those that were.
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
        """All metrics over all pairs, by the names under which they are shown and logged."""
        tracking = {"HOTA": self.hota, "DetA": self.det_a, "AssA": self.ass_a, "IDF1": self.idf1, "IDSW": self.idsw}
        states = {name: getattr(self.overall, name) for name in STATES}
        return {**tracking, "HOTA_score": self.hota_score, **states, **self.perfect}

    @property
    def groups(self) -> dict[str, Decomposition]:
        """All decompositions by name."""
        ages = {f"age {name}": group for name, group in self.by_age.items()}
        return {"all": self.overall, **self.by_occlusion, **ages}

    def as_json(self) -> dict[str, Any]:
        """The object that ``instanceformer evaluate --json`` prints under ``identity``."""
        return {**self.numbers, "decomposition": {name: asdict(group) for name, group in self.groups.items()}}


@dataclass(frozen=True, eq=False)
class TrackSequence:
    """G true and D predicted tracks of one class in the T frames of a video.

    Attributes:
        similarity: (T, G, D) IoU of their masks, 0 where either has none.
        true_present: (T, G) where the true tracks have a mask.
        present: (T, D) where the predicted ones have one.
    """

    similarity: FloatArray
    true_present: BoolArray
    present: BoolArray

    @property
    def lengths(self) -> tuple[FloatArray, FloatArray]:
        """(G, 1) and (D,): in how many frames each track has a mask."""
        return self.true_present.sum(axis=0)[:, None].astype(np.float64), self.present.sum(axis=0).astype(np.float64)


def hota_counts(sequence: TrackSequence) -> FloatArray:
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


def identity_counts(sequence: TrackSequence) -> tuple[int, int, int]:
    """IDTP, IDFN and IDFP: the frames of the best assignment of predicted to true tracks over the whole sequence."""
    true_lengths, lengths = sequence.lengths
    matches = (sequence.similarity >= 0.5).sum(axis=0)
    right = int(matches[linear_sum_assignment(matches, maximize=True)].sum())
    return right, int(true_lengths.sum()) - right, int(lengths.sum()) - right


def count_switches(sequence: TrackSequence) -> int:
    """Identity switches: how often a true track is matched to another predicted one than when it was matched last.

    Frames are matched one after the other, with an IoU of at least 0.5; pairs that the last frame matched stay matched.
    """
    switches = 0
    last, previous = (np.full(sequence.similarity.shape[1], -1) for _ in range(2))
    both = sequence.true_present.any(axis=1) & sequence.present.any(axis=1)  # other frames change nothing
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
    """What the metrics need of a video: counts, first by ``SCORES``, which are summed over videos, and tracks.

    Attributes:
        hota: (18, 4, 19), see ``hota_counts``.
        identity: (18, 4) IDTP, IDFN, IDFP, switches.
        states: (18, GROUPS, 5), see ``count_states``.
        perfect: the tracks of each AP of ``PERFECTIONS``, by its name.
    """

    hota: FloatArray
    identity: IntArray
    states: IntArray
    perfect: dict[str, list[ComparedTrack]]

    @classmethod
    def empty(cls) -> VideoIdentity:
        """Of no video."""
        return cls(
            np.zeros((len(SCORES), 4, len(ALPHAS))),
            np.zeros((len(SCORES), 4), dtype=np.int64),
            np.zeros((len(SCORES), GROUPS, len(STATES)), dtype=np.int64),
            {},
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> VideoIdentity:
        """From its attributes by name, arrays and tracks as lists, as JSON has them: the same to the last bit."""
        return cls(
            np.array(content["hota"], dtype=np.float64),
            np.array(content["identity"], dtype=np.int64),
            np.array(content["states"], dtype=np.int64),
            {name: [ComparedTrack(*track) for track in tracks] for name, tracks in content["perfect"].items()},
        )


def compare_identity(video: Video, tracks: Sequence[Track]) -> VideoIdentity:
    """Compare all tracks of a video, which ``compare_tracks`` has accepted, with its instances.

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
    """(18,) how many of the scores count where each of ``SCORES`` is the lowest that does."""
    counts: IntArray = (scores >= SCORES[:, None]).sum(axis=1)
    return counts


def _of_class(video: FrameComparison, category_id: int) -> tuple[TrackSequence, FloatArray]:
    """The tracks of a class and their scores, without masks that cover a crowd and no instance."""
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
    """Put videos together; those that were not compared have no tracks.

    Args:
        ground_truth: what they were compared with.
        compared: by video id.
        video_ids: of the videos that count.
    """
    videos = {
        id_: compared[id_] if id_ in compared else compare_identity(ground_truth.videos[id_], [])
        for id_ in sorted(video_ids)  # in one order, so that the sums are the same to the last bit
    }
    total = VideoIdentity.empty()
    for video in videos.values():
        for name in ("hota", "identity", "states"):
            getattr(total, name)[:] += getattr(video, name)
    perfect = {
        name: summarize(ground_truth, {id_: video.perfect[name] for id_, video in videos.items()}, video_ids)
        for name in PERFECTIONS
    }
    by_score = [hota(counts) for counts in total.hota]
    best = int(np.argmax([values[0] for values in by_score]))
    right, missed, wrong, switches = total.identity[best].tolist()
    is_defined = right + missed > 0
    groups = [Decomposition.of(counts) for counts in total.states[best]]
    levels, ages = groups[1 : 1 + len(LEVELS)], groups[1 + len(LEVELS) :]
    return IdentityMetrics(
        *(by_score[best] if is_defined else (-1.0, -1.0, -1.0)),
        idf1=right / (right + 0.5 * (missed + wrong)) if is_defined else -1.0,
        hota_score=float(SCORES[best]) if is_defined else -1.0,
        idsw=switches if is_defined else -1,
        perfect={name: evaluation.summary["AP"] for name, evaluation in perfect.items()},
        overall=groups[0],
        by_occlusion={name: group for name, group in zip(LEVELS, levels, strict=True) if group.pairs},
        by_age=dict(zip(AGES, ages, strict=True)),
    )
