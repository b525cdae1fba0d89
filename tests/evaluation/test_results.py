import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.results import (
    RLE,
    ResultParts,
    Track,
    decode_mask,
    encode_mask,
    read_results,
    write_results,
    zip_results,
)


def make_mask() -> np.ndarray:
    mask = np.zeros((5, 7), dtype=bool)
    mask[1:4, 2:6] = True
    return mask


def make_tracks() -> list[Track]:
    rle = encode_mask(make_mask())
    return [Track(1, 2, 0.1 + 0.2, [rle, None]), Track(7, 1, 1e-17, [None, None]), Track(1, 2, 1.0, [None, rle])]


def test_masks_survive_encoding():
    rle = encode_mask(make_mask())
    assert rle is not None
    assert rle["size"] == [5, 7]
    assert isinstance(rle["counts"], str)
    np.testing.assert_array_equal(decode_mask(rle), make_mask())
    assert encode_mask(np.zeros((5, 7), dtype=bool)) is None


def test_written_results_are_read_back_exactly(tmp_path):
    path = tmp_path / "results.json"
    assert write_results(path, make_tracks()) == 3
    assert read_results(path) == make_tracks()
    assert set(json.loads(path.read_text())[0]) == {"video_id", "category_id", "score", "segmentations"}


def test_no_tracks_make_a_valid_file(tmp_path):
    write_results(tmp_path / "results.json", [])
    assert read_results(tmp_path / "results.json") == []


def test_the_zip_holds_the_file_alone_and_is_always_the_same(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    write_results(path, make_tracks())
    packed = zip_results(path)
    assert packed == tmp_path / "mine.zip"
    with zipfile.ZipFile(packed) as archive:
        assert archive.namelist() == ["results.json"]
        assert archive.testzip() is None
        assert archive.read("results.json") == path.read_bytes()
    first = packed.read_bytes()
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert zip_results(path).read_bytes() == first


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, make_tracks())

    def interrupted():
        yield make_tracks()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_results(path, interrupted())
    assert read_results(path) == make_tracks()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_must_be_finite(score):
    with pytest.raises(ValueError, match=r"video 3 is (nan|inf), expected a finite number"):
        Track(3, 1, score, [])


GOOD = {"video_id": 1, "category_id": 2, "score": 0.5, "segmentations": [None, RLE(size=[5, 7], counts="S1")]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("{}", "found a JSON dict, expected a list"),
        ("[3]", "entry 0: found 3, expected an object"),
        (json.dumps([GOOD, {"video_id": 1}]), "entry 1: category_id is missing, found only video_id"),
        (
            json.dumps([GOOD | {"video_id": "1"}]),
            'entry 0: video_id is "1", expected a whole number of at most 64 bits',
        ),
        (json.dumps([GOOD | {"category_id": True}]), "entry 0: category_id is true, expected a whole number"),
        (json.dumps([GOOD | {"category_id": 1.5}]), "entry 0: category_id is 1.5, expected a whole number"),
        (json.dumps([GOOD | {"video_id": 10**1000}]), "entry 0: video_id is 1000.*, expected .* at most 64 bits"),
        (json.dumps([GOOD | {"score": None}]), "entry 0: score is nothing, expected int or float"),
        (json.dumps([GOOD | {"score": float("nan")}]), "entry 0: the score of a track of video 1 is nan"),
        (json.dumps([GOOD | {"segmentations": None}]), "entry 0: segmentations is nothing, expected list"),
        (
            json.dumps([GOOD | {"segmentations": [None, {"size": [5, 7], "counts": [3, 32]}]}]),
            "entry 0: frame 1 is .*, expected null or compressed run lengths",
        ),
        (
            json.dumps([GOOD, GOOD | {"segmentations": [*GOOD["segmentations"], RLE(size=[7, 5], counts="S1")]}]),
            r"entry 1: segmentations\[2\]\.size: expected \[5, 7\], .*, found \[7, 5\]",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"results.json: {message}"):
        read_results(path)


def test_ids_may_be_written_as_floats(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD | {"video_id": 1.0, "category_id": 2.0}]))
    (track,) = read_results(path)
    assert (track.video_id, track.category_id) == (1, 2)
    assert type(track.category_id) is int


