from __future__ import annotations

from pathlib import Path

import pytest

from instanceformer.evaluation.parts import ResultParts
from instanceformer.evaluation.results import Track, read_results

RUN = {"weights": "a", "data.eval_size": 360}


def make_parts(folder: Path, **changes: object) -> ResultParts:
    return ResultParts(folder / "results.json", {**RUN, **changes}, [30, 4, 7])


def track(video_id: int, score: float = 0.5) -> Track:
    return Track(video_id, 1, score, [None])


def test_parts_are_merged_by_ascending_video_id_and_go(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "new")
    assert parts.finished() == frozenset()
    assert parts.start() == ""
    parts.write(30, [track(30)])
    parts.write(7, [])
    parts.write(4, [track(4, 0.1), track(4, 0.2)])
    assert parts.finished() == {4, 7, 30}
    assert parts.merge() == f"3 tracks of 3 videos written to {tmp_path}/new/results.json and results.zip"
    assert read_results(tmp_path / "new" / "results.json") == [track(4, 0.1), track(4, 0.2), track(30)]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.json", "results.zip"}


def test_the_same_run_finds_its_parts_and_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    first = make_parts(tmp_path)
    first.start()
    first.write(7, [track(7)], [track(7, 0.9)])
    for name in (".video_4.json.123.tmp", "results.json", "results.zip"):
        (first.folder / name).write_text("half")
    second = make_parts(tmp_path)
    assert second.finished() == {7}
    assert second.read_others(7) == [track(7, 0.9)]
    assert second.start() == f"1 of 3 videos taken over from {second.folder}"
    assert second.read(7) == [track(7)]
    assert {path.name for path in second.folder.iterdir()} == {"others_7.json", "video_7.json", "run.json"}


@pytest.mark.parametrize("record", ["sound", "cut"])
def test_parts_of_another_run_are_left_with_the_difference(tmp_path: Path, record: str) -> None:
    first = make_parts(tmp_path)
    first.start()
    first.write(7, [track(7)])
    if record == "cut":
        (first.folder / "run.json").write_text('{"wei')
    (first.folder.parent / "notes.txt").write_text("mine")
    second = make_parts(tmp_path, weights="b")
    assert second.finished() == frozenset()
    unlike = {"sound": "weights", "cut": "what cannot be read any more"}[record]
    assert second.start() == f"{first.folder}: an unfinished run that differs in {unlike}; left as it is"
    for video_id in second.video_ids:
        second.write(video_id, [track(video_id)])
    second.merge()
    assert first.finished() == {7}
    assert (first.folder.parent / "notes.txt").read_text() == "mine"
    assert not second.folder.exists()


def test_nothing_is_written_while_a_part_is_missing(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    parts.start()
    parts.write(7, [track(7)])
    with pytest.raises(RuntimeError, match=r"found no results of 2 of 3 videos, ids 4, 30; .*same command again"):
        parts.merge()
    assert parts.finished() == {7}
    assert not (tmp_path / "results.json").exists()
