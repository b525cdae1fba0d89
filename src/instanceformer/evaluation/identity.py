"""Numbers that show identity: HOTA, IDF1, switches, what became of instances, and the AP if a part were perfect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from instanceformer.data.annotations import Video
from instanceformer.evaluation.decomposition import AGES, GROUPS, STATES, Decomposition, count_states
from instanceformer.evaluation.frames import LEVELS, FrameComparison, compare_frames
from instanceformer.evaluation.ground_truth import GroundTruth
from instanceformer.evaluation.hota import ALPHAS, count_switches, hota, hota_counts, identity_counts
from instanceformer.evaluation.hota import Sequence as TrackSequence
from instanceformer.evaluation.matching import BoolArray
from instanceformer.evaluation.perfect import PERFECTIONS, perfect_candidates
from instanceformer.evaluation.results import Track
from instanceformer.evaluation.summary import Candidates, summarize
from instanceformer.evaluation.track_iou import FloatArray, IntArray

SCORES = np.arange(1, 19) / 20
"""The scores 0.05, 0.10, ..., 0.90 that are tried as the lowest of a track that counts."""


@dataclass(frozen=True)
class IdentityMetrics:
    """Numbers about identity over all videos; -1 where undefined, without a visible instance.

    Each sequence of masks counts once, under its best class, if its score is high enough: of ``SCORES`` the lowest that
    counts is the one with the best HOTA; of equal ones the lowest. HOTA, IDF1 and switches compare tracks of one class,
    and their counts are summed over videos and classes, which TrackEval calls averaging over detections. A mask that
    covers a crowd of its class, with an IoU of at least 0.5, and no instance of it does not count.

    Attributes:
        hota: the mean over IoUs of 0.05 to 0.95 of sqrt(DetA AssA), in [0, 1], as the next four.
        det_a: detection accuracy, the Jaccard index of detections, its mean over the same IoUs.
        ass_a: association accuracy: the Jaccard index of the tracks of a matched pair, its mean over pairs and IoUs.
        idf1: of the best one-to-one assignment of tracks to instances, at an IoU of 0.5.
        hota_score: the lowest score of a track that counts.
        idsw: identity switches, at an IoU of 0.5.
        perfect: by name the AP, of all tracks, if a part were perfect: ``AP_identity``, see ``perfect.link``,
            ``AP_classes``, see ``classify``, ``AP_masks``, see ``sharpen``, and ``AP_all``, one after the other, which
            leaves instances that no mask covers, tracks of nothing and duplicates, and the order of the scores.
        overall: what became of the instances, by the tracks that count.
        by_occlusion: the same by the label of the frame; levels without any are left out.
        by_age: the same by frames since an instance was found, which it was then.
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
        """By the names under which they are shown and logged."""
        found = {"HOTA": self.hota, "DetA": self.det_a, "AssA": self.ass_a, "IDF1": self.idf1, "IDSW": self.idsw}
        states = {name: getattr(self.overall, name) for name in STATES}
        return {**found, "HOTA_score": self.hota_score, **states, **self.perfect}

    @property
    def groups(self) -> dict[str, Decomposition]:
        """All decompositions by name."""
        ages = {f"age {name}": found for name, found in self.by_age.items()}
        return {"all": self.overall, **self.by_occlusion, **ages}

    def as_json(self) -> dict[str, Any]:
        """As ``instanceformer evaluate --json`` prints it."""
        return {**self.numbers, "decomposition": {name: asdict(group) for name, group in self.groups.items()}}


@dataclass(frozen=True, eq=False)
class VideoIdentity:
    """What the numbers need to know of a video; counts, first by ``SCORES``, are summed over videos.

    Attributes:
        hota: (18, 4, 19), see ``hota_counts``.
        identity: (18, 4) IDTP, IDFN, IDFP, switches.
        states: (18, GROUPS, 5), see ``count_states``.
        perfect: the candidates of each AP, by its name and category id.
    """

    hota: FloatArray
    identity: IntArray
    states: IntArray
    perfect: dict[str, dict[int, Candidates]]

    def as_json(self) -> dict[str, Any]:
        """For another process, which has it back, to the last bit, by ``from_json``."""
        perfect = {
            name: {id_: vars(found) for id_, found in candidates.items()} for name, candidates in self.perfect.items()
        }
        arrays = {field.name: getattr(self, field.name).tolist() for field in fields(self) if field.name != "perfect"}
        return {**arrays, "perfect": perfect}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> VideoIdentity:
        """The inverse."""
        perfect = {
            name: {int(id_): Candidates(**found) for id_, found in candidates.items()}
            for name, candidates in content["perfect"].items()
        }
        return cls(
            np.array(content["hota"], dtype=np.float64),
            np.array(content["identity"], dtype=np.int64),
            np.array(content["states"], dtype=np.int64),
            perfect,
        )


