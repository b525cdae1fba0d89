"""Computes precision, recall and the official metrics from compared tracks, by COCO's rules.

Matching and accumulation follow pycocotools' COCOeval (``evaluateImg`` and ``accumulate``), but handle all thresholds
and all selections of the ground truth at once, and skip whatever has nothing to compare.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from instanceformer.evaluation.ground_truth import GroundTruth, TrueTrack
from instanceformer.evaluation.overlap import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from instanceformer.evaluation.identity import IdentityMetrics

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_TRACKS = 100
"""Maximum number of predicted tracks that count per video and category."""

# The S selections of the ground truth, in this order. Ranges include both ends.
AREA_RANGES = ((0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10))  # all, small, medium, large
OCCLUSION_RANGES = ((0, 0.25), (0.25, 0.5), (0.5, 1))  # slight, moderate, heavy

WRONG, RIGHT, IGNORED = 0, 1, 2
"""Outcomes of a predicted track."""


class ComparedTrack(NamedTuple):
    """A predicted track and its IoUs with the true ones of its video and category.

    Attributes:
        category_id: category id of the track.
        score: score of the track.
        area: mean area in pixels over the frames where it is not zero; decides the size range.
        ious: IoU with each true track, in the order of the ground truth.
    """

    category_id: int
    score: float
    area: float
    ious: list[float]


@dataclass(frozen=True, eq=False)
class Match:
    """How the D predicted tracks of one video and category were matched, in each of S selections.

    Attributes:
        scores: (D,) scores of the predicted tracks, descending.
        num_true: (S,) number of true tracks that count.
        outcomes: (S, 10, D) wrong (0), right (1) or ignored (2), at each of ``IOU_THRESHOLDS``.
    """

    scores: FloatArray
    num_true: IntArray
    outcomes: npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Curves:
    """Precision and recall of one category in one selection.

    Attributes:
        precision: (10, 101) for each of ``IOU_THRESHOLDS`` and ``RECALLS``, the best precision at that recall or more.
        recall: (10,) recall with all predicted tracks, for each of ``IOU_THRESHOLDS``.
    """

    precision: FloatArray
    recall: FloatArray


@dataclass(frozen=True)
class Metric:
    """Defines a metric as a mean of precision or recall.

    Attributes:
        selection: index of the selection of the ground truth.
        threshold: index of the IoU threshold; None averages over all.
        max_tracks: maximum number of tracks that count per video and category.
        is_recall: whether to average recall instead of precision.
    """

    selection: int = 0
    threshold: int | None = None
    max_tracks: int = MAX_TRACKS
    is_recall: bool = False

    def of(self, curves: Curves | None) -> float:
        """The metric for one category; -1 without ground truth."""
        if curves is None:
            return -1.0
        values = curves.recall if self.is_recall else curves.precision
        return float(values.mean() if self.threshold is None else values[self.threshold].mean())


OFFICIAL = {
    "AP": Metric(),
    "AP50": Metric(threshold=0),
    "AP75": Metric(threshold=5),
    "APs": Metric(selection=1),
    "APm": Metric(selection=2),
    "APl": Metric(selection=3),
    "AR1": Metric(is_recall=True, max_tracks=1),
    "AR10": Metric(is_recall=True, max_tracks=10),
    "AR100": Metric(is_recall=True),
    "ARs": Metric(is_recall=True, selection=1),
    "ARm": Metric(is_recall=True, selection=2),
    "ARl": Metric(is_recall=True, selection=3),
}
OCCLUSION = {"APso": Metric(selection=4), "APmo": Metric(selection=5), "APho": Metric(selection=6)}
_LONG = {f"{name}_L": OFFICIAL[name] for name in ("AP", "AP50", "AP75", "AR1", "AR10")}
NAMES = tuple(OFFICIAL)


@dataclass(frozen=True)
class VideoEvaluation:
    """The official metrics as fractions in [0, 1]; -1 where undefined (no ground truth of that size, category, ...).

    Attributes:
        summary: the twelve official metrics by name, averaged over the categories that have ground truth: AP AP50 AP75
            APs APm APl AR1 AR10 AR100 ARs ARm ARl.
        extras: additional metrics by name: APso, APmo and APho, for slightly, moderately and heavily occluded tracks,
            if the ground truth has occlusion labels; AP_L, AP50_L, AP75_L, AR1_L and AR10_L, for the long videos only,
            if these were specified.
        per_category: the twelve official metrics for every category in the ground-truth file, by category id.
        precision: for each category that has ground truth, by id: (10, 101) precision at the IoU thresholds 0.50, 0.55,
            ..., 0.95 and the recalls 0, 0.01, ..., 1.
        identity: identity metrics, or None if they were not measured.
    """

    summary: dict[str, float]
    extras: dict[str, float]
    per_category: dict[int, dict[str, float]]
    precision: dict[int, FloatArray] = field(compare=False, repr=False)
    identity: IdentityMetrics | None = None

    def as_json(self) -> dict[str, Any]:
        """The object that ``instanceformer evaluate --json`` prints."""
        identity = {} if self.identity is None else {"identity": self.identity.as_json()}
        return {**self.summary, **self.extras, "per_category": self.per_category, **identity}


def summarize(
    ground_truth: GroundTruth,
    compared: Mapping[int, Sequence[ComparedTrack]],
    video_ids: Collection[int],
    long_videos: Collection[int] | None = None,
) -> VideoEvaluation:
    """Match the tracks and compute the metrics.

    Args:
        ground_truth: what the tracks were compared with.
        compared: the tracks by video id; equal scores rank in the order given.
        video_ids: ids of the videos to include.
        long_videos: ids of the long videos; None: no metrics for long videos.
    """
    occlusion = OCCLUSION if ground_truth.has_occlusion else {}
    long = {} if long_videos is None else _LONG
    per_category: dict[int, dict[str, float]] = {}
    extras: list[dict[str, float]] = []
    precision: dict[int, FloatArray] = {}
    for category_id, matches in match_all(ground_truth, compared, video_ids):
        every = [*matches.values()]
        of_long = [matched for video_id, matched in matches.items() if video_id in (long_videos or ())]
        per_category[category_id] = _measure(every, OFFICIAL)
        extras.append(_measure(every, occlusion) | _measure(of_long, long))
        curves = accumulate(every)
        if curves is not None:
            precision[category_id] = curves.precision
    undefined = dict.fromkeys(NAMES, -1.0)  # shared by all categories without ground truth, which can be many
    return VideoEvaluation(
        summary=_average(per_category.values(), NAMES),
        extras=_average(extras, [*occlusion, *long]),
        per_category=dict.fromkeys(sorted(ground_truth.category_ids), undefined) | per_category,
        precision=precision,
    )


def match_all(
    ground_truth: GroundTruth, compared: Mapping[int, Sequence[ComparedTrack]], video_ids: Collection[int]
) -> Iterator[tuple[int, dict[int, Match]]]:
    """Match the tracks of each category that has ground truth, by video id; both in ascending order.

    Args:
        ground_truth: what the tracks were compared with.
        compared: the tracks by video id; equal scores rank in the order given.
        video_ids: ids of the videos to include.
    """
    by_category: dict[int, dict[int, list[ComparedTrack]]] = {}  # categories with ground truth, then by video
    for video_id, category_id in ground_truth.tracks:
        if video_id in video_ids:
            by_category.setdefault(category_id, {})[video_id] = []
    for video_id in video_ids:
        for track in compared.get(video_id, ()):
            if track.category_id in by_category:
                by_category[track.category_id].setdefault(video_id, []).append(track)
    for category_id, videos in sorted(by_category.items()):
        yield (
            category_id,
            {
                id_: match(tracks, ground_truth.tracks.get((id_, category_id), ()), ground_truth.has_occlusion)
                for id_, tracks in sorted(videos.items())
            },
        )


def match(tracks: Iterable[ComparedTrack], truth: Sequence[TrueTrack], has_occlusion: bool) -> Match:
    """Match the tracks of one category in one video.

    In order of descending score, each predicted track takes the unmatched true track with the highest IoU at or above
    the threshold. True tracks that count take precedence over ignored ones; of equal IoUs, the last wins. Within a
    selection, crowds and true tracks outside its range are ignored, and so is any predicted track matched to them. An
    unmatched predicted track is ignored if its area is out of range. A crowd can match any number of predicted tracks.

    Args:
        tracks: predicted tracks; equal scores rank in the order given.
        truth: G true tracks.
        has_occlusion: whether to add selections by degree of occlusion to those by area.
    """
    tracks = sorted(tracks, key=lambda track: -track.score)[:MAX_TRACKS]
    ious = np.array([track.ious for track in tracks], dtype=np.float64).reshape(len(tracks), len(truth))
    is_crowd = np.array([track.is_crowd for track in truth], dtype=np.bool_)
    outside = [_is_outside([track.area for track in tracks], *limits) for limits in AREA_RANGES]
    ignored = [_is_outside([track.area for track in truth], *limits) for limits in AREA_RANGES]
    if has_occlusion:
        outside += [np.zeros(len(tracks), dtype=np.bool_)] * len(OCCLUSION_RANGES)
        ignored += [_is_outside([track.occlusion for track in truth], *limits) for limits in OCCLUSION_RANGES]
    outcomes = np.empty((len(ignored), len(IOU_THRESHOLDS), len(tracks)), dtype=np.int8)
    outcomes[:] = np.where(outside, IGNORED, WRONG)[:, None]
    is_ignored = np.stack(ignored) | is_crowd  # (S, G)
    ranks = ious.argsort(axis=1, kind="stable").argsort(axis=1)  # of equal IoUs, the last ranks highest
    preference = np.where(is_ignored, 0, len(truth))
    free = np.ones((*outcomes.shape[:2], len(truth)), dtype=np.bool_)
    for d in np.flatnonzero((ious >= IOU_THRESHOLDS[0]).any(axis=1)):
        fits = free & (ious[d] >= IOU_THRESHOLDS[:, None])
        best = np.where(fits, (preference + ranks[d])[:, None], -1).argmax(axis=2)
        selection, threshold = np.nonzero(fits.any(axis=2))
        taken = best[selection, threshold]
        outcomes[selection, threshold, d] = np.where(is_ignored[selection, taken], IGNORED, RIGHT)
        free[selection, threshold, taken] = is_crowd[taken]
    scores = np.array([track.score for track in tracks], dtype=np.float64)
    return Match(scores, (~is_ignored).sum(axis=1), outcomes)


def accumulate(matches: Sequence[Match], selection: int = 0, max_tracks: int = MAX_TRACKS) -> Curves | None:
    """Precision and recall of one category over videos.

    Args:
        matches: one per video; equal scores in different videos rank in this order.
        selection: index of the selection of the ground truth, in [0, S).
        max_tracks: maximum number of predicted tracks that count per video.

    Returns:
        The curves; None if no true track counts.
    """
    num_true = sum(int(matched.num_true[selection]) for matched in matches)
    if not num_true:
        return None
    order = np.argsort(-np.concatenate([matched.scores[:max_tracks] for matched in matches]), kind="stable")
    outcomes = np.concatenate([matched.outcomes[selection, :, :max_tracks] for matched in matches], axis=1)[:, order]
    right, wrong = (np.cumsum(outcomes == kind, axis=1) for kind in (RIGHT, WRONG))
    recall = right / num_true
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 at recalls that are never reached
    indices = np.stack([np.searchsorted(row, RECALLS) for row in recall])
    return Curves(np.take_along_axis(precision, indices, axis=1), recall.max(axis=1, initial=0.0))


def _is_outside(values: Sequence[float | None], low: float, high: float) -> BoolArray:
    """Whether each value is missing or out of range."""
    numbers = np.array(values, dtype=np.float64)  # None becomes NaN
    return ~((numbers >= low) & (numbers <= high))


def _measure(matches: Sequence[Match], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Compute the metrics for one category."""
    keys = {(metric.selection, metric.max_tracks) for metric in metrics.values()}
    curves = {key: accumulate(matches, *key) for key in keys}
    return {name: metric.of(curves[metric.selection, metric.max_tracks]) for name, metric in metrics.items()}


def _average(categories: Collection[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Average each metric over the categories where it is defined; -1 if there are none."""
    defined = {name: [metrics[name] for metrics in categories if metrics[name] >= 0] for name in names}
    return {name: sum(values) / len(values) if values else -1.0 for name, values in defined.items()}
