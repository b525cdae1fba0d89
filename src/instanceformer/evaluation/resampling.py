"""AP and identity of many resampled sets of videos, for intervals: each run is matched once, then only counted anew.

A resampled set is drawn with replacement (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979). Its metrics
are those of ``summarize`` and ``summarize_identity`` for a dataset in which each video occurs as often as it was drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from instanceformer.evaluation.decomposition import PERFECTIONS, STATES
from instanceformer.evaluation.ground_truth import GroundTruth
from instanceformer.evaluation.identity import VideoIdentity, compare_identity, hota
from instanceformer.evaluation.overlap import FloatArray
from instanceformer.evaluation.precision_recall import (
    IGNORED,
    IOU_THRESHOLDS,
    OCCLUSION,
    OFFICIAL,
    RECALLS,
    RIGHT,
    ComparedTrack,
    Match,
    Metric,
    match_all,
)

TRACKING = ("HOTA", "DetA", "AssA", "IDF1", "IDSW")
RESAMPLED = (*OFFICIAL, *OCCLUSION, *TRACKING, *STATES, *PERFECTIONS)
"""The metrics that can be resampled, by the names under which ``test`` logs them."""


def draw_videos(videos: int, resamples: int, seed: int = 0) -> FloatArray:
    """(1 + R, V) how often each of V videos is in each of R sets of V videos; row 0 has each video once."""
    drawn = np.random.default_rng(seed).multinomial(videos, np.full(videos, 1 / videos), size=resamples)
    return np.concatenate([np.ones((1, videos)), drawn])


def resample(
    ground_truth: GroundTruth,
    compared: Mapping[int, Sequence[ComparedTrack]],
    identities: Mapping[int, VideoIdentity],
    counts: FloatArray,
    names: Collection[str],
) -> dict[str, FloatArray]:
    """Measure sets of videos.

    Args:
        ground_truth: what the tracks were compared with.
        compared: the tracks by video id, see ``compare_tracks``.
        identities: what identity metrics need, by video id; only if a name is one of them.
        counts: (R, V) how often each video is in each set, in ascending order of their ids.
        names: of ``RESAMPLED``.

    Returns:
        (R,) values of each metric; NaN where undefined.
    """
    values = _precision(ground_truth, compared, counts, {n: m for n, m in (OFFICIAL | OCCLUSION).items() if n in names})
    for name in PERFECTIONS:
        if name in names:
            perfect = {id_: video.perfect[name] for id_, video in identities.items()}
            values[name] = _precision(ground_truth, perfect, counts, {"AP": OFFICIAL["AP"]})["AP"]
    if not set(names) <= values.keys():
        values |= _tracking(ground_truth, identities, counts)
    return {name: values[name] for name in names}


def _precision(
    ground_truth: GroundTruth,
    compared: Mapping[int, Sequence[ComparedTrack]],
    counts: FloatArray,
    metrics: Mapping[str, Metric],
) -> dict[str, FloatArray]:
    """(R,) values of each metric, averaged over the categories that have ground truth in the set."""
    column = {video_id: index for index, video_id in enumerate(sorted(ground_truth.videos))}
    by_category: dict[str, list[FloatArray]] = {name: [] for name in metrics}
    if not metrics:
        return {}
    for _, matches in match_all(ground_truth, compared, ground_truth.videos.keys()):
        drawn = counts[:, [column[video_id] for video_id in matches]]
        videos = [*matches.values()]
        recalls = {key: _recall(videos, drawn, *key) for key in {(m.selection, m.max_tracks) for m in metrics.values()}}
        curves = {
            selection: _interpolated(videos, drawn, selection)
            for selection in {m.selection for m in metrics.values() if not m.is_recall}
        }
        for name, metric in metrics.items():
            of_all = recalls[metric.selection, metric.max_tracks] if metric.is_recall else curves[metric.selection]
            chosen = of_all if metric.threshold is None else of_all[:, [metric.threshold]]
            by_category[name].append(chosen.mean(axis=1))
    return {name: _mean_defined(np.stack(values)) for name, values in by_category.items()}


def _mean_defined(values: FloatArray) -> FloatArray:
    """Mean over the first dimension without NaN; NaN where there is nothing else."""
    defined = ~np.isnan(values)
    means = np.full(values.shape[1:], np.nan)
    np.divide(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0), out=means, where=defined.any(axis=0))
    return means


def _num_true(videos: Sequence[Match], drawn: FloatArray, selection: int) -> FloatArray:
    """(R, 1) number of true tracks that count; NaN instead of 0, which makes undefined what is divided by it."""
    total = drawn @ np.array([float(video.num_true[selection]) for video in videos])
    return np.where(total > 0, total, np.nan)[:, None]


def _recall(videos: Sequence[Match], drawn: FloatArray, selection: int, max_tracks: int) -> FloatArray:
    """(R, 10) recall of one category at each of ``IOU_THRESHOLDS``."""
    right = np.stack([(video.outcomes[selection, :, :max_tracks] == RIGHT).sum(axis=1) for video in videos])
    recall: FloatArray = drawn @ right / _num_true(videos, drawn, selection)
    return recall


def _interpolated(videos: Sequence[Match], drawn: FloatArray, selection: int) -> FloatArray:
    """(R, 10) mean over ``RECALLS`` of the interpolated precision of one category, at each of ``IOU_THRESHOLDS``.

    Only right tracks matter: at a wrong one, precision is lower than at the right one before it, at the same recall.
    Each takes the precision there for those of ``RECALLS`` that it is the first to reach. Copies of a video rank
    track by track, which makes a difference only between equal scores.
    """
    scores = np.concatenate([video.scores for video in videos])
    order = np.argsort(-scores, kind="stable")
    is_of = np.repeat(np.eye(len(videos)), [len(video.scores) for video in videos], axis=0)[order]  # (D, V)
    outcomes = np.concatenate([video.outcomes[selection] for video in videos], axis=1)[:, order]
    num_true = _num_true(videos, drawn, selection)
    means = np.zeros((len(drawn), len(IOU_THRESHOLDS)))
    for threshold, outcome in enumerate(outcomes):
        (right,) = np.nonzero(outcome == RIGHT)
        found = drawn @ is_of[right].cumsum(axis=0).T  # (R, K) right tracks up to each of the K right ones
        shown = drawn @ (is_of * (outcome != IGNORED)[:, None]).cumsum(axis=0)[right].T
        precision = np.maximum.accumulate((found / np.maximum(shown, 1))[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, found / num_true, side="right")
        means[:, threshold] = (np.diff(reached, axis=1, prepend=0) * precision).sum(axis=1) / len(RECALLS)
    means[np.isnan(num_true[:, 0])] = np.nan
    return means


def _tracking(
    ground_truth: GroundTruth, identities: Mapping[int, VideoIdentity], counts: FloatArray
) -> dict[str, FloatArray]:
    """(R,) HOTA and what is measured at its best score."""
    videos = [
        identities[id_] if id_ in identities else compare_identity(video, [])
        for id_, video in sorted(ground_truth.videos.items())
    ]
    hotas, identity, states = (
        np.tensordot(counts, np.stack([getattr(video, name) for video in videos]), axes=1)
        for name in ("hota", "identity", "states")
    )
    scores = np.stack(hota(hotas))  # (3, R, 18)
    best = np.arange(len(counts)), scores[0].argmax(axis=1)
    right, missed, wrong, switches = identity[best].T
    idf1 = right / np.maximum(right + 0.5 * (missed + wrong), 1)
    fractions = states[best][:, 0].T / np.maximum(states[best][:, 0].sum(axis=1), 1)
    values = dict(zip((*TRACKING, *STATES), (*scores[:, *best], idf1, switches, *fractions), strict=True))
    return {name: np.where(right + missed > 0, value, np.nan) for name, value in values.items()}
