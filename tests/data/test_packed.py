from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import processes

from instanceformer.data import packed as packed_module
from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.clips import ClipDataset
from instanceformer.data.formats.validation import check_dataset
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.data.packed import open_annotations, pack

CASES = ["images", "videos", "OVIS", "no names", "no instances", "no videos"]


def make(case: str, seed: int = 0) -> tuple[Video, ...]:
    """Videos with all that a file may have."""
    random = np.random.default_rng(seed)
    videos = []
    for id_ in random.permutation(20).tolist() if case != "no videos" else ():
        length = 1 if case == "images" else int(random.integers(1, 5))
        instances = []
        for _ in range(int(random.integers(4)) if case != "no instances" else 0):
            masks = [bytes(random.integers(48, 100, random.integers(1, 6))) for _ in range(length)]
            measured, labeled = case == "OVIS" and random.random() < 0.7, case == "OVIS" and random.random() < 0.7
            instances.append(
                Instance(
                    id=int(random.integers(-(2**62), 2**62)),
                    category_id=int(random.choice([-3, 1, 5, 2**40])),
                    is_crowd=bool(random.random() < 0.3),
                    segmentations=tuple(None if random.random() < 0.4 else mask for mask in masks),
                    areas=tuple(random.random(length).tolist()) if measured else None,
                    has_box_areas=measured and bool(random.random() < 0.5),
                    occlusion=tuple(random.choice(["none", "é", None], length).tolist()) if labeled else None,  # type: ignore[arg-type]
                )
            )
        names = tuple(f"{id_}/é\ud800{t}.jpg" for t in range(length)) if case != "no names" else ()
        videos.append(Video(id_, 24 + id_, 40, names, length, tuple(instances)))
    return tuple(videos)


@pytest.mark.parametrize("case", CASES)
def test_packed_videos_are_those_that_were_packed(case: str) -> None:
    videos = make(case)
    packed = pack(videos)
    assert tuple(packed) == videos
    assert tuple(pickle.loads(pickle.dumps(packed))) == videos
    assert pack(packed) is packed
    assert tuple(packed.without_instances()) == tuple(replace(video, instances=()) for video in videos)
    assert [type(x) for v in packed for i in v.instances for x in (v.id, i.id, i.is_crowd, i.category_id)] == [
        type(x) for v in videos for i in v.instances for x in (v.id, i.id, i.is_crowd, i.category_id)
    ]


def test_places_are_those_of_a_tuple() -> None:
    videos = make("videos")
    packed = pack(videos)
    assert (packed[3], packed[-1]) == (videos[3], videos[-1])
    assert tuple(packed[4:-2:3]) == videos[4:-2:3]
    for place in (len(videos), -len(videos) - 1):
        with pytest.raises(IndexError):
            packed[place]


def in_categories(videos: Sequence[Video], category_ids: dict[int, int]) -> tuple[Video, ...]:
    found = []
    for video in videos:
        kept = [i for i in video.instances if i.category_id in category_ids]
        if kept or not video.instances:
            instances = tuple(replace(i, category_id=category_ids[i.category_id]) for i in kept)
            found.append(replace(video, instances=instances))
    return tuple(found)


