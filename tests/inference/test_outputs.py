"""Writers of tracks and label images; outputs of ``segment`` beside earlier files, other processes and a full disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.inference.conftest import SHOW_ALL, fail, segment, shape_of
from tests.inference.films import moving_square, serve, write_film

from instanceformer.cli import main
from instanceformer.data.annotations import Category
from instanceformer.evaluation.results import decode_mask, read_results
from instanceformer.files import locking
from instanceformer.inference.label_images import MasksWriter, write_label_image
from instanceformer.inference.outputs import SegmentOutputs, segment_video
from instanceformer.inference.render import instance_color
from instanceformer.inference.results_files import TracksWriter
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.tracks import FrameInstances, SegmenterOptions
from instanceformer.video import films
from instanceformer.video.reading import open_video

CATEGORIES = [Category(4, "cat"), Category(9, "dog")]
OUTPUTS = {"output": "film.mp4", "results": "results.json", "masks": "masks"}


def instances(*tracks, height=20, width=30):
    """Tracks (id, label, score, left, right) as stripes; ``left == right`` is an empty mask."""
    masks = torch.zeros(len(tracks), height, width, dtype=torch.bool)
    for mask, (_, _, _, left, right) in zip(masks, tracks, strict=True):
        mask[:, left:right] = True
    ids, labels, scores = ([track[i] for track in tracks] for i in range(3))
    return FrameInstances(
        ids=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        boxes=torch.zeros(len(tracks), 4),
        masks=masks,
    )


def test_results_have_every_frame_of_every_track_and_its_last_category(tmp_path):
    path = tmp_path / "results.json"
    with TracksWriter(path, CATEGORIES, video_id=3) as writer:
        writer.write(instances((1, 0, 0.5, 0, 10)))
        writer.write(instances())
        writer.write(instances((1, 1, 0.625, 5, 15), (2, 0, 0.75, 20, 21)))
        writer.write(instances((2, 0, 0.875, 21, 22)))
        assert not path.exists()
    best, other = read_results(path)
    assert (best.video_id, best.category_id, best.score) == (3, 4, 0.875)
    assert (other.video_id, other.category_id, other.score) == (3, 9, 0.625)
    assert [mask is not None for mask in best.segmentations] == [False, False, True, True]
    assert [mask is not None for mask in other.segmentations] == [True, False, True, False]
    expected = instances((1, 0, 0.5, 5, 15)).masks[0].numpy()
    assert (decode_mask(other.segmentations[2]) == expected).all()


def test_a_video_without_tracks_has_an_empty_list(tmp_path):
    with TracksWriter(tmp_path / "results.json", CATEGORIES) as writer:
        writer.write(instances())
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_an_exception_leaves_the_old_results_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("the old results")

    def interrupted():
        with TracksWriter(path, CATEGORIES) as writer:
            writer.write(instances((1, 0, 0.5, 0, 10)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "the old results"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_within_a_frame_leaves_whole_frames(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with TracksWriter(tmp_path / "results.json", CATEGORIES) as writer:
        writer.write(instances((1, 0, 0.5, 0, 10), (2, 0, 0.5, 20, 25)))
        writer._database.create_function("interrupt", 0, interrupt)
        writer._database.execute(
            "CREATE TEMP TRIGGER stop BEFORE INSERT ON masks WHEN NEW.track = 2 BEGIN SELECT interrupt(); END"
        )
        with pytest.raises(OSError, match=r"results\.json: its masks cannot be kept until the end"):
            writer.write(instances((1, 0, 0.5, 0, 10), (2, 0, 0.5, 20, 25)))
        writer._database.execute("DROP TRIGGER stop")
    assert [len(track.segmentations) for track in read_results(tmp_path / "results.json")] == [1, 1]


def test_label_images_hold_ids_small_instances_in_front(tmp_path):
    path = tmp_path / "0.png"
    write_label_image(path, instances((3, 0, 0.5, 4, 6), (7, 0, 0.5, 0, 10)))
    image = Image.open(path)
    assert image.mode == "P"
    values = np.array(image)
    assert values.shape == (20, 30)
    assert [int(values[0, x]) for x in (0, 4, 6, 10)] == [7, 3, 7, 0]
    assert image.convert("RGB").getpixel((0, 0)) == instance_color(7)
    write_label_image(path, instances())
    assert not np.array(Image.open(path)).any()
    assert list(tmp_path.iterdir()) == [path]


def test_ids_beyond_a_palette_are_whole_in_16_bits(tmp_path):
    write_label_image(tmp_path / "0.png", instances((300, 0, 0.5, 0, 5), (65536, 0, 0.5, 10, 20)))
    values = np.array(Image.open(tmp_path / "0.png"))
    assert [int(values[0, x]) for x in (0, 10, 25)] == [300, 1, 0]


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

    assert segment_video(open_video(camera()), segmenter, outputs).frames == 2
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
