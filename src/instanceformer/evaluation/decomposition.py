"""Error analysis: what became of every instance, and what the AP would be if identity, classes or masks were perfect.

The latter follows TIDE, which does it for boxes in images (Bolya et al., "TIDE: A General Toolbox for Identifying
Object Detection Errors", ECCV 2020).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from instanceformer.evaluation.overlap import (
    LEVELS,
    BoolArray,
    ComposedTrack,
    FloatArray,
    FrameComparison,
    IntArray,
    mean_visible,
)
from instanceformer.evaluation.precision_recall import ComparedTrack

STATES = ("right", "captured", "lost", "not_found", "wrong_class")
AGES = {"0-3": 0, "4-7": 4, "8-15": 8, "16+": 16}
"""Age groups of a track, each with its minimum age: the number of frames since the track found its instance."""
GROUPS = 1 + len(LEVELS) + len(AGES)
"""Number of rows of counts: one for all pairs, then one per occlusion level, then one per age group."""


@dataclass(frozen=True)
class Decomposition:
    """Fractions of (instance, frame) pairs in each of ``STATES``; only frames in which the instance is visible count.

    The fractions sum to 1, or are all -1 if there are no pairs. A track covers an instance if their mask IoU in the
    frame is above 0.5. An instance is found in the first frame in which a track that has not found another instance
    covers it; if there are several possibilities, tracks and instances are matched one to one for the highest total
    IoU. From then on, this is the instance's track.

    Attributes:
        right: its track covers it and has its class.
        captured: its track covers another instance instead.
        lost: its track covers no instance, or has no mask.
        not_found: no track has found it so far.
        wrong_class: its track covers it but has another class.
        pairs: number of pairs.
    """

    right: float
    captured: float
    lost: float
    not_found: float
    wrong_class: float
    pairs: int

    @classmethod
    def of(cls, counts: IntArray) -> Decomposition:
        """Compute the fractions from (5,) counts of ``STATES``."""
        total = int(counts.sum())
        fractions = (counts / total).tolist() if total else [-1.0] * len(STATES)
        return cls(**dict(zip(STATES, fractions, strict=True)), pairs=total)


@dataclass(frozen=True, eq=False)
class Fates:
    """What became of the G instances of a video, without its crowds, in each of its T frames.

    Attributes:
        instances: (G,) int64, their indices among all instances of the video.
        owners: (G,) int64, the predicted track that found each; 0 where none did.
        first_frames: (G,) int64, the frame in which it did; T where none did.
        states: (T, G) int64, indices into ``STATES``; only frames in which the instance is visible count.
        visible: (T, G) bool, whether the instance is visible.
        covered: (T, G) int64, in [0, G), the instance that its track covers; -1 where it covers none.
    """

    instances: IntArray
    owners: IntArray
    first_frames: IntArray
    states: IntArray
    visible: BoolArray
    covered: IntArray


def find_fates(video: FrameComparison, tracks: int) -> Fates:
    """What became of the instances of a video, according to its first ``tracks`` predicted tracks."""
    true = np.flatnonzero(~video.is_crowd)
    ious = video.ious[:, :tracks][:, :, true]
    owners, first_frames = _find_owners(ious)
    # (T, G, G): IoU of each instance's track with each instance
    owned = ious[:, owners] if tracks else np.zeros((video.num_frames, len(true), len(true)))
    covers_its = owned.diagonal(axis1=1, axis2=2) > 0.5
    covers_any = (owned > 0.5).any(axis=2)
    right_class = video.classes[owners] == video.true_classes[true] if tracks else np.zeros(len(true), dtype=np.bool_)
    found = np.arange(video.num_frames)[:, None] >= first_frames
    states = np.select(
        [~found, covers_its & right_class, covers_its, covers_any],
        [STATES.index(name) for name in ("not_found", "right", "wrong_class", "captured")],
        STATES.index("lost"),
    )
    covered = np.where(found & covers_any, owned.argmax(axis=2), -1) if len(true) else np.zeros(states.shape, np.int64)
    return Fates(true, owners, first_frames, states, video.true_areas[:, true] > 0, covered)


def count_states(video: FrameComparison, tracks: int) -> IntArray:
    """(GROUPS, 5) counts of ``STATES`` in a video, using its first ``tracks`` predicted tracks; crowds are left out.

    A pair without an occlusion label is in no level; a pair whose instance has not been found yet is in no age group.
    """
    fates = find_fates(video, tracks)
    ages = np.arange(video.num_frames)[:, None] - fates.first_frames
    levels = video.occlusion[:, fates.instances]
    age_groups = np.searchsorted([*AGES.values()], ages, side="right") - 1
    groups = [fates.visible, *(levels == level for level in range(len(LEVELS)))]
    groups += [(ages >= 0) & (age_groups == group) for group in range(len(AGES))]
    return np.stack([np.bincount(fates.states[fates.visible & group], minlength=len(STATES)) for group in groups])


def _find_owners(ious: FloatArray) -> tuple[IntArray, IntArray]:
    """Find each instance's track and the frame where it is found from (T, D, G) IoUs; track 0 and frame T if never."""
    frames, tracks, instances = ious.shape
    owners, first_frames = np.zeros(instances, dtype=np.int64), np.full(instances, frames)
    free = np.ones(tracks, dtype=np.bool_)
    for t, frame in enumerate(np.where(ious > 0.5, ious, 0.0)):
        overlaps = np.where(free[:, None] & (first_frames == frames), frame, 0.0)
        if overlaps.any():
            rows, columns = linear_sum_assignment(overlaps, maximize=True)
            covered = overlaps[rows, columns] > 0
            rows, columns = rows[covered], columns[covered]
            owners[columns], first_frames[columns], free[rows] = rows, t, False
    return owners, first_frames