def populated(videos: Sequence[Video]) -> list[list[int]]:
    return [
        [place, frame]
        for place, video in enumerate(videos)
        for frame in range(video.length)
        if any(not i.is_crowd and i.segmentations[frame] is not None for i in video.instances)
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("category_ids", [{}, {1: 7}, {-3: 7, 5: 7, 9: 1}, {-3: 1, 1: 2, 5: 3, 2**40: 4}])
def test_categories_change_and_populated_frames_are_found(case: str, category_ids: dict[int, int]) -> None:
    videos = make(case)
    packed = pack(videos)
    assert packed.populated_frames().tolist() == populated(videos)
    expected, found = in_categories(videos, category_ids), packed.with_categories(category_ids)
    assert tuple(found) == expected
    assert found.populated_frames().tolist() == populated(expected)
    again = {7: 1, 2: 9}
    assert tuple(found.with_categories(again)) == in_categories(expected, again)
    assert found[1:].populated_frames().tolist() == populated(expected[1:])


Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, tiny_dataset: Callable[..., Any]) -> Write:
    """Writes a file of a format."""

    def write_format(kind: str) -> Path:
        tiny = tiny_dataset(absent=[(0, 1, 2), (1, 0, 0)], name=kind)
        content = tiny.content
        if kind == "OVIS":
            for record in content["annotations"][:3]:
                length = len(record["segmentations"])
                record["areas"], record["bboxes"] = (
                    [12.5] + [None] * (length - 1),
                    [[0, 0, 5, 2.5]] + [None] * (length - 1),
                )
                record["occlusion"] = ["no_occlusion", None, "severe_occlusion", None, None, None][:length]
        if kind == "COCO":
            names = [(video["id"], name) for video in content.pop("videos") for name in video["file_names"]]
            content["images"] = [
                {"id": id_, "file_name": name, "height": 24, "width": 40} for id_, (_, name) in enumerate(names, 1)
            ]
            triangle = {"image_id": 2, "category_id": 3, "iscrowd": 0, "segmentation": [[3, 2, 20, 4.5, 12, 15]]}
            content["annotations"] = [{**triangle, "id": 8}, {**triangle, "id": 3, "category_id": 7, "iscrowd": 1}]
        path: Path = tiny.write()
        return path

    return write_format


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Paths of the files that were read as JSON, of which the smallest now counts as large."""
    read: list[Path] = []

    def count(path: Path) -> VideoDataset:
        read.append(path)
        return read_annotations(path)

    monkeypatch.setattr(packed_module, "LARGE", 1)
    monkeypatch.setattr(packed_module, "read_annotations", count)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return read


def copy_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.packed")


def same(found: VideoDataset, expected: VideoDataset) -> bool:
    return found.categories == expected.categories and tuple(found.videos) == expected.videos


@pytest.mark.parametrize("kind", ["YouTube-VIS", "OVIS", "COCO"])
def test_a_file_is_read_once(write: Write, readings: list[Path], kind: str) -> None:
    path = write(kind)
    before = set(path.parent.iterdir())
    for _ in range(3):
        assert same(open_annotations(path), read_annotations(path))
    assert readings == [path]
    assert set(path.parent.iterdir()) - before == {copy_of(path)}  # no lock, nothing unfinished


def test_small_files_have_no_copy(write: Write) -> None:
    path = write("OVIS")
    before = set(path.parent.iterdir())
    assert same(open_annotations(path), read_annotations(path))
    assert set(path.parent.iterdir()) == before


@pytest.mark.parametrize("change", ["time", "size", "version"])
def test_a_changed_file_is_read_anew(
    write: Write, readings: list[Path], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("COCO")
    first, status = open_annotations(path), path.stat()
    text = path.read_text().replace('"seven"', '"SEVEN"' if change == "time" else '"seventy"')
    path.write_text(text)
    changed_ns = status.st_mtime_ns + (1 if change == "time" else 0)
    os.utime(path, ns=(changed_ns, changed_ns))
    if change == "version":
        path.write_text(text.replace('"seventy"', '"SEVEN"'))
        os.utime(path, ns=(changed_ns, changed_ns))
        assert open_annotations(path).categories == first.categories  # nothing says that it is another file
        monkeypatch.setattr(packed_module, "VERSION", packed_module.VERSION + 1)
    for _ in range(2):
        assert same(open_annotations(path), read_annotations(path))
    assert open_annotations(path).categories != first.categories
    assert readings == [path] * 2
    assert len(first.videos[0].file_names) == 1  # what is open stays as it was


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\x93NUMPY something else",
        lambda content: b"\xff" * len(content),
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"0" * 8 + b"[]\n",
        *(
            lambda content, place=place: (
                content[: int(place * len(content))]
                + bytes([content[int(place * len(content))] ^ 1])
                + content[int(place * len(content)) + 1 :]
            )
            for place in (0, 0.05, 0.3, 0.6, 0.999)
        ),
    ],
)
def test_a_damaged_copy_is_written_anew(write: Write, readings: list[Path], damage: Callable[[bytes], bytes]) -> None:
    path = write("OVIS")
    open_annotations(path)
    sound = copy_of(path).read_bytes()
    copy_of(path).write_bytes(damage(sound))
    for _ in range(2):
        assert same(open_annotations(path), read_annotations(path))
    assert readings == [path] * 2
    assert copy_of(path).read_bytes() == sound


def test_what_a_killed_process_left_is_removed(write: Write, readings: list[Path]) -> None:
    path = write("COCO")
    leftover = path.with_name(f".{copy_of(path).name}.12345.tmp")
    leftover.touch()
    open_annotations(path)
    assert not leftover.exists()


def test_the_copy_for_a_folder_that_cannot_be_written_to(
    write: Write, readings: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, other = write("COCO"), write("OVIS")
    monkeypatch.setattr(packed_module.os, "access", lambda *_: False)
    before = set(path.parent.iterdir())
    for _ in range(2):
        for each in (path, other):  # of one name in two folders
            assert same(open_annotations(each), read_annotations(each))
    assert readings == [path, other]
    assert set(path.parent.iterdir()) == before
    assert len(list((tmp_path / "home" / "instanceformer").iterdir())) == 2


def test_no_place_for_a_copy_is_a_warning(
    write: Write, readings: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write("COCO")
    monkeypatch.setattr(packed_module.os, "access", lambda *_: False)
    (tmp_path / "home").touch()
    with pytest.warns(UserWarning, match=r"annotations.json: found no place for a compact copy .* XDG_CACHE_HOME"):
        assert same(open_annotations(path), read_annotations(path))

    def fill(*_: Any) -> None:
        raise OSError("found no space left")

    monkeypatch.undo()
    monkeypatch.setattr(packed_module, "LARGE", 1)
    monkeypatch.setattr(packed_module, "_save", fill)
    with pytest.warns(UserWarning, match="no space left"):
        assert same(open_annotations(path), read_annotations(path))


def test_other_processes_are_told_where_the_copy_is(write: Write, readings: list[Path]) -> None:
    path = write("OVIS")
    dataset = open_annotations(path)
    pickled = pickle.dumps(dataset)
    arrays = dataset.videos.arrays  # type: ignore[attr-defined]
    assert arrays.counts.tobytes() not in pickled
    assert same(pickle.loads(pickled), read_annotations(path))
    content = json.loads(path.read_text())
    content["videos"][0]["file_names"].reverse()
    path.write_text(json.dumps(content))
    os.utime(path, ns=(5, 5))
    open_annotations(path)
    with pytest.raises(ValueError, match=r"\.packed: found the annotations of another file than when this run began"):
        pickle.loads(pickled)
    assert tuple(dataset.videos) != read_annotations(path).videos  # what is mapped stays


def test_checks_look_at_the_file_itself(write: Write, readings: list[Path]) -> None:
    path = write("COCO")
    expected, status = open_annotations(path), path.stat()
    text = path.read_text()
    path.write_text(text.replace('"image_id": 2', '"image_id":99', 1))
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert tuple(open_annotations(path).videos) == tuple(expected.videos)
    (finding,) = check_dataset(path).findings
    assert (finding.kind, finding.count) == ("unknown id", 1)
    assert finding.examples[0].startswith("annotations[0].image_id: expected the id of one of the file's images")


def test_what_is_wrong_with_a_file_is_said_and_not_kept(write: Write, readings: list[Path]) -> None:
    path = write("COCO")
    path.write_text(path.read_text().replace('"image_id": 2', '"image_id": 99'))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"annotations\[0\].image_id: expected the id"):
            open_annotations(path)
    assert not copy_of(path).exists()
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        open_annotations(path.with_name("none.json"))


@pytest.mark.parametrize("clips_per_video", [None, 3])
def test_clips_are_those_of_the_dataset_in_memory(
    write: Write, readings: list[Path], clips_per_video: int | None
) -> None:
    path = write("YouTube-VIS")
    for _ in range(2):
        mapped, eager = (
            ClipDataset(read(path), path.parent / "images", clip_frames=2, clips_per_video=clips_per_video)
            for read in (open_annotations, read_annotations)
        )
        np.testing.assert_array_equal(mapped.items, eager.items)
        assert len(mapped) == (10 if clips_per_video is None else 6)


def test_of_processes_that_begin_at_once_one_reads(write: Write, tmp_path: Path) -> None:
    path = write("COCO")
    barrier = processes.CONTEXT.Barrier(3)
    outputs = [tmp_path / f"{number}.json" for number in range(3)]
    started = [
        processes.CONTEXT.Process(target=_open_and_count, args=(path, barrier, output))  # type: ignore[attr-defined]
        for output in outputs
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        assert process.exitcode == 0
    found = [json.loads(output.read_text()) for output in outputs]
    assert sorted(count for count, _ in found) == [0, 0, 1]
    assert all(ids == [video.id for video in read_annotations(path).videos] for _, ids in found)
    assert not list(path.parent.glob(".*.lock"))


def _open_and_count(path: Path, barrier: Barrier, output: Path) -> None:
    count = 0

    def read(path: Path) -> VideoDataset:
        nonlocal count
        count += 1
        return read_annotations(path)

    packed_module.LARGE, packed_module.read_annotations = 1, read  # type: ignore[assignment]
    barrier.wait()
    dataset = open_annotations(path)
    output.write_text(json.dumps([count, [video.id for video in dataset.videos]]))
