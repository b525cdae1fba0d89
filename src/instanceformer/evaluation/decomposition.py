"""What became of every instance in every frame: followed, or how it was lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from instanceformer.evaluation.frames import LEVELS, FrameComparison
from instanceformer.evaluation.track_iou import FloatArray, IntArray

STATES = ("right", "captured", "lost", "not_found", "wrong_class")
AGES = {"0-3": 0, "4-7": 4, "8-15": 8, "16+": 16}
"""Names of the ages of a track, and the frames since it found its instance at which each begins."""
GROUPS = 1 + len(LEVELS) + len(AGES)
"""Rows of counts: all, then by level of occlusion, then by age."""


@dataclass(frozen=True)
class Decomposition:
    """Fractions of the pairs of an instance and a frame in which it is visible; they sum to 1, or are -1 of no pairs.

    An instance is found in the first frame in which a track that has found no other covers it, with a mask IoU above
    0.5; where there are several, they are matched one to one for the highest sum. From then on this track is its own.

    Attributes:
        right: its track covers it, IoU above 0.5, and has its class.
        captured: its track does not cover it, but another instance.
        lost: its track covers no instance, or has no mask.
        not_found: no track has found it so far.
        wrong_class: its track covers it and has another class.
        pairs: how many there are.
    """

    right: float
    captured: float
    lost: float
    not_found: float
    wrong_class: float
    pairs: int

    @classmethod
    def of(cls, counts: IntArray) -> Decomposition:
        """From the (5,) counts of ``STATES``."""
        total = int(counts.sum())
        fractions = (counts / total).tolist() if total else [-1.0] * len(STATES)
        return cls(**dict(zip(STATES, fractions, strict=True)), pairs=total)


def count_states(video: FrameComparison, tracks: int) -> IntArray:
    """(GROUPS, 5) counts of ``STATES`` in a video, by its first so many tracks; crowds are left out.

    A pair without a label of occlusion is in no level, one whose instance is not found has no age.
    """
    true = np.flatnonzero(~video.is_crowd)
    counts = np.zeros((GROUPS, len(STATES)), dtype=np.int64)
    ious = video.ious[:, :tracks][:, :, true]
    owners, found = _find_owners(ious)
    own = ious[:, owners] if tracks else np.zeros((video.num_frames, len(true), len(true)))  # (T, owner's, instance)
    covers_own = own.diagonal(axis1=1, axis2=2) > 0.5
    covers_any = (own > 0.5).any(axis=2)
    right_class = video.classes[owners] == video.true_classes[true] if tracks else np.zeros(len(true), dtype=np.bool_)
    ages = np.arange(video.num_frames)[:, None] - found
    states = np.select(
        [ages < 0, covers_own & right_class, covers_own, covers_any],
        [STATES.index(name) for name in ("not_found", "right", "wrong_class", "captured")],
        STATES.index("lost"),
    )
    visible = video.true_areas[:, true] > 0
    levels = video.occlusion[:, true]
    age_groups = np.searchsorted([*AGES.values()], ages, side="right") - 1
    groups = [visible, *(levels == level for level in range(len(LEVELS)))]
    groups += [(ages >= 0) & (age_groups == group) for group in range(len(AGES))]
    for row, group in zip(counts, groups, strict=True):
        row += np.bincount(states[visible & group], minlength=len(STATES))
    return counts


def _find_owners(ious: FloatArray) -> tuple[IntArray, IntArray]:
    """From (T, D, G) IoUs, the track that finds each instance, and in which frame; track 0 in frame T if none does."""
    frames, tracks, instances = ious.shape
    owners, found = np.zeros(instances, dtype=np.int64), np.full(instances, frames)
    free = np.ones(tracks, dtype=np.bool_)
    for t, frame in enumerate(np.where(ious > 0.5, ious, 0.0)):
        overlaps = np.where(free[:, None] & (found == frames), frame, 0.0)
        if overlaps.any():
            rows, columns = linear_sum_assignment(overlaps, maximize=True)
            covered = overlaps[rows, columns] > 0
            rows, columns = rows[covered], columns[covered]
            owners[columns], found[columns], free[rows] = rows, t, False
    return owners, found
