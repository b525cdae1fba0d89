"""Videos as streams of consecutive frames, for evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from instanceformer.data.annotations import VideoDataset
from instanceformer.data.augment import normalise, resize
from instanceformer.data.batch import VideoChunk
from instanceformer.data.clips import read_frames
from instanceformer.data.packed import pack

NO_CHUNK = VideoChunk(torch.empty(1, 0, 3, 0, 0), video_id=-1, start=0, length=0, size=(0, 0))
"""What a rank without a video yields: Lightning runs no hook of a loop without batches, and the others would wait."""


class StreamingVideos(IterableDataset[VideoChunk]):
    """One rank's videos, one after the other, each as consecutive chunks of frames from its first to its last.

    Every video goes to one rank, whole. Within a rank the worker processes take the chunks in turn: a DataLoader
    collects from its workers in turn too, so that chunks arrive in order and a video is finished before the next
    begins, however many workers there are. Use it with ``DataLoader(..., batch_size=None)``.

    A rank that gets no video yields one empty chunk, NO_CHUNK.

    Args:
        dataset: the videos; their instances are not looked at.
        images: folder that the videos' file names are relative to.
        chunk_frames: frames of a chunk; the last chunk of a video may have fewer.
        size: shorter side of the frames in pixels after resizing.
        max_size: greatest length of the longer side in pixels.
        skip: ids of videos to leave out.
        rank: this process's number; None: that of torch.distributed, or 0 where it is not in use.
        world_size: number of processes that share the videos; None likewise.

    Raises:
        ValueError: chunk_frames is out of its range; on iteration, a frame is missing, unreadable or not of its video's
            size.
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
        """Number of this rank's chunks."""
        return max(1, len(self.chunks))

    def __iter__(self) -> Iterator[VideoChunk]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if not self.chunks and first == 0:
            yield NO_CHUNK
        for video, start in islice(self.chunks, first, None, step):
            frames = read_frames(video, self.images, range(start, min(start + self.chunk_frames, video.length)))
            yield VideoChunk(
                frames=normalise(resize(frames, self.size, self.max_size))[None],
                video_id=video.id,
                start=start,
                length=video.length,
                size=(video.height, video.width),
            )


def share_of_rank(lengths: Sequence[int], rank: int | None = None, world_size: int | None = None) -> list[int]:
    """Indices of one rank's share of videos, about as many frames as every other's.

    Args:
        lengths: number of frames of each video.
        rank: this process's number; None: that of torch.distributed, or 0 where it is not in use.
        world_size: number of processes; None likewise.
    """
    distributed = dist.is_available() and dist.is_initialized()
    if rank is None:
        rank = dist.get_rank() if distributed else 0
    if world_size is None:
        world_size = dist.get_world_size() if distributed else 1
    return balance(lengths, world_size)[rank]


def balance(loads: Sequence[int], shares: int) -> list[list[int]]:
    """Divide items among shares evenly by load: the largest first, each to the share that has the least.

    Returns:
        For each share the indices of its items in ascending order. Every index is in exactly one share.
    """
    totals = [0] * shares
    members: list[list[int]] = [[] for _ in range(shares)]
    for index in sorted(range(len(loads)), key=lambda index: -loads[index]):
        least = totals.index(min(totals))
        totals[least] += loads[index]
        members[least].append(index)
    return [sorted(share) for share in members]
