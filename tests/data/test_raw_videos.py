"""Videos without annotations as streams for prediction."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.inference.films import cut, moving_square, write_film
from torch.utils.data import DataLoader

from instanceformer.data.augment import normalize, resize
from instanceformer.data.batch import VideoChunk
from instanceformer.data.streaming import RawStream, RawVideo, find_videos
from instanceformer.video.reading import open_video


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two films and a folder of images, of 7, 3 and 6 frames, beside other things."""
    folder = tmp_path / "videos"
    images = folder / "b10"
    images.mkdir(parents=True)
    for t, frame in enumerate(moving_square(6)):
        Image.fromarray(frame).save(images / f"{t}.png")
    write_film(folder / "b2.mp4", moving_square(7))
    write_film(folder / "c.MKV", moving_square(3, 64, 96), "ffv1", "yuv444p")
    (folder / "notes.txt").write_text("no video")
    (folder / ".b3.mp4").write_text("hidden")
    (folder / "empty").mkdir()
    return folder


def summary(chunks: list[VideoChunk]) -> list[tuple[int, int, int, bool]]:
    """(video, start, frames, whether it is the last) of each chunk."""
    return [(chunk.video_id, chunk.start, chunk.frames.shape[1], chunk.is_last) for chunk in chunks]


WHOLE = [(1, 0, 3, False), (1, 3, 3, False), (1, 6, 1, True), (2, 0, 3, False), (2, 3, 3, True), (3, 0, 3, True)]


def test_films_and_folders_of_images_are_found_in_the_order_of_their_numbers(videos: Path) -> None:
    found = find_videos(videos)
    assert [(video.id, video.name, video.length) for video in found] == [
        (1, "b2.mp4", 7),
        (2, "b10", 6),
        (3, "c.MKV", 3),
    ]
    assert [video.path for video in found] == [videos / "b2.mp4", videos / "b10", videos / "c.MKV"]


def test_a_file_and_a_folder_of_images_are_one_video(videos: Path) -> None:
    assert find_videos(videos / "b2.mp4") == [RawVideo(1, "b2.mp4", videos / "b2.mp4", 7)]
    assert find_videos(videos / "b10") == [RawVideo(1, "b10", videos / "b10", 6)]


def test_what_is_no_video_is_refused_before_anything_is_read(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such video file or folder"):
        find_videos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"empty: found no video, expected files with names that end in \.mp4"):
        find_videos(videos / "empty")
    (videos / "b2.mp4").rename(videos / "0.png")
    with pytest.raises(ValueError, match=r"videos: found images beside .*; expected the frames of one video, or"):
        find_videos(videos)


def test_videos_that_cannot_be_read_are_told_from_the_others_which_keep_their_numbers(videos: Path) -> None:
    (videos / "a.mp4").write_text("no video")
    cut(write_film(videos / "b3.mp4", moving_square(6)), 0.7)
    (videos / "b10" / "0.png").write_bytes((videos / "b10" / "0.png").read_bytes()[:60])
    found = find_videos(videos)
    assert [(video.id, video.name) for video in found if not video.problem] == [(2, "b2.mp4"), (5, "c.MKV")]
    said = {video.name: video.problem for video in found if video.problem}
    assert "a.mp4: cannot be opened as a video" in said["a.mp4"]
    assert "b3.mp4: no frame can be decoded" in said["b3.mp4"]
    assert "0.png: cannot be read as an image" in said["b10"]


def test_chunks_cover_each_video_in_order_and_its_last_has_its_length(videos: Path) -> None:
    chunks = list(RawStream(find_videos(videos), chunk_frames=3))
    assert summary(chunks) == WHOLE
    assert {chunk.video_id: chunk.length for chunk in chunks if chunk.is_last} == {1: 7, 2: 6, 3: 3}
    assert {chunk.video_id: chunk.size for chunk in chunks} == {1: (48, 64), 2: (48, 64), 3: (64, 96)}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_does_not_depend_on_the_number_of_workers(videos: Path, workers: int) -> None:
    """Nor on whether this process has read films before."""
    stream = RawStream(find_videos(videos), chunk_frames=3, size=32)
    list(stream)
    loader: DataLoader[VideoChunk] = DataLoader(stream, batch_size=None, num_workers=workers, timeout=workers and 60)
    assert summary(list(loader)) == WHOLE


def test_frames_are_resized_and_normalized_for_the_network(videos: Path) -> None:
    (chunk,) = RawStream(find_videos(videos / "c.MKV"), size=32, max_size=40)
    frames = np.stack([frame.image for frame in open_video(videos / "c.MKV").frames])
    expected = normalize(resize(torch.from_numpy(frames).permute(0, 3, 1, 2), 32, 40))[None]
    assert chunk.frames.shape[-1] == 40
    torch.testing.assert_close(chunk.frames, expected, atol=0, rtol=0)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_whole_videos_but_those_that_are_left_out(videos: Path, world_size: int) -> None:
    found = find_videos(videos)
    shares = [
        list(RawStream(found, skip=frozenset({2}), rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    ids = [{chunk.video_id for chunk in share} for share in shares]
    assert sorted(number for share in ids for number in share if number > 0) == [1, 3]
    assert all(share[0].length == 0 for share, numbers in zip(shares, ids, strict=True) if numbers == {-1})
    assert sum(numbers == {-1} for numbers in ids) == max(0, world_size - 2)


def test_of_a_video_that_breaks_off_the_part_that_is_there_is_read_and_said(videos: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(12)]
    cut(write_film(videos / "a.mkv", frames, "mjpeg", "yuvj420p"), 0.7)
    with pytest.warns(UserWarning, match=r"a\.mkv: the file is cut off.*taken for the whole video") as said:
        chunks = list(RawStream(find_videos(videos), chunk_frames=3))
    count = int(re.search(r"(\d+) frames could be decoded", str(said[0].message))[1])  # type: ignore[index]
    assert [chunk.length for chunk in chunks if chunk.is_last] == [count, 7, 6, 3]
    assert sum(chunk.frames.shape[1] for chunk in chunks if chunk.video_id == 1) == count


def test_chunk_frames_out_of_range() -> None:
    with pytest.raises(ValueError, match="chunk_frames: expected 1 or more, found 0"):
        RawStream([], chunk_frames=0)
