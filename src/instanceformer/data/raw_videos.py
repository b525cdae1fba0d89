"""Videos without an annotation file, as streams of consecutive frames, for prediction."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from instanceformer.data.augment import normalise, resize
from instanceformer.data.batch import VideoChunk
from instanceformer.data.streaming import NO_CHUNK, share_of_rank
from instanceformer.files import natural_order
from instanceformer.video.frames import BrokenVideo, Frame, TimedFrame, find_images
from instanceformer.video.reading import open_video

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".mxf", ".gif"),
)


@dataclass(frozen=True)
class RawVideo:
    """A video of which nothing is known but its frames.

    Attributes:
        id: counted from 1, in the order of names with numbers as numbers.
        name: of its file or folder.
        path: of that.
        length: number of frames that it declares, or that is likely; None where it says nothing.
    """

    id: int
    name: str
    path: Path
    length: int | None


def find_videos(path: Path) -> list[RawVideo]:
    """The videos that a path stands for: itself, or the files and folders in it.

    Args:
        path: a video file; a folder of images, which is one video; or a folder of video files and folders of images,
            in which other things are passed over.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file is no video, or a folder holds none, or images beside videos.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video file or folder")
    found = [path] if path.is_file() or find_images(path) else []
    if path.is_dir():
        inside = [entry for entry in path.iterdir() if _is_video(entry)]
        if found and inside:
            raise ValueError(
                f"{path}: found images beside {inside[0].name}; expected the frames of one video, or videos"
            )
        found += sorted(inside, key=lambda entry: natural_order(entry.name))
    if not found:
        raise ValueError(
            f"{path}: found no video, expected files with names that end in {', '.join(VIDEO_SUFFIXES)}, or folders of "
            "images"
        )
    return [
        RawVideo(number, entry.name, entry, len(find_images(entry)) if entry.is_dir() else open_video(entry).length)
        for number, entry in enumerate(found, 1)
    ]


def _is_video(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return bool(find_images(path)) if path.is_dir() else path.suffix.lower() in VIDEO_SUFFIXES


class RawStream(IterableDataset[VideoChunk]):
    """One rank's videos, one after the other, each as consecutive chunks of frames from its first to its last.

    Every video goes to one rank, whole, and is read by the first worker process, since a film is decoded in one go;
    more than one worker have nothing to do. Use it with ``DataLoader(..., batch_size=None)``.

    How long a video is shows at its end: its last chunk has its length, the others one that lies beyond them. Of a
    video that breaks off, the part that could be read is all there is, and a warning says so. A rank that gets no video
    yields NO_CHUNK.

    Args:
        videos: see ``find_videos``.
        chunk_frames: frames of a chunk; the last chunk of a video may have fewer.
        size: shorter side of the frames in pixels after resizing.
        max_size: greatest length of the longer side in pixels.
        skip: ids of videos to leave out.
        rank: this process's number; None: that of torch.distributed, or 0 where it is not in use.
        world_size: number of processes that share the videos; None likewise.

    Raises:
        ValueError: chunk_frames is out of its range; on iteration, a video cannot be read.
    """

    def __init__(
        self,
        videos: Sequence[RawVideo],
        *,
        chunk_frames: int = 6,
        size: int = 360,
        max_size: int = 768,
        skip: frozenset[int] = frozenset(),
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames: expected 1 or more, found {chunk_frames}")
        self.chunk_frames, self.size, self.max_size = chunk_frames, size, max_size
        videos = [video for video in videos if video.id not in skip]
        self.videos = [videos[index] for index in share_of_rank([v.length or 1 for v in videos], rank, world_size)]

    def __iter__(self) -> Iterator[VideoChunk]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        if not self.videos:
            yield NO_CHUNK
        for video in self.videos:
            yield from self._chunks(video)

    def _chunks(self, video: RawVideo) -> Iterator[VideoChunk]:
        frames = open_video(video.path).frames
        start, images = 0, self._take(frames)
        while images:
            following = self._take(frames)
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            yield VideoChunk(
                frames=normalise(resize(pixels, self.size, self.max_size))[None],
                video_id=video.id,
                start=start,
                length=start + len(images) + (1 if following else 0),
                size=(pixels.shape[-2], pixels.shape[-1]),
            )
            start, images = start + len(images), following

    def _take(self, frames: Iterator[TimedFrame]) -> list[Frame]:
        """The frames of the next chunk, none after the end."""
        images: list[Frame] = []
        try:
            images.extend(frame.image for frame in islice(frames, self.chunk_frames))
        except BrokenVideo as error:
            warnings.warn(f"{error}; they are taken for the whole video", stacklevel=2)
        return images
