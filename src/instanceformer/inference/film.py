"""Films of result files: a video's ground truth on the left, its predicted tracks on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from instanceformer.data.annotations import Video, VideoDataset
from instanceformer.data.clips import read_frames
from instanceformer.evaluation.results import Track, decode_mask
from instanceformer.inference.instances import FrameInstances
from instanceformer.inference.render import add_title, contact_sheet, draw_instances, readable_scale

SHEET_FRAMES = 6


def select_video(dataset: VideoDataset, video_id: int | None, path: Path) -> Video:
    """The video of that id, or the first."""
    for video in dataset.videos:
        if video_id in (None, video.id):
            return video
    raise ValueError(f"{path}: no video has the id {video_id}, there are {[video.id for video in dataset.videos]}")


def select_tracks(tracks: Sequence[Track], dataset: VideoDataset, video: Video, threshold: float) -> list[Track]:
    """The tracks of a video with scores not below the threshold, best first, after a look whether they fit."""
    chosen = [track for track in tracks if track.video_id == video.id and track.score >= threshold]
    known = {category.id for category in dataset.categories}
    for track in chosen:
        if track.category_id not in known:
            raise ValueError(f"a track of video {video.id} has category {track.category_id}, the annotations do not")
        if len(track.segmentations) != video.length:
            raise ValueError(
                f"a track of video {video.id} has {len(track.segmentations)} frames, the video has {video.length}"
            )
    return sorted(chosen, key=lambda track: -track.score)


def frame_instances(masks: Tensor, labels: list[int], scores: list[float]) -> FrameInstances:
    """Number (n, H, W) bool masks 1 to n and keep those that are not empty."""
    visible = masks.flatten(1).any(dim=1)
    masks = masks[visible]
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return FrameInstances(
        ids=torch.arange(1, len(labels) + 1)[visible],
        labels=torch.tensor(labels, dtype=torch.int64)[visible],
        scores=torch.tensor(scores)[visible],
        boxes=boxes,
        masks=masks,
    )


def track_masks(tracks: Sequence[Track], frame: int, video: Video) -> Tensor:
    """(n, H, W) bool masks of n tracks in one frame."""
    masks = torch.zeros(len(tracks), video.height, video.width, dtype=torch.bool)
    for mask, track in zip(masks, tracks, strict=True):
        rle = track.segmentations[frame]
        if rle is not None:
            mask[:] = torch.from_numpy(decode_mask(rle))
    return masks


def film_results(
    dataset: VideoDataset,
    video: Video,
    tracks: Sequence[Track],
    images: Path,
    output: Path,
    fps: float,
    threshold: float,
) -> list[npt.NDArray[np.uint8]]:
    """Write the film.

    Args:
        dataset: that the video belongs to.
        video: to show.
        tracks: its tracks, see ``select_tracks``; numbered from 1 in this order.
        images: folder that the video's file names are relative to.
        output: an .mp4.
        fps: frames per second.
        threshold: lowest score shown, for the title.

    Returns:
        A few of its frames, spread evenly, for a sheet.
    """
    from instanceformer.video.writing import VideoWriter  # needs FFmpeg, which a training without films does not

    names = [category.name for category in dataset.categories]
    true_labels = [dataset.class_of(instance.category_id) for instance in video.instances]
    labels = [dataset.class_of(track.category_id) for track in tracks]
    scores = [track.score for track in tracks]
    scale = readable_scale(video.height)
    on_sheet = set(np.linspace(0, video.length - 1, min(SHEET_FRAMES, video.length)).round().astype(int).tolist())
    sheet = []
    with VideoWriter(output, fps) as writer:
        for t in range(video.length):
            frame = read_frames(video, images, [t])[0].permute(1, 2, 0).numpy()
            true_masks = video.decode_masks(video.instances, [t])[0].bool()
            truth = frame_instances(true_masks, true_labels, [1.0] * len(true_labels))
            predicted = frame_instances(track_masks(tracks, t, video), labels, scores)
            left = draw_instances(frame, truth, names, scores=False, scale=scale)
            right = draw_instances(frame, predicted, names, scale=scale)
            left = add_title(left, f"video {video.id}, frame {t + 1} of {video.length}: ground truth")
            right = add_title(right, f"predictions, scores from {threshold:g}")
            pair = contact_sheet([left, right], columns=2)
            writer.write(pair)
            if t in on_sheet:
                sheet.append(pair)
    return sheet
