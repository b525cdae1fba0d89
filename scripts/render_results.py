"""Film of one video: its ground truth on the left, the predicted tracks of a result file on the right.

    python scripts/render_results.py ANNOTATIONS.json RESULTS.json --images DIR --output film.mp4 --sheet sheet.png

Tracks are numbered in the order of their scores, 1 the most confident; ground truth in the order of its file. The sheet
is a picture of a few frames, spread evenly over the film.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes  # type: ignore[import-untyped]

from instanceformer.data.annotations import Video, VideoDataset, read_youtube_vis
from instanceformer.data.clips import read_frames
from instanceformer.evaluation.results import Track, decode_mask, read_results
from instanceformer.inference.instances import FrameInstances
from instanceformer.inference.render import add_title, contact_sheet, draw_instances, readable_scale
from instanceformer.inference.video_io import VideoWriter

SHEET_FRAMES, SHEET_COLUMNS = 6, 2


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


def render(
    dataset: VideoDataset,
    video: Video,
    tracks: Sequence[Track],
    images: Path,
    output: Path,
    fps: float,
    threshold: float,
) -> list[npt.NDArray[np.uint8]]:
    """Write the film.

    Returns:
        the frames for the sheet.
    """
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Render the film that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="in YouTube-VIS format")
    parser.add_argument("results", type=Path, help="predicted tracks, in the challenge's format")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder that the annotations' file names are relative to"
    )
    parser.add_argument("--output", type=Path, required=True, help="the film, an .mp4")
    parser.add_argument("--video-id", type=int, help="by default the first video of the annotations")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score shown (%(default)s)")
    parser.add_argument("--fps", type=float, default=10, help="frames per second (%(default)s)")
    parser.add_argument("--sheet", type=Path, help="also write a picture of a few frames, a .png")
    options = parser.parse_args(arguments)
    try:
        dataset = read_youtube_vis(options.annotations)
        video = select_video(dataset, options.video_id, options.annotations)
        tracks = select_tracks(read_results(options.results), dataset, video, options.threshold)
        sheet = render(dataset, video, tracks, options.images, options.output, options.fps, options.threshold)
    except (ValueError, OSError) as error:
        sys.exit(f"render_results: {error}")
    if options.sheet is not None:
        Image.fromarray(contact_sheet(sheet, SHEET_COLUMNS)).save(options.sheet)
    print(f"{options.output}: {video.length} frames of video {video.id}, {len(tracks)} tracks")


if __name__ == "__main__":
    main()