def compare_identity(video: Video, tracks: Sequence[Track]) -> VideoIdentity:
    """Compare all tracks of a video, which ``compare_tracks`` has accepted, with its instances.

    Raises:
        ValueError: a mask is damaged.
    """
    compared = compare_frames(video, tracks)
    found = VideoIdentity(
        np.zeros((len(SCORES), 4, len(ALPHAS))),
        np.zeros((len(SCORES), 4), dtype=np.int64),
        np.zeros((len(SCORES), GROUPS, len(STATES)), dtype=np.int64),
        perfect_candidates(compared),
    )
    counts = _how_many(compared.scores)
    for count in np.unique(counts):
        found.states[counts == count] = count_states(compared, int(count))
    for category_id in np.unique([*compared.classes, *compared.true_classes[~compared.is_crowd]]):
        sequence, scores = _of_class(compared, int(category_id))
        counts = _how_many(scores)
        for count in np.unique(counts):
            part = TrackSequence(sequence.similarity[..., :count], sequence.true_visible, sequence.visible[:, :count])
            found.hota[counts == count] += hota_counts(part)
            found.identity[counts == count] += (*identity_counts(part), count_switches(part))
    return found


def _how_many(scores: FloatArray) -> IntArray:
    """(18,) how many of the scores count, if each of ``SCORES`` is the lowest."""
    counts: IntArray = (scores >= SCORES[:, None]).sum(axis=1)
    return counts


def _of_class(video: FrameComparison, category_id: int) -> tuple[TrackSequence, FloatArray]:
    """The tracks of a class and their scores, without masks that cover a crowd and no instance."""
    own = np.flatnonzero(video.classes == category_id)
    is_own = video.true_classes == category_id
    ious = video.ious[:, own]
    instances, crowds = ious[..., is_own & ~video.is_crowd], ious[..., is_own & video.is_crowd]
    on_instance, on_crowd = (ious.max(axis=2, initial=0.0) >= 0.5 for ious in (instances, crowds))
    counts: BoolArray = on_instance | ~on_crowd
    return (
        TrackSequence(
            similarity=np.where(counts[..., None], instances, 0.0).transpose(0, 2, 1),
            true_visible=video.true_areas[:, is_own & ~video.is_crowd] > 0,
            visible=(video.areas[:, own] > 0) & counts,
        ),
        video.scores[own],
    )


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
    perfect = {
        name: summarize(ground_truth, {id_: found.perfect[name] for id_, found in videos.items()}, video_ids)
        for name in PERFECTIONS
    }
    hota_sums = sum((found.hota for found in videos.values()), np.zeros((len(SCORES), 4, len(ALPHAS))))
    identity = sum((found.identity for found in videos.values()), np.zeros((len(SCORES), 4), dtype=np.int64))
    states = sum((found.states for found in videos.values()), np.zeros((len(SCORES), GROUPS, len(STATES)), np.int64))
    best = int(np.argmax([hota(counts)[0] for counts in hota_sums]))
    right, missed, wrong, switches = identity[best].tolist()
    is_defined = right + missed > 0
    groups = [Decomposition.of(counts) for counts in states[best]]
    levels, ages = groups[1 : 1 + len(LEVELS)], groups[1 + len(LEVELS) :]
    of_hota = hota(hota_sums[best]) if is_defined else (-1.0, -1.0, -1.0)
    return IdentityMetrics(
        *of_hota,
        idf1=right / (right + 0.5 * (missed + wrong)) if is_defined else -1.0,
        hota_score=float(SCORES[best]) if is_defined else -1.0,
        idsw=switches if is_defined else -1,
        perfect={name: found.summary["AP"] for name, found in perfect.items()},
        overall=groups[0],
        by_occlusion={name: found for name, found in zip(LEVELS, levels, strict=True) if found.pairs},
        by_age=dict(zip(AGES, ages, strict=True)),
    )
