"""The AP that there would be if identity, classes or masks were perfect, as TIDE asks it of boxes in images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from instanceformer.evaluation.frames import FrameComparison
from instanceformer.evaluation.summary import Candidates, ComparedTrack, select_candidates
from instanceformer.evaluation.track_iou import FloatArray, IntArray, mean_visible


@dataclass(frozen=True, eq=False)
class ComposedTrack:
    """A track made of masks of the video, predicted or true.

    Attributes:
        category_id: its class.
        score: of the class.
        masks: (T,) for each frame the place, among the M sequences of masks of the video, of the one it has there.
    """

    category_id: int
    score: float
    masks: IntArray


Tracks = Sequence[ComposedTrack]


def perfect_candidates(video: FrameComparison) -> dict[str, dict[int, Candidates]]:
    """What would be compared in a video, by the name of the AP and category id."""
    tracks = [ComposedTrack(e.category_id, e.score, np.full(video.num_frames, e.mask)) for e in video.entries]
    return {
        name: select_candidates(_compare(video, _apply(fixes, video, tracks))) for name, fixes in PERFECTIONS.items()
    }


def link(video: FrameComparison, tracks: Tracks) -> Tracks:
    """Perfect identity: an instance's track has, in each frame, the predicted mask that covers it best.

    It needs an IoU above 0.3. Masks of any score are taken, so that this is what linking could reach at best. Its class
    is the one with the highest sum of scores of the tracks that were used, its score the mean of theirs, each as often
    as it was used. Tracks that were used nowhere stay.
    """
    linked, used = [], set()
    if video.num_predicted:
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
    """Perfect classes: a sequence of masks has the class of the instance with which its IoU over all frames is highest.

    It counts once, with its best score. What overlaps with no instance keeps its class.
    """
    best: dict[bytes, ComposedTrack] = {}
    for track in sorted(tracks, key=lambda track: -track.score):
        best.setdefault(track.masks.tobytes(), track)
    unique = [*best.values()]
    ious = np.where(video.is_crowd, 0.0, _track_ious(video, unique))
    return [
        replace(track, category_id=int(video.true_classes[row.argmax()])) if row.any() else track
        for track, row in zip(unique, ious, strict=True)
    ]


def sharpen(video: FrameComparison, tracks: Tracks) -> Tracks:
    """Perfect masks: one that covers an instance, with an IoU above 0.5, is the instance's true one."""
    if not len(video.true_classes):
        return tracks
    ious = np.where(video.is_crowd, 0.0, video.ious)  # (T, M, G)
    sharp = np.where(ious.max(axis=2) > 0.5, video.num_predicted + ious.argmax(axis=2), np.arange(ious.shape[1]))
    frames = np.arange(video.num_frames)
    return [replace(track, masks=sharp[frames, track.masks]) for track in tracks]


_Fix = Callable[[FrameComparison, Tracks], Tracks]
PERFECTIONS: dict[str, tuple[_Fix, ...]] = {
    "AP_identity": (link,),
    "AP_classes": (classify,),
    "AP_masks": (sharpen,),
    "AP_all": (link, classify, sharpen),
}


def _apply(fixes: Iterable[_Fix], video: FrameComparison, tracks: Tracks) -> Tracks:
    for fix in fixes:
        tracks = fix(video, tracks)
    return tracks


def _areas(video: FrameComparison, tracks: Tracks) -> IntArray:
    """(K, T) of K tracks, in pixels."""
    masks = np.array([track.masks for track in tracks], dtype=np.int64).reshape(len(tracks), video.num_frames)
    return video.areas[np.arange(video.num_frames), masks]


def _track_ious(video: FrameComparison, tracks: Tracks) -> FloatArray:
    """(K, G) over all frames, of K tracks with the instances."""
    masks = np.array([track.masks for track in tracks], dtype=np.int64).reshape(len(tracks), video.num_frames)
    intersections = video.intersections[np.arange(video.num_frames), masks].sum(axis=1)
    unions = _areas(video, tracks).sum(axis=1)[:, None] + video.true_areas.sum(axis=0) - intersections
    ious: FloatArray = intersections / np.maximum(unions, 1)
    return ious


def _compare(video: FrameComparison, tracks: Tracks) -> list[ComparedTrack]:
    areas, ious = _areas(video, tracks), _track_ious(video, tracks)
    return [
        ComparedTrack(
            track.category_id, track.score, mean_visible(area), row[video.true_classes == track.category_id].tolist()
        )
        for track, area, row in zip(tracks, areas, ious, strict=True)
    ]
