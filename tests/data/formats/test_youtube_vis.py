from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from instanceformer.data.annotations import Category, VideoDataset
from instanceformer.data.formats.records import Problem
from instanceformer.data.formats.youtube_vis import parse_annotations, read_annotations, track_fields


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths column by column, beginning with a run of zeros that may have no pixel."""
    pixels = mask.astype(int).ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, pixels.size]).tolist()}


def test_reads_videos_instances_and_masks(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(6, 4), absent=[(0, 1, 2)])
    dataset = read_annotations(tiny.annotations)

    assert [video.length for video in dataset.videos] == [6, 4]
    first = dataset.videos[0]
    assert (first.id, first.height, first.width, first.file_names[5]) == (1, 24, 40, "v0/00005.jpg")
    assert [instance.id for instance in first.instances] == [1, 2]
    assert first.instances[1].segmentations[2] is None

    masks = first.decode_masks(first.instances, [1, 2, 5])
    assert masks.shape == (3, 2, 24, 40)
    for i, instance in enumerate(first.instances):
        assert np.array_equal(masks[:, i].numpy(), tiny.masks[instance.id][[1, 2, 5]])


def test_class_indices_follow_ascending_category_ids(tiny_dataset: Callable[..., Any]) -> None:
    dataset = read_annotations(tiny_dataset().annotations)  # the file has 7 before 3
    assert dataset.categories == (Category(3, "three"), Category(7, "seven"))
    assert [dataset.class_of(3), dataset.class_of(7)] == [0, 1]
    assert [category.id for category in dataset.categories] == [3, 7]
    assert dataset.num_classes == 2


def test_categories_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ascending order of unique ids, found \[3, 3\]"):
        VideoDataset((Category(3, "a"), Category(3, "b")), ())


@pytest.mark.parametrize("form", ["compressed", "uncompressed", "polygons", "float size"])
def test_all_forms_of_a_mask_are_the_same(tiny_dataset: Callable[..., Any], form: str) -> None:
    tiny = tiny_dataset(lengths=(3,), instances=1)
    for record in tiny.content["annotations"]:
        masks = tiny.masks[record["id"]]
        if form == "uncompressed":
            record["segmentations"] = [uncompressed(mask) for mask in masks]
        elif form == "polygons":  # the rectangle in two halves
            record["segmentations"] = [
                [[x, 2, x + 12, 2, x + 12, 5, x, 5], [x, 5, x + 12, 5, x + 12, 8, x, 8]] for x in range(3, 6)
            ]
        elif form == "float size":
            for video in tiny.content["videos"]:
                video["height"], video["width"] = 24.0, 40.0
            for segmentation in record["segmentations"]:
                segmentation["size"] = [24.0, 40.0]
    video = read_annotations(tiny.write()).videos[0]
    assert np.array_equal(video.decode_masks(video.instances, range(3))[:, 0].numpy(), tiny.masks[1])


@pytest.mark.parametrize("fragment", [[1, 1, 5, 5], [1.5, 1], []])
def test_polygons_of_fewer_than_three_points_are_left_out(
    tiny_dataset: Callable[..., Any], fragment: list[float]
) -> None:
    tiny = tiny_dataset(lengths=(3,), instances=1)
    (record,) = tiny.content["annotations"]
    square = [3, 2, 15, 2, 15, 8, 3, 8]
    record["segmentations"][0] = [fragment, square]
    with pytest.warns(UserWarning, match=r"\.json: annotations\[0\]\.segmentations\[0\]: expected .* 1 mask\(s\)"):
        video = read_annotations(tiny.write()).videos[0]
    assert np.array_equal(video.decode_masks(video.instances, range(3))[:, 0].numpy(), tiny.masks[1])
    record["segmentations"][0] = [fragment]
    with pytest.raises(ValueError, match=r"segmentations\[0\]: expected polygons"):
        read_annotations(tiny.write())
    record["segmentations"][0] = [[1, 1, 5], square]  # with a coordinate missing
    with pytest.raises(ValueError, match=r"segmentations\[0\]: expected polygons"):
        read_annotations(tiny.write())


@pytest.mark.parametrize(
    "empty",
    [
        None,
        [],
        {},
        {"size": [24, 40], "counts": ""},
        {"size": [24, 40], "counts": []},
        {"size": [24, 40], "counts": [960]},
        {"size": [24, 40], "counts": mask_utils.encode(np.zeros((24, 40), np.uint8, "F"))["counts"].decode()},
    ],
)
def test_every_empty_segmentation_means_not_visible(tiny_dataset: Callable[..., Any], empty: Any) -> None:
    tiny = tiny_dataset()
    tiny.content["annotations"][0]["segmentations"][1] = empty
    video = read_annotations(tiny.write()).videos[0]
    assert video.instances[0].segmentations[1] is None
    assert not video.decode_masks(video.instances[:1], [1]).any()
    assert video.decode_masks(video.instances[:1], [0]).any()


def test_lengths_are_ignored_and_missing_fields_have_their_defaults(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    expected = read_annotations(tiny.annotations)
    for record in tiny.content["annotations"]:
        record["length"] = 1  # as in OVIS
        del record["iscrowd"]
    for record in tiny.content["videos"]:
        del record["length"]
    assert read_annotations(tiny.write()) == expected


def test_a_video_may_only_say_how_many_frames_it_has(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(6, 4))
    for record in tiny.content["videos"]:
        del record["file_names"]
    assert [(video.length, video.file_names) for video in read_annotations(tiny.write()).videos] == [(6, ()), (4, ())]


def test_areas_and_occlusion_are_kept(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset(lengths=(3,), instances=2)
    first, second = tiny.content["annotations"]
    first["areas"], first["bboxes"] = [8.5, None, 6], [[0, 0, 4.25, 2], None, [1, 1, 2, 3]]
    first["occlusion"] = ["no_occlusion", None, "severe_occlusion"]
    second["areas"], second["bboxes"] = [8, 8, 9], [[0, 0, 4, 2]] * 3
    one, two = read_annotations(tiny.write()).videos[0].instances
    assert (one.areas, one.has_box_areas, two.has_box_areas) == ((8.5, 0.0, 6.0), True, False)
    assert (one.occlusion, two.occlusion) == (("no_occlusion", None, "severe_occlusion"), None)


def test_crowds_are_marked(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    tiny.content["annotations"][1]["iscrowd"] = 1
    assert [i.is_crowd for i in read_annotations(tiny.write()).videos[0].instances] == [False, True]


@pytest.mark.parametrize("annotations", ["missing", None, []])
def test_file_without_annotations(tiny_dataset: Callable[..., Any], annotations: Any) -> None:
    tiny = tiny_dataset()
    assert read_annotations(tiny.annotations).is_annotated
    tiny.content["annotations"] = annotations
    if annotations == "missing":
        del tiny.content["annotations"]
    dataset = read_annotations(tiny.write())
    assert len(dataset.videos) == 2
    assert not dataset.is_annotated


def set_value(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("videos", value=[]), r"videos: expected a list .* found \[\]"),
        (set_value("categories", value=None), r"categories: expected a list .* found nothing"),
        (set_value("annotations", value=1), r"annotations: expected a list of objects .* found 1"),
        (set_value("annotations", 2, value=7), r"annotations\[2\]: expected an object, found 7"),
        (set_value("videos", 1, "file_names", value=[]), r"videos\[1\]\.file_names: expected .*`images`"),
        (set_value("videos", 1, "height", value=24.5), r"videos\[1\]\.height: expected a whole number .*, found 24\.5"),
        (set_value("videos", 0, "width", value=0), r"videos\[0\]: expected positive sizes .* width 0"),
        (set_value("videos", 1, "id", value=1), r"videos\[1\]\.id: expected an id of its own, found 1, .*videos\[0\]"),
        (set_value("categories", 1, "id", value=7), r"categories\[1\]\.id: expected an id of its own"),
        (set_value("categories", 1, "name", value=7), r"categories\[1\]\.name: expected a string, found 7"),
        (set_value("annotations", 2, "id", value=1), r"annotations\[2\]\.id: expected an id of its own"),
        (
            set_value("annotations", 2, "id", value=None),
            r"annotations\[2\]\.id: expected a whole number of at most 64 bits, found nothing",
        ),
        (set_value("annotations", 2, "video_id", value=9), r"annotations\[2\]\.video_id: .* videos, found 9"),
        (set_value("annotations", 2, "category_id", value=1), r"annotations\[2\]\.category_id: .* categories, found 1"),
        (
            set_value("annotations", 2, "segmentations", value=[None]),
            r"annotations\[2\]\.segmentations: expected 4 entries, .* found 1",
        ),
        (
            set_value("annotations", 2, "segmentations", 1, "size", value=[40, 24]),
            r"annotations\[2\]\.segmentations\[1\]\.size: expected \[24, 40\], .*, found \[40, 24\]",
        ),
        (
            set_value("annotations", 2, "segmentations", 1, "counts", value=[5, 5]),
            r"\[1\]\.counts: expected .*960, .*10 p",
        ),
        (
            set_value("annotations", 2, "segmentations", 1, "counts", value=[-1, 961]),
            r"\[1\]\.counts: .*found \[-1, 961\]",
        ),
        (set_value("annotations", 2, "segmentations", 1, value=[[1, 2, 3]]), r"segmentations\[1\]: expected polygons"),
        (
            set_value("annotations", 2, "areas", value=[1, 2]),
            r"annotations\[2\]\.areas: expected 4 entries, .* found 2",
        ),
        (set_value("annotations", 2, "areas", value=[1, 2, 3, -4]), r"annotations\[2\]\.areas: expected an area"),
        (set_value("annotations", 2, "occlusion", value=[1] * 4), r"annotations\[2\]\.occlusion: expected a string"),
        (set_value("annotations", 2, "iscrowd", value="yes"), r"annotations\[2\]\.iscrowd: expected 0 or 1"),
        (set_value("videos", 1, "height", value=2**30), r"videos\[1\]: expected .* 536870911 pixels at most"),
        (
            set_value("annotations", 2, "segmentations", 1, value=[[0, 0, 9, 0, 1e9, 9]]),
            r"segmentations\[1\]: expected polygons .* in or near the frame",
        ),
        (
            set_value("annotations", 2, "segmentations", 1, value="abc"),
            r"segmentations\[1\]: .*run-length.*found \"abc\"",
        ),
    ],
)
def test_errors_name_file_place_expected_and_found(
    tiny_dataset: Callable[..., Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    tiny = tiny_dataset()
    change(tiny.content)
    path = tiny.write()
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def test_damaged_run_lengths_are_refused_and_placed(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    segmentation = tiny.content["annotations"][1]["segmentations"][3]
    segmentation["counts"] = segmentation["counts"][:-1]
    path = tiny.write()
    with pytest.raises(
        ValueError, match=r"annotations\[1\]\.segmentations\[3\]\.counts: .*24x40.* a damaged str"
    ) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def many_annotations() -> dict[str, Any]:
    """200 annotations of two videos in turn, of one frame and of twenty and unlike in size, each with its own mask."""
    generator, annotations = np.random.default_rng(0), []
    for index in range(200):
        length, size = ((1, [24, 40]), (20, [30, 36]))[index % 2]
        code = mask_utils.encode(np.asfortranarray(generator.integers(2, size=size, dtype=np.uint8)))
        segmentation = {"size": size, "counts": code["counts"].decode()}
        record = {"id": index + 1, "video_id": length, "category_id": 3, "segmentations": [segmentation] * length}
        annotations.append(record)
    return {
        "categories": [{"id": 3, "name": "three"}],
        "videos": [
            {"id": 1, "height": 24, "width": 40, "length": 1},
            {"id": 20, "height": 30, "width": 36, "length": 20},
        ],
        "annotations": annotations,
    }


def test_many_annotations_are_all_read_in_their_order() -> None:
    content = many_annotations()
    for video in parse_annotations(content, "many").videos:
        assert [(instance.id, instance.segmentations) for instance in video.instances] == [
            (record["id"], tuple(segmentation["counts"].encode() for segmentation in record["segmentations"]))
            for record in content["annotations"]
            if record["video_id"] == video.id
        ]


@pytest.mark.parametrize("index", [0, 100, 197, 199])
def test_of_many_annotations_the_damaged_one_is_named_and_left_out(index: int) -> None:
    content = many_annotations()
    segmentations = content["annotations"][index]["segmentations"]
    segmentations[-1] = {**segmentations[-1], "counts": "1"}
    problems: list[Problem] = []
    dataset = parse_annotations(content, "many", problems)
    ids = sorted(instance.id for video in dataset.videos for instance in video.instances)
    assert ids == [id_ for id_ in range(1, 201) if id_ != index + 1]
    frame = len(segmentations) - 1
    assert [problem.location for problem in problems] == [f"annotations[{index}].segmentations[{frame}].counts"]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        read_annotations(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"videos": [')
    with pytest.raises(ValueError, match=r"cut\.json: not valid JSON"):
        read_annotations(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json: expected an object with .* \(is it a result file"):
        read_annotations(tmp_path / "list.json")


@pytest.mark.parametrize("name", ["train", "valid"])
def test_davis_masks_have_the_size_and_area_of_the_file(shared: Path, name: str) -> None:
    path = shared / "real" / "davis-mini" / f"{name}.json"
    dataset = read_annotations(path)
    areas = {record["id"]: record["areas"] for record in json.loads(path.read_text())["annotations"]}
    assert len(dataset.videos) == 13
    assert dataset.num_classes == 7
    for video in dataset.videos:
        masks = video.decode_masks(video.instances, range(video.length))
        assert masks.shape == (video.length, len(video.instances), 240, 427)
        for i, instance in enumerate(video.instances):
            assert masks[:, i].sum((1, 2)).tolist() == [area or 0 for area in areas[instance.id]]


def test_genuine_excerpts(shared: Path) -> None:
    dataset = read_annotations(shared / "real" / "formats" / "ovis_85aa3b0e_3frames.json")
    (video,) = dataset.videos
    assert (video.length, video.height, video.width, len(video.instances)) == (3, 886, 1920, 10)
    assert dataset.num_classes == 25
    with pytest.raises(ValueError, match=r"videos\[0\]\.file_names: .*`images`"):
        read_annotations(shared / "real" / "formats" / "ytvis2019_0043f083b5_1frame_cocovid.json")


def test_a_track_may_be_visible_in_more_than_255_frames() -> None:
    mask = np.eye(4, 6, dtype=np.uint8, order="F")
    fields = track_fields([bytes(mask_utils.encode(mask)["counts"]), None] * 300, 4, 6)
    assert fields["areas"] == [4, None] * 300
    assert fields["bboxes"] == [[0, 0, 4, 4], None] * 300
