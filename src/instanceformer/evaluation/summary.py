"""From the IoUs of tracks to the official numbers and those beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from instanceformer.evaluation.ground_truth import GroundTruth, TrueTrack
from instanceformer.evaluation.matching import MAX_TRACKS, Cell, Curves, Match, accumulate, match
from instanceformer.evaluation.track_iou import FloatArray

if TYPE_CHECKING:
    from instanceformer.evaluation.identity import IdentityMetrics

# The selections of the ground truth, one after the other; both ends of a range belong to it.
AREA_RANGES = ((0, 1e10), (0, 128**2), (128**2, 256**2), (256**2, 1e10))  # all, small, medium, large
OCCLUSION_RANGES = ((0, 0.25), (0.25, 0.5), (0.5, 1))  # slight, moderate, heavy


@dataclass(frozen=True)
class VideoEvaluation:
    """The official numbers as fractions; -1 where undefined (no ground truth of that size, category, ...).

    Attributes:
        summary: by name: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl; means over the categories that have
            ground truth.
        extras: what there is beside these: APso, APmo and APho, of what is slightly, moderately and heavily occluded,
            where the ground truth has such labels; AP_L, AP50_L, AP75_L, AR1_L and AR10_L, of the long videos alone,
            where they were asked for.
        per_category: the official twelve for every category of the ground-truth file, by category id.
        precision: by id of the categories that have ground truth, (10, 101): the precision at the IoU thresholds 0.50,
            0.55, ..., 0.95 and the recalls 0, 0.01, ..., 1.
        identity: where it was asked for.
    """

    summary: dict[str, float]
    extras: dict[str, float]
    per_category: dict[int, dict[str, float]]
    precision: dict[int, FloatArray] = field(compare=False, repr=False)
    identity: IdentityMetrics | None = None


@dataclass(frozen=True)
class Candidates:
    """The D predicted tracks of one video and category, by descending score, beside its G true ones.

    Attributes:
        scores: (D,).
        areas: (D,) means over the frames where a track has pixels.
        ious: (D, G).
    """

    scores: list[float]
    areas: list[float]
    ious: list[list[float]]


@dataclass(frozen=True)
class ComparedTrack:
    """A predicted track beside the true ones of its video and category.

    Attributes:
        category_id: of the track.
        score: of the track.
        area: the mean over the frames where it has pixels, which decides its size range.
        ious: with each true track.
    """

    category_id: int
    score: float
    area: float
    ious: list[float]


_NOTHING = Candidates([], [], [])


@dataclass(frozen=True)
class _Number:
    """What a number is the mean of: a selection, the index of a threshold or all of them, the most tracks."""

    selection: int = 0
    threshold: int | None = None
    max_tracks: int = MAX_TRACKS
    is_recall: bool = False

    def of(self, curves: Curves | None) -> float:
        """The number of one category."""
        if curves is None:
            return -1.0
        values = curves.recall if self.is_recall else curves.precision
        return float(values.mean() if self.threshold is None else values[self.threshold].mean())


_OFFICIAL = {
    "AP": _Number(),
    "AP50": _Number(threshold=0),
    "AP75": _Number(threshold=5),
    "APs": _Number(selection=1),
    "APm": _Number(selection=2),
    "APl": _Number(selection=3),
    "AR1": _Number(is_recall=True, max_tracks=1),
    "AR10": _Number(is_recall=True, max_tracks=10),
    "AR100": _Number(is_recall=True),
    "ARs": _Number(is_recall=True, selection=1),
    "ARm": _Number(is_recall=True, selection=2),
    "ARl": _Number(is_recall=True, selection=3),
}
_OCCLUSION = {"APso": _Number(selection=4), "APmo": _Number(selection=5), "APho": _Number(selection=6)}
_LONG = {f"{name}_L": _OFFICIAL[name] for name in ("AP", "AP50", "AP75", "AR1", "AR10")}
NAMES = tuple(_OFFICIAL)


def select_candidates(compared: Iterable[ComparedTrack]) -> dict[int, Candidates]:
    """The most confident tracks of a video, by category id."""
    best: dict[int, list[ComparedTrack]] = defaultdict(list)
    for track in sorted(compared, key=lambda track: -track.score):
        best[track.category_id].append(track)
    return {
        category_id: Candidates(
            scores=[float(track.score) for track in tracks[:MAX_TRACKS]],
            areas=[track.area for track in tracks[:MAX_TRACKS]],
            ious=[track.ious for track in tracks[:MAX_TRACKS]],
        )
        for category_id, tracks in best.items()
    }


def summarize(
    ground_truth: GroundTruth,
    predictions: Mapping[int, Mapping[int, Candidates]],
    video_ids: Collection[int],
    long_videos: Collection[int] | None = None,
) -> VideoEvaluation:
    """Match and count.

    Args:
        ground_truth: what the candidates' IoUs were computed with.
        predictions: by video id and category id.
        video_ids: of the videos that count.
        long_videos: ids of those that count as long; None: nobody asks.
    """
    videos_of: dict[int, set[int]] = defaultdict(set)  # by id of the categories that have ground truth
    for video_id, category_id in ground_truth.tracks:
        if video_id in video_ids:
            videos_of[category_id].add(video_id)
    for video_id in video_ids:
        for category_id in predictions.get(video_id, ()):
            if category_id in videos_of:
                videos_of[category_id].add(video_id)

    per_category: dict[int, dict[str, float]] = {}
    extras: list[dict[str, float]] = []
    precision: dict[int, FloatArray] = {}
    for category_id, ids in sorted(videos_of.items()):
        matches = {
            video_id: match(
                _make_cell(
                    ground_truth.tracks.get((video_id, category_id), []),
                    predictions.get(video_id, {}).get(category_id, _NOTHING),
                    ground_truth.has_occlusion,
                )
            )
            for video_id in sorted(ids)
        }
        per_category[category_id] = _measure(list(matches.values()), _OFFICIAL)
        extra = _measure(list(matches.values()), _OCCLUSION) if ground_truth.has_occlusion else {}
        if long_videos is not None:
            extra |= _measure([found for video_id, found in matches.items() if video_id in long_videos], _LONG)
        extras.append(extra)
        curves = accumulate(list(matches.values()))
        if curves is not None:
            precision[category_id] = curves.precision
    names = [*(_OCCLUSION if ground_truth.has_occlusion else ()), *(() if long_videos is None else _LONG)]
    undefined = dict.fromkeys(NAMES, -1.0)  # one for all categories without ground truth, of which there may be many
    return VideoEvaluation(
        summary=_average(per_category.values(), NAMES),
        extras=_average(extras, names),
        per_category=dict.fromkeys(sorted(ground_truth.category_ids), undefined) | per_category,
        precision=precision,
    )


def _make_cell(truth: Sequence[TrueTrack], candidates: Candidates, has_occlusion: bool) -> Cell:
    is_crowd = np.array([track.is_crowd for track in truth], dtype=np.bool_)
    outside = [_is_outside(np.array(candidates.areas), *limits) for limits in AREA_RANGES]
    ignored = [_is_outside(np.array([track.area for track in truth]), *limits) for limits in AREA_RANGES]
    if has_occlusion:
        degrees = np.array([np.nan if track.occlusion is None else track.occlusion for track in truth])
        ignored += [_is_outside(degrees, *limits) for limits in OCCLUSION_RANGES]
        outside += [np.zeros(len(candidates.areas), dtype=np.bool_)] * len(OCCLUSION_RANGES)
    return Cell(
        scores=np.array(candidates.scores),
        ious=np.array(candidates.ious).reshape(len(candidates.scores), len(truth)),
        is_crowd=is_crowd,
        ignored=np.stack(ignored) | is_crowd,
        outside=np.stack(outside),
    )


def _is_outside(values: FloatArray, low: float, high: float) -> npt.NDArray[np.bool_]:
    return ~((values >= low) & (values <= high))


def _measure(matches: Sequence[Match], numbers: Mapping[str, _Number]) -> dict[str, float]:
    """The numbers of one category."""
    keys = {(number.selection, number.max_tracks) for number in numbers.values()}
    curves = {key: accumulate(matches, *key) for key in keys}
    return {name: number.of(curves[number.selection, number.max_tracks]) for name, number in numbers.items()}


def _average(categories: Collection[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """The means over the categories where a number is defined."""
    defined = {name: [numbers[name] for numbers in categories if numbers[name] >= 0] for name in names}
    return {name: sum(values) / len(values) if values else -1.0 for name, values in defined.items()}