def test_a_results_file_that_is_not_there_is_refused_before_the_ground_truth_is_read(tmp_path):
    for path, found in ((tmp_path / "nope.json", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: {found}; expected a results file"):
            evaluate_files(tmp_path / "not_looked_at.json", path)
        with pytest.raises(FileNotFoundError, match=f"{path.name}: {found}; expected a results file"):
            read_results(path)


@pytest.mark.parametrize("damage", ["cut", "unfinished", "more runs", "more digits", "not ASCII"])
def test_damaged_counts_are_refused_with_their_place(tmp_path, damage):
    rle = encode_mask(make_mask())
    damaged = {
        "cut": rle["counts"][:-1],
        "unfinished": rle["counts"][:-1] + "o",
        "more runs": rle["counts"] + "1",
        "more digits": "S" + "P" * 20 + "1",
        "not ASCII": rle["counts"][:-1] + "é",
    }[damage]
    bad = GOOD | {"segmentations": [rle, None, rle | {"counts": damaged}]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, bad]))
    with pytest.raises(ValueError, match=r"results.json: entry 1: segmentations\[2\]\.counts: expected .*, found "):
        read_results(path)


# Parts of runs that may be killed

RUN = {"weights": "a", "data.eval_size": 360}


def make_parts(folder: Path, **changes: object) -> ResultParts:
    return ResultParts(folder / "results.json", {**RUN, **changes}, [30, 4, 7])


def scored(video_id: int, score: float = 0.5) -> Track:
    return Track(video_id, 1, score, [None])


def test_parts_are_merged_by_ascending_video_id_and_go(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "new")
    assert parts.finished() == frozenset()
    assert parts.start() == ""
    parts.write(30, [scored(30)])
    parts.write(7, [])
    parts.write(4, [scored(4, 0.1), scored(4, 0.2)])
    assert parts.finished() == {4, 7, 30}
    assert parts.merge() == f"3 tracks of 3 videos written to {tmp_path}/new/results.json and results.zip"
    assert read_results(tmp_path / "new" / "results.json") == [scored(4, 0.1), scored(4, 0.2), scored(30)]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.json", "results.zip"}


def test_the_same_run_finds_its_parts_and_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    first = make_parts(tmp_path)
    first.start()
    first.write(7, [scored(7)], [scored(7, 0.9)])
    for name in (".video_4.json.123.tmp", "results.json", "results.zip"):
        (first.folder / name).write_text("half")
    second = make_parts(tmp_path)
    assert second.finished() == {7}
    assert second.read_others(7) == [scored(7, 0.9)]
    assert second.start() == f"1 of 3 videos taken over from {second.folder}"
    assert second.read(7) == [scored(7)]
    assert {path.name for path in second.folder.iterdir()} == {"others_7.json", "video_7.json", "run.json"}


@pytest.mark.parametrize("record", ["sound", "cut"])
def test_parts_of_another_run_are_left_with_the_difference(tmp_path: Path, record: str) -> None:
    first = make_parts(tmp_path)
    first.start()
    first.write(7, [scored(7)])
    if record == "cut":
        (first.folder / "run.json").write_text('{"wei')
    (first.folder.parent / "notes.txt").write_text("mine")
    second = make_parts(tmp_path, weights="b")
    assert second.finished() == frozenset()
    unlike = {"sound": "weights", "cut": "what cannot be read any more"}[record]
    assert second.start() == f"{first.folder}: an unfinished run that differs in {unlike}; left as it is"
    for video_id in second.video_ids:
        second.write(video_id, [scored(video_id)])
    second.merge()
    assert first.finished() == {7}
    assert (first.folder.parent / "notes.txt").read_text() == "mine"
    assert not second.folder.exists()


def test_nothing_is_written_while_a_part_is_missing(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    parts.start()
    parts.write(7, [scored(7)])
    with pytest.raises(RuntimeError, match=r"found no results of 2 of 3 videos, ids 4, 30; .*same command again"):
        parts.merge()
    assert parts.finished() == {7}
    assert not (tmp_path / "results.json").exists()
