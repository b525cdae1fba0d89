"""Videos as streams of consecutive frames, for evaluation and prediction."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from instanceformer.data.annotations import VideoDataset
from instanceformer.data.augment import normalize, resize
from instanceformer.data.batch import VideoChunk
from instanceformer.data.clips import read_frames
from instanceformer.data.packed import pack
from instanceformer.files import natural_order
from instanceformer.video.frames import BrokenVideo, Frame, TimedFrame, find_images
from instanceformer.video.reading import open_video

NO_CHUNK = VideoChunk(torch.empty(1, 0, 3, 0, 0), video_id=-1, start=0, length=0, size=(0, 0))
"""Yielded by a rank without videos: without batches, Lightning would skip its hooks, and other ranks would hang."""


class StreamingVideos(IterableDataset[VideoChunk]):
    """One rank's videos, one after another, each as consecutive chunks of frames.

    Each video is assigned to a single rank. Within a rank, the worker processes take the chunks in turn. A DataLoader
    also collects from its workers in turn, so the chunks arrive in order, and one video ends before the next begins,
    regardless of the number of workers. Use it with ``DataLoader(..., batch_size=None)``.

    A rank that gets no video yields one empty chunk, NO_CHUNK.

    Args:
        dataset: the videos; their instances are not used.
        images: folder that the videos' file names are relative to.
        chunk_frames: number of frames in a chunk; the last chunk of a video may have fewer.
        size: length of the frames' shorter side after resizing, in pixels.
        max_size: maximum length of the longer side in pixels.
        skip: ids of videos to leave out.
        rank: rank of this process; None: from torch.distributed, or 0 if it is not initialized.
        world_size: number of processes that share the videos; None: from torch.distributed, or 1.

    Raises:
        ValueError: ``chunk_frames`` is out of range; or, during iteration, a frame is missing, unreadable, or not the
            size of its video.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        images: Path | str,
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
        self.images = Path(images)
        self.chunk_frames = chunk_frames
        self.size = size
        self.max_size = max_size
        videos = [video for video in pack(dataset.videos).without_instances() if video.id not in skip]
        self.videos = [videos[index] for index in share_of_rank([v.length for v in videos], rank, world_size)]
        self.chunks = [(video, start) for video in self.videos for start in range(0, video.length, chunk_frames)]

    def __len__(self) -> int:
        """Number of chunks this rank yields, NO_CHUNK included."""
        return max(1, len(self.chunks))

    def __iter__(self) -> Iterator[VideoChunk]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if not self.chunks and first == 0:
            yield NO_CHUNK
        for video, start in islice(self.chunks, first, None, step):
            frames = read_frames(video, self.images, range(start, min(start + self.chunk_frames, video.length)))
            yield VideoChunk(
                frames=normalize(resize(frames, self.size, self.max_size))[None],
                video_id=video.id,
                start=start,
                length=video.length,
                size=(video.height, video.width),
            )


def share_of_rank(lengths: Sequence[int], rank: int | None = None, world_size: int | None = None) -> list[int]:
    """Indices of one rank's share of the videos; all ranks get about the same number of frames.

    Args:
        lengths: number of frames of each video.
        rank: rank of this process; None: from torch.distributed, or 0 if it is not initialized.
        world_size: number of processes; None: from torch.distributed, or 1.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if rank is None:
        rank = dist.get_rank() if distributed else 0
    if world_size is None:
        world_size = dist.get_world_size() if distributed else 1
    return balance(lengths, world_size)[rank]


def balance(loads: Sequence[int], shares: int) -> list[list[int]]:
    """Distribute items so that loads are even: largest first, each to the share with the smallest total so far.

    Returns:
        For each share, the indices of its items in ascending order. Every index is in exactly one share.
    """
    totals = [0] * shares
    members: list[list[int]] = [[] for _ in range(shares)]
    for index in sorted(range(len(loads)), key=lambda index: -loads[index]):
        least = totals.index(min(totals))
        totals[least] += loads[index]
        members[least].append(index)
    return [sorted(share) for share in members]


VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".mxf", ".gif"),
)


FILM = "_instances.mp4"
"""What follows a video's name in that of the film that ``segment`` writes beside it."""


