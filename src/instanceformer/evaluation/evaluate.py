"""Compares a result file with its ground truth, without importing torch, so that it starts quickly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from instanceformer.data.annotations import Video
from instanceformer.data.formats.records import expect_file
from instanceformer.data.formats.run_lengths import compress_masks
from instanceformer.evaluation.ground_truth import GroundTruth, read_ground_truth
from instanceformer.evaluation.identity import VideoIdentity, compare_identity, summarize_identity
from instanceformer.evaluation.overlap import Masks, mean_visible, track_ious
from instanceformer.evaluation.precision_recall import ComparedTrack, VideoEvaluation, summarize
from instanceformer.evaluation.results import Track, iterate_results


def evaluate_files(
    ground_truth: str | Path,
    results: str | Path,
    *,
    long_frames: int | None = None,
    long_videos: Collection[int] | None = None,
    identity: bool = False,
) -> VideoEvaluation:
    """Evaluate a result file against an annotation file.

    Args:
        ground_truth: annotation file in YouTube-VIS format.
        results: result file; it is parsed and compared video by video, so that memory holds little beyond its text.
        long_frames: videos with more frames than this count as long.
        long_videos: ids of the videos that count as long; an alternative to ``long_frames``.
        identity: whether to measure identity as well, which compares every frame.

    Raises:
        FileNotFoundError: either file does not exist.
        ValueError: a file is malformed, the files do not match, or both ``long_frames`` and ``long_videos`` are given.
    """
    expect_file(Path(results), "a results file")  # fail before reading the ground truth
    truth = read_ground_truth(ground_truth)
    compared, identities = compare_files(truth, results, identity=identity)
    evaluation = summarize(truth, compared, truth.videos.keys(), truth.long_videos(long_frames, long_videos))
    if not identity:
        return evaluation
    return replace(evaluation, identity=summarize_identity(truth, identities, truth.videos.keys()))


def compare_files(
    truth: GroundTruth, results: str | Path, *, identity: bool
) -> tuple[dict[int, list[ComparedTrack]], dict[int, VideoIdentity]]:
    """Compare a result file with the ground truth, video by video.

    Args:
        truth: the ground truth.
        results: result file.
        identity: whether to compare every frame as well.

    Returns:
        The compared tracks and, if asked for, what identity metrics need, by video id; of videos with tracks only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, or does not match the ground truth.
    """
    compared: dict[int, list[ComparedTrack]] = defaultdict(list)
    identities: dict[int, VideoIdentity] = {}
    scattered: dict[int, list[Track]] = {}  # tracks of videos whose entries are not consecutive in the file
    entries = ((f"{results}: entry {index}", track) for index, track in enumerate(iterate_results(results)))
    for video_id, group in groupby(entries, key=lambda entry: entry[1].video_id):
        tracks = list(group)
        if video_id in compared:
            scattered[video_id] = []
        compared[video_id] += compare_tracks(truth, video_id, tracks)
        if identity and video_id not in scattered:
            identities[video_id] = compare_identity(truth.videos[video_id], [track for _, track in tracks])
    if identity and scattered:
        for track in iterate_results(results):
            if track.video_id in scattered:
                scattered[track.video_id].append(track)
        identities |= {id_: compare_identity(truth.videos[id_], tracks) for id_, tracks in scattered.items()}
    return compared, identities


def compare_tracks(
    ground_truth: GroundTruth, video_id: int, tracks: Iterable[tuple[str, Track]]
) -> list[ComparedTrack]:
    """Compare tracks of one video with the ground truth.

    Args:
        ground_truth: ground truth that includes the video.
        video_id: the video's id.
        tracks: (name, track) pairs; the name is used in error messages.

    Returns:
        The compared tracks, in the given order.

    Raises:
        ValueError: the video or a category is not in the ground truth, or a track belongs to another video, has a
            different number of frames or mask size, or has a damaged mask.
    """
    tracks = list(tracks)
    if video_id not in ground_truth.videos:
        name = tracks[0][0] if tracks else "update"
        raise ValueError(
            f"{name}: video {video_id} is not in the ground truth; were the files made from the same annotations?"
        )
    video = ground_truth.videos[video_id]
    for name, track in tracks:
        if track.video_id != video_id:
            raise ValueError(f"{name} says that it is of video {track.video_id}")
        if track.category_id not in ground_truth.category_ids:
            raise ValueError(f"{name} has category {track.category_id}, which is not in the ground truth's categories")
        if len(track.segmentations) != video.length:
            raise ValueError(f"{name} has {len(track.segmentations)} frames, expected the video's {video.length}")
    true = [
        (category_id, true_track)
        for category_id in sorted({track.category_id for _, track in tracks})
        for true_track in ground_truth.tracks.get((video_id, category_id), ())
    ]
    predicted_ids = np.array([track.category_id for _, track in tracks], dtype=np.int64)
    true_ids = np.array([category_id for category_id, _ in true], dtype=np.int64)
    comparable = predicted_ids[:, None] == true_ids
    truth = [true_track.segmentations for _, true_track in true]
    size = video.height, video.width
    try:
        areas, ious = track_ious(_counts(tracks, video), truth, size, comparable)
    except ValueError:  # compress_masks says which mask is damaged
        areas, ious = track_ious(_compress(tracks, video), truth, size, comparable)
    return [
        ComparedTrack(track.category_id, track.score, mean_visible(area.tolist()), row[selected].tolist())
        for (_, track), area, row, selected in zip(tracks, areas, ious, comparable, strict=True)
    ]


def _counts(tracks: Sequence[tuple[str, Track]], video: Video) -> list[Masks]:
    """The compressed counts of named tracks as they are in the file; only mask sizes are checked.

    Raises:
        ValueError: a mask does not have the size of the video.
    """
    size = [video.height, video.width]
    if any(rle is not None and rle["size"] != size for _, track in tracks for rle in track.segmentations):
        raise ValueError(f"found masks of another size, expected {size}")
    return [track.counts for _, track in tracks]


def _compress(tracks: Sequence[tuple[str, Track]], video: Video) -> list[Masks]:
    """The compressed counts of named tracks, checked, with None in place of empty masks.

    Raises:
        ValueError: a mask is damaged or does not have the size of the video; the message says where.
    """
    compressed: list[Masks] = []
    for name, track in tracks:
        try:
            compressed.append(compress_masks(track.segmentations, video.height, video.width))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return compressed
