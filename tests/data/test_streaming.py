from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from instanceformer.data.augment import IMAGE_MEAN, IMAGE_STD
from instanceformer.data.batch import VideoChunk
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.data.streaming import StreamingVideos, balance


def stream_of(tiny: Any, **options: Any) -> StreamingVideos:
    return StreamingVideos(read_annotations(tiny.annotations), tiny.images, **{"size": 24, **options})


def summary(chunks: list[VideoChunk]) -> list[tuple[int, int, int, list[int]]]:
    """Video, start, length, and the frames' numbers as read from the gray level of their corners."""
    rows = []
    for chunk in chunks:
        gray = 255 * (chunk.frames[0, :, 0, 0, 0] * IMAGE_STD[0] + IMAGE_MEAN[0])
        numbers = (gray / 2).round().int() - 20 * (chunk.video_id - 1)
        rows.append((chunk.video_id, chunk.start, chunk.length, numbers.tolist()))
    return rows


EXPECTED = [
    (1, 0, 7, [0, 1, 2]),
    (1, 3, 7, [3, 4, 5]),
    (1, 6, 7, [6]),
    (2, 0, 3, [0, 1, 2]),
    (3, 0, 4, [0, 1, 2]),
    (3, 3, 4, [3]),
]


def test_chunks_cover_each_video_in_order(tiny_dataset: Callable[..., Any]) -> None:
    stream = stream_of(tiny_dataset(lengths=(7, 3, 4)), chunk_frames=3)
    chunks = list(stream)
    assert summary(chunks) == EXPECTED
    assert len(stream) == 6
    assert [chunk.is_last for chunk in chunks] == [False, False, True, True, False, True]
    assert all(chunk.size == (24, 40) for chunk in chunks)
    assert chunks[0].frames.shape == (1, 3, 3, 24, 40)
    assert chunks[0].frames.dtype == torch.float32
    assert summary(list(stream)) == EXPECTED  # a second time


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_order_does_not_depend_on_the_number_of_workers(tiny_dataset: Callable[..., Any], workers: int) -> None:
    stream = stream_of(tiny_dataset(lengths=(7, 3, 4)), chunk_frames=3)
    loader: DataLoader[VideoChunk] = DataLoader(stream, batch_size=None, num_workers=workers)
    assert len(loader) == 6
    assert summary(list(loader)) == EXPECTED


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_whole_videos(tiny_dataset: Callable[..., Any], world_size: int) -> None:
    tiny = tiny_dataset(lengths=(7, 3, 4))
    rows = []
    for rank in range(world_size):
        stream = stream_of(tiny, chunk_frames=3, rank=rank, world_size=world_size)
        chunks = list(stream)
        assert len(stream) == len(chunks) > 0
        assert chunks[0].start == 0
        assert chunks[-1].is_last
        rows.append(summary(chunks))
    assert sorted(row for share in rows for row in share) == EXPECTED
    videos = [{row[0] for row in share} for share in rows]
    assert sum(map(len, videos)) == 3  # no video on two ranks
    if world_size == 2:
        assert videos == [{1}, {2, 3}]


def test_balance_gives_the_largest_first_to_the_least_loaded() -> None:
    assert balance([1, 9, 2, 8, 3], 2) == [[0, 1, 2], [3, 4]]
    assert balance([5, 5], 3) == [[0], [1], []]
    loads = [(7 * i) % 31 + 1 for i in range(60)]
    shares = balance(loads, 4)
    assert sorted(index for share in shares for index in share) == list(range(60))
    totals = [sum(loads[index] for index in share) for share in shares]
    assert max(totals) - min(totals) <= max(loads)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_rank_without_videos_has_one_empty_chunk(tiny_dataset: Callable[..., Any], workers: int) -> None:
    tiny = tiny_dataset(lengths=(6, 4))
    shares = []
    for rank in range(3):
        stream = stream_of(tiny, rank=rank, world_size=3)
        loader: DataLoader[VideoChunk] = DataLoader(stream, batch_size=None, num_workers=workers)
        shares.append(list(loader))
        assert len(loader) == len(shares[-1]) == 1
    assert [chunk.video_id for [chunk] in shares] == [1, 2, -1]
    empty = shares[2][0]
    assert (empty.start, empty.length) == (0, 0)
    assert empty.frames.shape[:2] == (1, 0)


def test_videos_can_be_left_out(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(7, 3, 4))
    assert summary(list(stream_of(tiny, chunk_frames=3, skip=frozenset({1})))) == EXPECTED[3:]
    shares = [
        summary(list(stream_of(tiny, chunk_frames=3, skip=frozenset({1}), rank=rank, world_size=2))) for rank in (0, 1)
    ]
    assert shares == [EXPECTED[4:], EXPECTED[3:4]]  # balanced by what is left
    assert [chunk.length for chunk in stream_of(tiny, skip=frozenset({1, 2, 3}))] == [0]


def test_frames_are_resized_for_the_network_and_the_original_size_is_kept(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    chunk = next(iter(stream_of(tiny, size=12)))
    assert chunk.frames.shape == (1, 6, 3, 12, 20)
    assert chunk.size == (24, 40)
    assert next(iter(stream_of(tiny, size=48, max_size=50))).frames.shape[-2:] == (30, 50)


def test_files_without_annotations_are_streamed(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    del tiny.content["annotations"]
    tiny.write()
    assert len(list(stream_of(tiny, chunk_frames=5))) == 3


def test_frames_of_another_size_than_announced_are_refused(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    tiny.content["videos"][1]["width"] = 41
    del tiny.content["annotations"]
    tiny.write()
    with pytest.raises(ValueError, match=r"v1/00000\.jpg: frame 0 of video 2 is 24x40 .* says 24x41"):
        list(stream_of(tiny))


def test_chunk_frames_out_of_range(tiny_dataset: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="chunk_frames: expected 1 or more, found 0"):
        stream_of(tiny_dataset(), chunk_frames=0)