@dataclass(frozen=True)
class RawVideo:
    """A video without annotations.

    Attributes:
        id: number in natural order of the names, starting at 1.
        name: name of the file or folder.
        path: path of the file or folder.
        length: number of frames, as declared by the file or estimated; None if unknown.
        problem: why it cannot be read; empty if its first frame can.
    """

    id: int
    name: str
    path: Path
    length: int | None
    problem: str = ""


def find_videos(path: Path) -> list[RawVideo]:
    """Find the videos at a path, see ``find_paths``, and read the first frame of each.

    Raises:
        FileNotFoundError, ValueError: as in ``find_paths``.
    """
    videos = []
    for number, entry in enumerate(find_paths(path), 1):
        length, problem = None, ""
        try:
            video = open_video(entry)
            length = video.length
            next(video.frames)
        except (OSError, ValueError) as error:
            problem = str(error)
        videos.append(RawVideo(number, entry.name, entry, length, problem))
    return videos


def find_paths(path: Path) -> list[Path]:
    """Find the videos at a path: the path itself, or the files and folders in it, in natural order.

    Args:
        path: a video file; a folder of images, which is one video; or a folder of video files and image folders, in
            which other entries are ignored, also the films of ``segment`` beside their videos.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder contains no video, or both images and videos.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video file or folder")
    entries = [path] if path.is_file() or find_images(path) else []
    if path.is_dir():
        inside = [entry for entry in path.iterdir() if _is_video(entry)]
        if entries and inside:
            raise ValueError(
                f"{path}: found images beside {inside[0].name}; expected the frames of one video, or videos"
            )
        films = {film_of(entry) for entry in inside}
        entries += sorted(set(inside) - films, key=lambda entry: natural_order(entry.name))
    if not entries:
        raise ValueError(
            f"{path}: found no video, expected files with names that end in {', '.join(VIDEO_SUFFIXES)}, or folders of "
            "images"
        )
    return entries


def film_of(video: Path) -> Path:
    """The film that ``segment`` writes beside a video file or a folder of images."""
    return video.with_name(f"{video.name if video.is_dir() else video.stem}{FILM}")


def _is_video(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return bool(find_images(path)) if path.is_dir() else path.suffix.lower() in VIDEO_SUFFIXES


class RawStream(IterableDataset[VideoChunk]):
    """One rank's videos without annotations, one after another, each as consecutive chunks of frames.

    Each video is assigned to a single rank. The first worker process reads all of them, since video is decoded
    sequentially; the other workers are idle. Use it with ``DataLoader(..., batch_size=None)``.

    The length of a video is known only at its end: only the last chunk has the true ``length``; in the others it is
    one more than the frames so far, so that ``is_last`` is false. If a video breaks off, the part that could be read
    counts as the whole video, with a warning. A rank that gets no video yields NO_CHUNK.

    Args:
        videos: the videos; see ``find_videos``.
        chunk_frames, size, max_size, skip, rank, world_size: as in ``StreamingVideos``.

    Raises:
        ValueError: ``chunk_frames`` is out of range; or, during iteration, a video cannot be read.
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
                frames=normalize(resize(pixels, self.size, self.max_size))[None],
                video_id=video.id,
                start=start,
                length=start + len(images) + (1 if following else 0),
                size=(pixels.shape[-2], pixels.shape[-1]),
            )
            start, images = start + len(images), following

    def _take(self, frames: Iterator[TimedFrame]) -> list[Frame]:
        """The frames of the next chunk; empty at the end of the video."""
        images: list[Frame] = []
        try:
            images.extend(frame.image for frame in islice(frames, self.chunk_frames))
        except BrokenVideo as error:
            warnings.warn(f"{error}; they are taken for the whole video", stacklevel=2)
        return images
