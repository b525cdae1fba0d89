"""What ``segment`` does to files that are there already, to those of other processes, and on a full disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.inference.conftest import SHOW_ALL, fail, segment, shape_of
from tests.inference.films import moving_square, serve, write_film

from instanceformer.cli import main
from instanceformer.evaluation.results import read_results
from instanceformer.files import locking
from instanceformer.inference.options import SegmenterOptions
from instanceformer.inference.outputs import MasksWriter
from instanceformer.inference.segment import SegmentOutputs, segment_video
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.video import films
from instanceformer.video.reading import open_video

OUTPUTS = {"output": "film.mp4", "results": "results.json", "masks": "masks"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("option", OUTPUTS)
def test_what_is_there_already_is_refused_before_the_network_is_read(tmp_path, folder, option):
    place = folder / OUTPUTS[option]
    if option == "masks":
        place.mkdir()
        place = place / "000000.png"
    place.write_text("of an earlier run")
    video = write_film(tmp_path / "video.mp4", moving_square(2))
    message = fail(video, tmp_path / "no.ckpt", folder)
    assert f"{option}: {folder / OUTPUTS[option]} exists; give another name, or --overwrite" in message
    assert contents(folder) == {str(place.relative_to(folder)): b"of an earlier run"}


def test_overwrite_replaces_films_results_and_all_masks(tmp_path, checkpoint, folder):
    segment(write_film(tmp_path / "long.mp4", moving_square(4)), checkpoint, folder)
    before = contents(folder)
    segment(write_film(tmp_path / "short.mp4", moving_square(2)), checkpoint, folder, "--overwrite")
    after = contents(folder)
    assert sorted(after) == ["film.mp4", "masks/000000.png", "masks/000001.png", "results.json"]
    assert all(after[name] != before[name] for name in ("film.mp4", "results.json"))
    assert len(shape_of(folder / "film.mp4")) == 2


def test_an_interruption_before_the_first_frame_leaves_the_earlier_run(checkpoint, folder):
    def camera():
        raise KeyboardInterrupt
        yield

    (folder / "masks").mkdir()
    for name in ("film.mp4", "results.json", "masks/000000.png"):
        (folder / name).write_text("of an earlier run")
    before = contents(folder)
    outputs = SegmentOutputs(**{option: folder / name for option, name in OUTPUTS.items()}, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        segment_video(open_video(camera()), VideoInstanceSegmenter.from_checkpoint(checkpoint, "cpu"), outputs)
    assert contents(folder) == before


def test_what_a_killed_run_had_begun_is_removed_and_what_it_was_to_replace_is_there(tmp_path, checkpoint, folder):
    (folder / "masks").mkdir()
    for name in ("film.mp4", "masks/000000.png"):
        (folder / name).write_text("of an earlier run")
    (folder / ".masks.123.new.tmp").mkdir()
    for name in (".film.mp4.123.tmp", ".film.mp4.lock", ".masks.123.new.tmp/000000.png"):
        (folder / name).write_text("of a killed run")
    segment(write_film(tmp_path / "video.mp4", moving_square(2)), checkpoint, folder, "--overwrite")
    assert sorted(contents(folder)) == ["film.mp4", "masks/000000.png", "masks/000001.png", "results.json"]


@pytest.mark.parametrize("option", OUTPUTS)
def test_a_second_run_into_one_place_is_refused_while_the_first_writes(tmp_path, checkpoint, folder, option):
    video = write_film(tmp_path / "video.mp4", moving_square(2))
    with locking(folder / OUTPUTS[option]):
        message = fail(video, checkpoint, folder)
    assert f"{folder / OUTPUTS[option]}: another process is writing to it" in message
    assert contents(folder) == {}
    segment(video, checkpoint, folder)


def test_outputs_are_locked_while_frames_come_and_no_longer(checkpoint, folder):
    outputs = SegmentOutputs(**{option: folder / name for option, name in OUTPUTS.items()})
    segmenter = VideoInstanceSegmenter.from_checkpoint(checkpoint, "cpu")

    def camera():
        yield from moving_square(1)
        for path in outputs.paths.values():
            with pytest.raises(BlockingIOError), locking(path):
                pass
        yield from moving_square(1)

    assert segment_video(open_video(camera()), segmenter, outputs) == 2
    with pytest.raises(FileExistsError, match=r"output: .*film\.mp4 exists"):  # not even one that had begun before
        segment_video(open_video(moving_square(1)), segmenter, outputs)


def test_masks_that_could_not_all_be_written_do_not_replace_those_that_are_there(tmp_path, monkeypatch):
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "000000.png").write_text("of an earlier run")
    with MasksWriter(folder) as writer, pytest.raises(AttributeError):
        writer.write(0, None)
    assert contents(tmp_path) == {"masks/000000.png": b"of an earlier run"}


def test_identities_go_on_over_a_stream_that_drops(tmp_path, checkpoint, folder, monkeypatch, capsys):
    """As if it had not: the same ids, and the frames of both connections in one film."""
    parts = [write_film(tmp_path / f"{t}.ts", moving_square(8)[t : t + 4]) for t in (0, 4)]
    monkeypatch.setattr(films, "FIRST_REST", 0.01)
    address = serve(*(part.read_bytes() for part in parts))
    message = fail(address, checkpoint, folder, "--reconnect=0.2")
    assert "the stream ended, and did not come back within 0.2 seconds; 8 frames could be decoded" in message
    assert "the stream ended; trying for 0.2 seconds to open it again" in capsys.readouterr().err
    assert len(shape_of(folder / "film.mp4")) == 8
    tracks = read_results(folder / "results.json")
    assert any(all(mask is not None for mask in track.segmentations) for track in tracks)
    frames = [frame.image for part in parts for frame in open_video(part).frames]
    options = SegmenterOptions(birth=0, show=0, max_overlap=1, size=64)
    whole = list(VideoInstanceSegmenter.from_checkpoint(checkpoint, "cpu", options).segment(frames))
    assert sorted(track.score for track in tracks) == pytest.approx(sorted(whole[-1].scores.tolist()), abs=1e-4)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, on which 12 KiB are left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, left: int = 12 * 1024) -> None:
    with (disk / "filler").open("wb") as file:
        used = sum(path.stat().st_size for path in disk.rglob("*"))
        file.write(bytes(2**20 - used - left))


@pytest.mark.parametrize("option", OUTPUTS)
def test_a_full_disk_is_named_and_what_stood_there_before_is_whole(tmp_path, checkpoint, full_disk, option):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(30)]
    place = full_disk / OUTPUTS[option]
    if option == "masks":
        place.mkdir()
        (place / "000000.png").write_text("of an earlier run")
    else:
        place.write_text("of an earlier run")
    fill(full_disk)
    before = contents(full_disk)
    video = write_film(tmp_path / "video.mp4", frames)
    with pytest.raises(SystemExit) as stop:
        main(["segment", str(video), f"--checkpoint={checkpoint}", f"--{option}={place}", "--overwrite", *SHOW_ALL])
    message = str(stop.value.code)
    assert "found no space left on the disk of" in message
    assert str(full_disk) in message
    assert "\n" not in message
    assert contents(full_disk) == before
