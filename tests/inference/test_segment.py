"""The command ``segment``, called as a user does."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tests.inference.conftest import SHOW_ALL, fail, segment, shape_of
from tests.inference.films import cut, moving_square, turn, write_film, write_sound

from instanceformer import VideoInstanceSegmenter
from instanceformer.cli import main
from instanceformer.evaluation.results import decode_mask, read_results
from instanceformer.inference.outputs import SegmentOutputs, segment_video
from instanceformer.inference.results_files import TracksWriter
from instanceformer.inference.tracks import SegmenterOptions
from instanceformer.video.films import VideoWriter
from instanceformer.video.reading import open_video


def test_a_film_results_and_masks_of_a_video(tmp_path, checkpoint, folder):
    video = write_film(tmp_path / "video.mp4", moving_square(6))
    segment(video, checkpoint, folder, "--chunk=4")
    assert sorted(path.name for path in folder.iterdir()) == ["film.mp4", "masks", "results.json"]
    assert shape_of(folder / "film.mp4") == [(48, 64, 3)] * 6
    with av.open(str(folder / "film.mp4")) as film:
        assert film.streams.video[0].average_rate == 10
    assert [path.name for path in sorted((folder / "masks").iterdir())] == [f"{t:06}.png" for t in range(6)]

    tracks = read_results(folder / "results.json")
    assert tracks
    assert {track.category_id for track in tracks} <= {4, 9}
    segmenter = VideoInstanceSegmenter.from_checkpoint(
        checkpoint, "cpu", SegmenterOptions(birth=0, show=0, max_overlap=1, size=64)
    )
    last = list(segmenter.segment(video))[-1]
    scores = {round(track.score, 4) for track in tracks}
    assert {round(score, 4) for score in last.scores.tolist()} <= scores
    labeled = np.array(Image.open(folder / "masks" / "000005.png"))
    union = np.any([decode_mask(track.segmentations[5]) for track in tracks if track.segmentations[5]], axis=0)
    assert ((labeled > 0) == union).all()


def test_a_part_of_a_video_at_its_own_times(tmp_path, checkpoint, folder):
    times = [0.0, 0.1, 0.5, 0.6, 1.2, 1.3, 2.0]
    video = write_film(tmp_path / "video.mkv", moving_square(7), seconds=times)
    segment(video, checkpoint, folder, "--start=1", "--end=6", "--stride=2")
    shown = [frame.seconds for frame in open_video(folder / "film.mp4").frames]
    assert shown == pytest.approx([0, 0.5, 1.2], abs=2e-3)
    assert sorted(path.name for path in (folder / "masks").iterdir()) == ["000001.png", "000003.png", "000005.png"]
    assert {len(track.segmentations) for track in read_results(folder / "results.json")} == {3}


def test_the_last_line_counts_frames_and_tracks(tmp_path, checkpoint, folder, capsys):
    video = write_film(tmp_path / "video.mp4", moving_square(3))
    segment(video, checkpoint, folder)
    printed = capsys.readouterr()
    tracks = len(read_results(folder / "results.json"))
    assert tracks > 1
    assert re.match(rf"3 frames, {tracks} tracks; \d+\.\d seconds, \d+\.\d frames a second; written: ", printed.out)
    assert f"written: {folder / 'film.mp4'}, " in printed.out
    assert "no track" not in printed.err

    segment(video, checkpoint, folder, "--birth=0.9", "--show=0.6", "--classes=dog", "--overwrite")
    printed = capsys.readouterr()
    assert printed.out.startswith("3 frames, 0 tracks; ")
    said = "nothing reached a confidence of 0.9 as one of the classes dog; if the video shows one of these, "
    assert f"no track was ever shown: {said}try --birth 0.45 --show 0.45, else another checkpoint" in printed.err


def test_films_of_odd_sizes_ten_bits_and_turned_ones(tmp_path, checkpoint, folder):
    odd = write_film(tmp_path / "odd.mkv", moving_square(2, 47, 63), "ffv1", "yuv444p")
    segment(odd, checkpoint, folder)
    assert shape_of(folder / "film.mp4") == [(48, 64, 3)] * 2
    assert np.array(Image.open(folder / "masks" / "000000.png")).shape == (47, 63)

    upright = write_film(tmp_path / "upright.mp4", moving_square(2), pix_fmt="yuv420p10le")
    turn(upright, (0, 1, -1, 0))
    main(["segment", str(upright), f"--checkpoint={checkpoint}", f"--output={folder / 'turned.mp4'}", *SHOW_ALL])
    assert shape_of(folder / "turned.mp4") == [(64, 48, 3)] * 2


def test_a_folder_of_images_at_a_rate_of_the_users(tmp_path, checkpoint, folder):
    images = tmp_path / "images"
    images.mkdir()
    for t, frame in enumerate(moving_square(3)):
        Image.fromarray(frame).save(images / f"{t}.png")
    segment(images, checkpoint, folder, "--fps=5")
    assert [frame.seconds for frame in open_video(folder / "film.mp4").frames] == pytest.approx([0, 0.2, 0.4], abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 5])
def test_of_a_film_that_is_cut_off_what_was_seen_is_complete(tmp_path, checkpoint, folder, chunk):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(12)]
    video = cut(write_film(tmp_path / "video.mp4", frames), 0.7)
    message = fail(video, checkpoint, folder, f"--chunk={chunk}")
    assert "video.mp4: the file is cut off" in message
    assert "what was seen until then is written" in message
    count = len(shape_of(folder / "film.mp4"))
    assert 4 <= count < 12
    assert f"{count} frames could be decoded" in message
    assert {len(track.segmentations) for track in read_results(folder / "results.json")} == {count}
    assert len(list((folder / "masks").iterdir())) == count
    assert not list(folder.rglob(".*"))


def test_when_the_user_stops_a_camera_what_was_seen_is_complete(checkpoint, folder):
    def camera():
        yield from moving_square(3)
        raise KeyboardInterrupt

    segmenter = VideoInstanceSegmenter.from_checkpoint(checkpoint, "cpu", SegmenterOptions(size=64, chunk=2))
    outputs = SegmentOutputs(folder / "film.mp4", folder / "results.json")
    with pytest.raises(KeyboardInterrupt):
        segment_video(open_video(camera()), segmenter, outputs)
    assert len(shape_of(folder / "film.mp4")) == 3
    assert (folder / "results.json").exists()


def make_broken(kind: str, folder: Path) -> tuple[Path, str]:
    """A source with something wrong with it, and what is said of it."""
    video = folder / "video.mp4"
    match kind:
        case "no index":
            return cut(write_film(video, moving_square()), 0.02), "cannot be opened as a video"
        case "no frames":
            write_film(video, moving_square())
            with av.open(str(video)) as container:
                begin = min(entry.pos for entry in container.streams.video[0].index_entries)
            video.write_bytes(video.read_bytes()[:begin])
            return video, "no frame can be decoded"
        case "empty":
            video.write_bytes(b"")
            return video, "cannot be opened as a video"
        case "sound":
            return write_sound(folder / "sound.mp4", "aac"), "no video stream"
        case "text":
            video.write_text("This is not a video.\n" * 100)
            return video, "cannot be opened as a video"
        case "one pixel":
            path = folder / "video.mkv"
            return write_film(
                path, [np.zeros((1, 1, 3), np.uint8)] * 2, "ffv1", "yuv444p"
            ), "1x1 pixels, expected at least"
        case "mixed sizes":
            (folder / "images").mkdir()
            Image.new("RGB", (64, 48)).save(folder / "images" / "0.png")
            Image.new("RGB", (32, 48)).save(folder / "images" / "1.png")
            return folder / "images", "1.png: found 32x48 pixels, expected 64x48"
        case _:
            return folder / "nowhere.mp4", "nowhere.mp4: no such video file"


@pytest.mark.parametrize(
    "kind", ["no index", "no frames", "empty", "sound", "text", "one pixel", "mixed sizes", "nowhere"]
)
def test_a_broken_video_is_refused_in_one_line_and_nothing_is_left(tmp_path, checkpoint, folder, kind):
    video, message = make_broken(kind, tmp_path)
    (folder / "film.mp4").write_text("an older film")
    said = fail(video, checkpoint, folder, "--overwrite")
    assert message in said
    assert "\n" not in said
    assert [path.name for path in folder.rglob("*")] == ["film.mp4"]
    assert (folder / "film.mp4").read_text() == "an older film"


def test_a_part_beyond_the_end_is_refused(tmp_path, checkpoint, folder):
    video = write_film(tmp_path / "video.mp4", moving_square(3))
    assert "found no frame from frame 3 on" in fail(video, checkpoint, folder, "--start=3")
    assert "found start 2, end 2, stride 1; expected 0 <= start < end" in fail(
        video, checkpoint, folder, "--start=2", "--end=2"
    )
    assert list(folder.iterdir()) == []


def test_outputs_are_looked_at_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="found nothing to write"):
        SegmentOutputs()
    with pytest.raises(ValueError, match=r"film\.avi, expected a name that ends in \.mp4"):
        SegmentOutputs(output=tmp_path / "film.avi")
    with pytest.raises(ValueError, match=r"found no folder .*nowhere, expected one that exists"):
        SegmentOutputs(results=tmp_path / "nowhere" / "results.json")
    with pytest.raises(ValueError, match="found a folder or device, expected the name of a file"):
        SegmentOutputs(results=tmp_path)
    (tmp_path / "masks").mkdir()
    SegmentOutputs(masks=tmp_path / "masks")
    (tmp_path / "masks" / "photo.png").touch()
    with pytest.raises(ValueError, match="masks is there already and not a folder of masks alone, expected a new"):
        SegmentOutputs(masks=tmp_path / "masks", overwrite=True)
    with pytest.raises(ValueError, match="/dev/null: found a folder or device"):
        SegmentOutputs(results=Path("/dev/null"))
    with pytest.raises(ValueError, match=r"results: found .*a\.mp4, which is the output too"):
        SegmentOutputs(output=tmp_path / "a.mp4", results=tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("video", "outputs", "message"),
    [
        ("video.mp4", ["--output=video.mp4"], "output: found video.mp4, which is the video too, expected another"),
        ("file://{here}/video.mp4", ["--results=link.mp4"], "results: found link.mp4, which is the video too"),
        ("video.mp4", ["--results=tiny.ckpt"], "results: found tiny.ckpt, which is the checkpoint too"),
        ("video.mp4", ["--results=a" + 300 * "b"], "file name too long"),
    ],
)
def test_nothing_that_is_read_is_written_and_paths_are_tried_first(
    tmp_path, checkpoint, monkeypatch, video, outputs, message
):
    monkeypatch.chdir(tmp_path)
    film = write_film(tmp_path / "video.mp4", moving_square(2)).read_bytes()
    Path("link.mp4").symlink_to("video.mp4")
    monkeypatch.setattr(VideoInstanceSegmenter, "step", lambda *_: pytest.fail("frames were looked at"))
    with pytest.raises(SystemExit) as stop:
        main(["segment", video.format(here=tmp_path), f"--checkpoint={checkpoint}", *outputs, *SHOW_ALL])
    assert message in str(stop.value.code)
    assert Path("video.mp4").read_bytes() == film
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.mp4", "tiny.ckpt", "video.mp4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_what_was_seen_is_complete(tmp_path, checkpoint, folder, number):
    video = write_film(tmp_path / "video.mp4", moving_square(3000))
    outputs = [f"--output={folder / 'film.mp4'}", f"--results={folder / 'results.json'}", f"--masks={folder / 'masks'}"]
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background does not
    program = [sys.executable, "-c", f"{heed}; from instanceformer.cli import main; main()"]
    run = subprocess.Popen([*program, "segment", str(video), f"--checkpoint={checkpoint}", *outputs, *SHOW_ALL])
    try:
        deadline = time.monotonic() + 120
        while run.poll() is None and len(list(folder.glob("masks/*.png"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(number)
        assert run.wait(timeout=60) == 130
    finally:
        run.kill()
    count = len(shape_of(folder / "film.mp4"))
    assert 5 <= count < 3000
    (length,) = {len(track.segmentations) for track in read_results(folder / "results.json")}
    assert abs(length - count) <= 1  # the signal may come between the two
    assert not list(folder.rglob(".*"))


def test_an_output_that_fails_leaves_the_others_complete(tmp_path, checkpoint, folder, monkeypatch):
    write, full = Image.Image.save, OSError(28, "No space left on device")

    def save(image, file, *args, **options):
        if "000003" in str(file):
            raise full
        write(image, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    message = fail(write_film(tmp_path / "video.mp4", moving_square(6)), checkpoint, folder)
    assert re.search("000003.png: found no space left on .*; what was seen until then is written", message)
    assert len(shape_of(folder / "film.mp4")) == 4
    assert {len(track.segmentations) for track in read_results(folder / "results.json")} == {4}


@pytest.mark.parametrize("what", ["film", "results", "database"])
def test_a_file_that_cannot_be_finished_takes_no_other_with_it(tmp_path, checkpoint, folder, monkeypatch, what):
    def fails(*_):
        raise OSError(28, "No space left on device")

    def small(writer):
        begin(writer)._database.execute("PRAGMA max_page_count = 1")
        return writer

    begin = TracksWriter.__enter__
    if what == "film":
        monkeypatch.setattr(VideoWriter, "_finish", fails)
    elif what == "results":
        monkeypatch.setattr("instanceformer.inference.results_files.write_results", fails)
    else:
        monkeypatch.setattr(TracksWriter, "__enter__", small)
    message = fail(write_film(tmp_path / "video.mp4", moving_square(60)), checkpoint, folder)
    assert ("masks cannot be kept until the end" if what == "database" else "no space left") in message.lower()
    assert (folder / "film.mp4").exists() == (what != "film")
    assert (folder / "results.json").exists() == (what != "results")
    if what == "database":
        count = len(shape_of(folder / "film.mp4"))
        assert {len(track.segmentations) for track in read_results(folder / "results.json")} == {count}
    assert not list(folder.rglob(".*"))
