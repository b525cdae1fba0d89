"""A result file beside its ground truth, without anything of torch: quick to start and light."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path

from instanceformer.data.annotations import Video
from instanceformer.data.run_lengths import compress_masks
from instanceformer.evaluation.ground_truth import GroundTruth, read_ground_truth
from instanceformer.evaluation.matching import MAX_TRACKS
from instanceformer.evaluation.results import Track, iterate_results
from instanceformer.evaluation.summary import Candidates, VideoEvaluation, summarize
from instanceformer.evaluation.track_iou import TrackRuns, decode_tracks, mean_visible, track_ious


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


def evaluate_files(
    ground_truth: str | Path,
    results: str | Path,
    *,
    long_frames: int | None = None,
    long_videos: Collection[int] | None = None,
) -> VideoEvaluation:
    """Evaluate a result file against an annotation file.

    Args:
        ground_truth: annotations in YouTube-VIS format.
        results: a result file; it is read and compared track by track, so that only its text is in memory.
        long_frames: videos with more frames than this are long.
        long_videos: ids of the long videos, instead.

    Raises:
        FileNotFoundError: if either file does not exist.
        ValueError: if either file is not what it should be or they do not fit together; the message names the file.
    """
    truth = read_ground_truth(ground_truth)
    compared: dict[int, list[ComparedTrack]] = defaultdict(list)
    entries = ((f"{results}: entry {index}", track) for index, track in enumerate(iterate_results(results)))
    for video_id, tracks in groupby(entries, key=lambda entry: entry[1].video_id):
        compared[video_id] += compare_tracks(truth, video_id, tracks)
    predictions = {video_id: select_candidates(found) for video_id, found in compared.items()}
    return summarize(truth, predictions, truth.videos.keys(), truth.long_videos(long_frames, long_videos))


def compare_tracks(
    ground_truth: GroundTruth, video_id: int, tracks: Iterable[tuple[str, Track]]
) -> list[ComparedTrack]:
    """Compare tracks of one video, each with a name for messages, with the ground truth.

    Raises:
        ValueError: the ground truth has no such video or category, or a track is of another video, differs from the
            video in its number of frames or mask size, or has a damaged mask.
    """
    tracks = list(tracks)
    if video_id not in ground_truth.videos:
        name = tracks[0][0] if tracks else "update"
        raise ValueError(
            f"{name}: video {video_id} is not in the ground truth; were the files made from the same annotations?"
        )
    video = ground_truth.videos[video_id]
    by_category: dict[int, list[tuple[str, Track]]] = defaultdict(list)
    for name, track in tracks:
        if track.video_id != video_id:
            raise ValueError(f"{name} says that it is of video {track.video_id}")
        if track.category_id not in ground_truth.category_ids:
            raise ValueError(f"{name} has category {track.category_id}, which is not in the ground truth's categories")
        if len(track.segmentations) != video.length:
            raise ValueError(f"{name} has {len(track.segmentations)} frames, expected the video's {video.length}")
        by_category[track.category_id].append((name, track))
    compared = []
    truth = ground_truth.decode(video_id, by_category)
    decoded = iter(_decode(list(chain.from_iterable(by_category.values())), video))
    for category_id, candidates in by_category.items():
        runs = list(islice(decoded, len(candidates)))
        ious = track_ious(runs, truth[category_id]).tolist()
        compared += [
            ComparedTrack(category_id, track.score, mean_visible(of_track.areas.tolist()), row)
            for (_, track), of_track, row in zip(candidates, runs, ious, strict=True)
        ]
    return compared


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


def _decode(tracks: Sequence[tuple[str, Track]], video: Video) -> list[TrackRuns]:
    """The masks of named tracks of a video."""
    size = [video.height, video.width]
    if all(rle is None or rle["size"] == size for _, track in tracks for rle in track.segmentations):
        with suppress(ValueError):  # of a damaged mask, of which compress_masks says where it is
            return decode_tracks(
                [[rle and rle["counts"].encode() for rle in track.segmentations] for _, track in tracks],
                video.height * video.width,
            )
    masks = []
    for name, track in tracks:
        try:
            masks.append(compress_masks(track.segmentations, video.height, video.width))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return decode_tracks(masks, video.height * video.width)
