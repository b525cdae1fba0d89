"""``segment`` without an output, and over several videos: killed, started again, with broken ones among them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from PIL import Image
from tests import processes
from tests.inference.conftest import SHOW_ALL, shape_of
from tests.inference.films import cut, moving_square, write_film

from instanceformer import VideoInstanceSegmenter
from instanceformer.cli import main
from instanceformer.evaluation.results import read_results
from instanceformer.inference.batch import find_sources, place_outputs


def fail(*words: object) -> str | int | None:
    with pytest.raises(SystemExit) as stop:
        main(["segment", *map(str, words), *SHOW_ALL])
    return stop.value.code


def run(*words: object) -> None:
    main(["segment", *map(str, words), *SHOW_ALL])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        write_film(folder / f"{name}.mp4", moving_square(3))
    return folder


def test_one_argument_makes_a_film_beside_the_video(tmp_path, checkpoint, monkeypatch):
    street = write_film(tmp_path / "street.mp4", moving_square(3))
    run(street, f"--checkpoint={checkpoint}")
    assert len(shape_of(tmp_path / "street_instances.mp4")) == 3
    assert "street_instances.mp4 exists; give another name, or --overwrite" in str(fail(street, "--checkpoint=no.ckpt"))

    images = tmp_path / "images"
    images.mkdir()
    for t, frame in enumerate(moving_square(2)):
        Image.fromarray(frame).save(images / f"{t}.png")
    monkeypatch.chdir(images)
    run(".", f"--checkpoint={checkpoint}")
    assert len(shape_of(tmp_path / "images_instances.mp4")) == 2


def test_a_stream_has_no_place_for_a_film_beside_it():
    assert fail("rtsp://camera/1", "--checkpoint=no.ckpt") == (
        "instanceformer segment: rtsp://camera/1: found a stream, expected a file to write a film beside; give --output"
    )


def test_several_videos_with_folders_for_their_outputs(tmp_path, checkpoint, videos, capsys):
    outputs = [f"--{name}={tmp_path / 'out' / name}" for name in ("output", "results", "masks")]
    run(videos, f"--checkpoint={checkpoint}", *outputs)
    assert names(tmp_path / "out" / "output") == ["a_instances.mp4", "b_instances.mp4"]
    assert names(tmp_path / "out" / "results") == ["a.json", "b.json"]
    assert read_results(tmp_path / "out" / "results" / "b.json")
    assert names(tmp_path / "out" / "masks") == ["a", "b"]
    assert len(names(tmp_path / "out" / "masks" / "b")) == 3
    assert names(videos) == ["a.mp4", "b.mp4"]

    (tmp_path / "out" / "results" / "b.json").unlink()  # as if killed between two outputs of b
    run(videos / "a.mp4", videos / "b.mp4", f"--checkpoint={checkpoint}", *outputs)
    assert "2 videos: 1 segmented, 1 finished before, 0 failed" in capsys.readouterr().out
    assert read_results(tmp_path / "out" / "results" / "b.json")


def test_films_that_were_written_are_no_videos(videos):
    (videos / "a_instances.mp4").touch()
    (videos / "c_instances.mp4").touch()
    expected = [str(videos / name) for name in ("a.mp4", "b.mp4", "c_instances.mp4")]
    assert find_sources([str(videos)]) == expected
    assert find_sources(sorted(str(path) for path in videos.iterdir())) == expected


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"jsonl": Path("-")}, "jsonl: found 2 videos, expected one"),
        ({"output": Path("film.mp4")}, "output: found film.mp4, expected a folder, since there are several videos"),
        ({"results": Path(__file__)}, "results: found .*, expected a folder"),
    ],
)
def test_outputs_that_several_videos_cannot_share_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        place_outputs(["a.mp4", "b.mp4"], True, paths)


def test_two_videos_with_one_film_are_refused():
    with pytest.raises(ValueError, match=r"a\.mov: found a_instances\.mp4 for its output, which is that of a\.mp4 too"):
        place_outputs(["a.mp4", "a.mov"], True, {})


def test_a_checkpoint_that_is_wrong_ends_the_call_at_once(tmp_path, videos):
    assert (
        fail(videos, f"--checkpoint={tmp_path / 'no.ckpt'}")
        == f"instanceformer segment: {tmp_path}/no.ckpt: no such file"
    )


def test_only_the_classes_that_are_named_are_shown(tmp_path, checkpoint):
    frames = moving_square(3)
    rules = {"birth": 0, "show": 0, "max_overlap": 1, "size": 64}
    segmenter = VideoInstanceSegmenter.from_checkpoint(checkpoint, "cpu", **rules)
    dogs = VideoInstanceSegmenter.from_checkpoint(checkpoint, "cpu", classes=("dog",), **rules)
    both = [segmenter.step(frame) for frame in frames]
    assert {*both[-1].labels.tolist()} == {0, 1}
    for every, some in zip(both, map(dogs.step, frames), strict=True):
        assert some.ids.tolist() == every.ids[every.labels == 1].tolist()
        assert (some.masks == every.masks[every.labels == 1]).all()
        assert not {*some.hidden.tolist()} & {*every.ids[every.labels == 0].tolist()}
    message = fail(write_film(tmp_path / "a.mp4", frames), f"--checkpoint={checkpoint}", "--classes=dog,bird")
    assert message == "instanceformer segment: classes: found bird, expected names of the network's: cat, dog"


@pytest.mark.slow
def test_a_killed_call_goes_on_and_two_broken_videos_do_not_end_it(tmp_path, checkpoint):
    folder, log = tmp_path / "videos", tmp_path / "log.txt"
    folder.mkdir()
    for number in range(20):
        write_film(folder / f"{number}.mp4", moving_square(6))
    cut(folder / "3.mp4", 0.7)
    (folder / "11.mp4").write_text("This is not a video.\n" * 100)
    words = ["segment", str(folder), f"--checkpoint={checkpoint}", *SHOW_ALL]

    def films() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*_instances.mp4")}

    done: list[dict[str, int]] = []
    for count, number, code in ((3, signal.SIGKILL, -9), (8, signal.SIGTERM, 130)):
        process = processes.start(words, log)
        processes.wait_until(lambda least=count: len(films()) >= least, process)  # type: ignore[misc]
        assert processes.kill(process, number) == code
        done.append(films())
        assert all(len(shape_of(folder / name)) == 6 for name in done[-1])
    log.unlink()
    assert processes.run(words, log) == 1
    after = films()
    assert len(after) == 18
    assert all(before.items() <= after.items() for before in done)
    lines = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.startswith("instanceformer")]
    assert len(lines) == 2
    assert f"{folder / '3.mp4'}: no frame can be decoded; the file is cut off" in lines[0]
    assert f"{folder / '11.mp4'}: cannot be opened as a video" in lines[1]
    assert f"{len(done[-1])} finished before, 2 failed" in log.read_text()
    assert not list(folder.glob(".*"))