Tracks = Sequence[ComposedTrack]


def link(video: FrameComparison, tracks: Tracks) -> Tracks:
    """Perfect identity: make one track per instance from the predicted mask with the highest IoU in each frame.

    The IoU must be above 0.3, else the track has no mask in the frame. Masks of any score are used, which makes this an
    upper bound on what better linking can reach. The class is the one with the highest sum of scores over the tracks
    that the masks come from, and the score is the mean of their scores; a track counts once for each frame it
    contributes. Tracks that contribute to no instance are kept.
    """
    if not tracks:
        return tracks
    linked: list[ComposedTrack] = []
    used: set[int] = set()
    for ious in video.ious[:, : video.num_predicted, ~video.is_crowd].transpose(2, 0, 1):
        best, covers = ious.argmax(axis=1), ious.max(axis=1) > 0.3
        chosen = best[covers]
        if len(chosen):
            scores: dict[int, float] = defaultdict(float)
            for index in chosen:
                scores[int(video.classes[index])] += float(video.scores[index])
            mean = float(video.scores[chosen].mean())
            masks = np.where(covers, best, video.areas.shape[1] - 1)
            linked.append(ComposedTrack(max(scores, key=scores.__getitem__), mean, masks))
            used.update(chosen.tolist())
    return [*linked, *(track for track in tracks if track.masks[0] not in used)]


def classify(video: FrameComparison, tracks: Tracks) -> Tracks:
    """Perfect classes: give each sequence of masks the class of the instance with the highest IoU over all frames.

    Each sequence counts once, with its best score. A sequence that overlaps no instance keeps its class.
    """
    best: dict[bytes, ComposedTrack] = {}
    for track in sorted(tracks, key=lambda track: -track.score):
        best.setdefault(track.masks.tobytes(), track)
    unique = [*best.values()]
    ious = np.where(video.is_crowd, 0.0, _measure(video, unique)[1])
    return [
        replace(track, category_id=int(video.true_classes[row.argmax()])) if row.any() else track
        for track, row in zip(unique, ious, strict=True)
    ]


def sharpen(video: FrameComparison, tracks: Tracks) -> Tracks:
    """Perfect masks: replace each mask that has an IoU above 0.5 with an instance by the instance's mask."""
    if not len(video.true_classes):
        return tracks
    ious = np.where(video.is_crowd, 0.0, video.ious)  # (T, M, G)
    sharp = np.where(ious.max(axis=2) > 0.5, video.num_predicted + ious.argmax(axis=2), np.arange(ious.shape[1]))
    frames = np.arange(video.num_frames)
    return [replace(track, masks=sharp[frames, track.masks]) for track in tracks]


PERFECTIONS: dict[str, tuple[Callable[[FrameComparison, Tracks], Tracks], ...]] = {
    "AP_identity": (link,),
    "AP_classes": (classify,),
    "AP_masks": (sharpen,),
    "AP_all": (link, classify, sharpen),
}
"""For each AP, what is made perfect, in this order."""


def compare_perfect(video: FrameComparison) -> dict[str, list[ComparedTrack]]:
    """The compared tracks for each AP in ``PERFECTIONS``, by its name."""
    compared = {}
    for name, fixes in PERFECTIONS.items():
        tracks: Tracks = video.tracks
        for fix in fixes:
            tracks = fix(video, tracks)
        compared[name] = compare_composed(video, tracks)
    return compared


def compare_composed(video: FrameComparison, tracks: Tracks) -> list[ComparedTrack]:
    """Compare composed tracks with the true tracks of their classes, as ``compare_tracks`` does for those of a file."""
    areas, ious = _measure(video, tracks)
    return [
        ComparedTrack(
            track.category_id, track.score, mean_visible(area), row[video.true_classes == track.category_id].tolist()
        )
        for track, area, row in zip(tracks, areas, ious, strict=True)
    ]


def _measure(video: FrameComparison, tracks: Tracks) -> tuple[IntArray, FloatArray]:
    """(K, T) areas of K tracks in pixels, and their (K, G) IoUs with the instances over all frames."""
    masks = np.array([track.masks for track in tracks], dtype=np.int64).reshape(len(tracks), video.num_frames)
    frames = np.arange(video.num_frames)
    areas = video.areas[frames, masks]
    intersections = video.intersections[frames, masks].sum(axis=1)
    unions = areas.sum(axis=1)[:, None] + video.true_areas.sum(axis=0) - intersections
    return areas, intersections / np.maximum(unions, 1)
