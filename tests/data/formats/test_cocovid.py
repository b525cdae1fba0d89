from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from tests.data.formats.conftest import (
    HEIGHT,
    WIDTH,
    MakeDataset,
    assert_same_masks,
    cocovid,
    masks_of,
    round_trip,
    write_json,
)

from instanceformer.data.annotations import Instance, Video
from instanceformer.data.formats.cocovid import import_cocovid
from instanceformer.data.formats.records import with_unique_ids


@pytest.mark.parametrize("videos", [True, False])
@pytest.mark.parametrize(
    "identity",
    [
        lambda v, i: {"instance_id": 5 + 2 * v + i},
        lambda v, i: {"track_id": 5 + 2 * v + i},
        lambda v, i: {"attributes": {"track_id": 5 + 2 * v + i, "occluded": False}, "iscrowd": 1},
    ],
    ids=["instance_id", "track_id", "CVAT"],
)
def test_cocovid_keeps_masks_ids_and_order(
    tiny_dataset: MakeDataset, tmp_path: Path, identity: Callable[[int, int], dict[str, Any]], videos: bool
) -> None:
    made = tiny_dataset(absent=[(0, 0, 0), (0, 0, 3), (1, 1, 2)])
    dataset = import_cocovid(write_json(tmp_path / "coco.json", cocovid(made, identity, videos)))
    content = round_trip(dataset, tmp_path / "out" / "out.json")
    assert_same_masks(dataset, made)
    assert [annotation["id"] for annotation in content["annotations"]] == [5, 6, 7, 8]
    assert [video["file_names"] for video in content["videos"]] == [v["file_names"] for v in made.content["videos"]]
    assert [video["id"] for video in content["videos"]] == [1, 2]
    assert not any(annotation["iscrowd"] for annotation in content["annotations"])
    assert [annotation["category_id"] for annotation in content["annotations"]] == [3, 7, 3, 7]


def test_cocovid_ids_that_videos_share_get_the_video_s_in_front(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    content = cocovid(tiny_dataset(), lambda v, i: {"track_id": 11 * i})
    dataset = import_cocovid(write_json(tmp_path / "coco.json", content))
    assert [instance.id for video in dataset.videos for instance in video.instances] == [100, 111, 200, 211]


def test_written_boxes_areas_and_nulls_belong_to_the_masks(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(3,), instances=2, absent=[(0, 0, 1)])
    path = write_json(tmp_path / "coco.json", cocovid(made, lambda v, i: {"instance_id": i}))
    annotation = round_trip(import_cocovid(path), tmp_path / "out" / "out.json")["annotations"][0]
    assert annotation["bboxes"] == [[3, 2, 12, 6], None, [5, 2, 12, 6]]
    assert annotation["areas"] == [72, None, 72]
    assert annotation["segmentations"][1] is None
    assert (annotation["height"], annotation["width"], annotation["length"]) == (HEIGHT, WIDTH, 3)


def test_cocovid_takes_polygons_and_run_lengths_of_both_kinds(tmp_path: Path) -> None:
    box = np.zeros((HEIGHT, WIDTH), dtype=bool)
    box[4:10, 8:20] = True
    flat = box.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    code = mask_utils.encode(np.asfortranarray(box, dtype=np.uint8))
    forms = [
        [[8, 4, 20, 4, 20, 10, 8, 10]],
        [[8, 4, 12, 4, 12, 10, 8, 10], [12, 4, 20, 4, 20, 10, 12, 10]],
        {"size": [HEIGHT, WIDTH], "counts": runs},
        {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()},
    ]
    size = {"height": HEIGHT, "width": WIDTH}
    content = {
        "categories": [{"id": 1, "name": "box"}],
        "images": [{"id": t, "file_name": f"frame_{t}.jpg", **size} for t in range(7, 12)],
        "annotations": [
            {"id": t, "image_id": t, "category_id": 1, "track_id": 0, "segmentation": form}
            for t, form in enumerate(forms, 7)
        ],
    }
    dataset = import_cocovid(write_json(tmp_path / "coco.json", content))
    (video,) = dataset.videos
    assert video.file_names == tuple(f"frame_{t}.jpg" for t in range(7, 12))  # 10 after 9
    np.testing.assert_array_equal(masks_of(video, 0), np.stack([box] * 4 + [np.zeros_like(box)]))


def test_cocovid_frames_without_annotations_and_tracks_without_pixels(
    tiny_dataset: MakeDataset, tmp_path: Path
) -> None:
    content = cocovid(tiny_dataset(), lambda v, i: {"instance_id": 10 * v + i})
    for annotation in content["annotations"]:
        if annotation["instance_id"] == 1:
            annotation["segmentation"] = []
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] < 1000]
    dataset = import_cocovid(write_json(tmp_path / "coco.json", content))
    assert [[instance.id for instance in video.instances] for video in dataset.videos] == [[0], []]
    assert [video.length for video in dataset.videos] == [6, 4]


def test_cocovid_crowds_stay_crowds(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    content = cocovid(tiny_dataset(), lambda v, i: {"instance_id": 10 * v + i, "iscrowd": i})
    dataset = import_cocovid(write_json(tmp_path / "coco.json", content))
    written = round_trip(dataset, tmp_path / "out" / "out.json")
    assert [annotation["iscrowd"] for annotation in written["annotations"]] == [0, 1, 0, 1]


def test_genuine_cocovid_excerpt(shared: Path, tmp_path: Path) -> None:
    path = shared / "real" / "formats" / "ytvis2019_0043f083b5_1frame_cocovid.json"
    dataset = import_cocovid(path)
    (annotation,) = round_trip(dataset, tmp_path / "out" / "out.json")["annotations"]
    (original,) = json.loads(path.read_text())["annotations"]
    assert annotation["id"] == original["instance_id"]
    assert annotation["bboxes"] == [original["bbox"]]
    runs = original["segmentation"]["counts"]
    assert annotation["areas"] == [sum(runs[1::2])]
    flat = np.repeat(np.arange(len(runs)) % 2, runs).astype(bool)
    np.testing.assert_array_equal(masks_of(dataset.videos[0], 0)[0], flat.reshape(1280, 720).T)


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.pop(key)


@pytest.mark.parametrize(
    ("key", "index", "change", "message"),
    [
        ("images", 3, drop("file_name"), r"images\[3\]\.file_name: expected a string, found nothing"),
        ("images", 3, {"id": 1001}, r"images\[3\]\.id: expected an id of its own, found 1001"),
        ("images", 3, drop("id"), r"images\[3\]\.id: expected a whole number"),
        ("images", 3, {"video_id": 9}, r"images\[3\]\.video_id: expected the id of one of the file's videos, found 9"),
        ("images", 3, {"frame_id": 1}, r"images\[[23]\]: expected a frame of its own.* found that of images\[[23]\]"),
        ("images", 3, {"height": 25}, r"images\[\d\]: expected 2[45]x40 pixels, as images\[\d\] of the same video, f"),
        ("images", 3, drop("width"), r"images\[3\]\.width: expected a whole number"),
        ("videos", 1, {"id": 1}, r"videos\[1\]\.id: expected an id of its own"),
        ("annotations", 2, {"image_id": 77}, r"annotations\[2\]\.image_id: expected the id of one of .* found 77"),
        ("annotations", 2, {"video_id": 2}, r"annotations\[2\]\.video_id: expected 1, the video of its image, found 2"),
        ("annotations", 2, {"category_id": 4}, r"annotations\[2\]\.category_id: expected the id of one of .* found 4"),
        (
            "annotations",
            2,
            {"category_id": 7},
            r"annotations\[2\]: expected category 3 .* annotations\[0\], found c.* 7",
        ),
        (
            "annotations",
            2,
            {"iscrowd": 1},
            r"annotations\[2\]: expected .*iscrowd 0.* as in annotations\[0\], found .*1",
        ),
        ("annotations", 2, {"iscrowd": "no"}, r"annotations\[2\]\.iscrowd: expected 0 or 1, found \"no\""),
        (
            "annotations",
            2,
            {"image_id": 0},
            r"annotations\[2\]: expected one annotation .* 0 in image 0, .*--merge_parts",
        ),
        ("images", 3, {"id": 2**63}, r"images\[3\]\.id: expected a whole number of at most 64 bits, found 9223"),
        ("annotations", 2, {"instance_id": 10**1000}, r"annotations\[2\]\.instance_id: expected .*64 bits, found 1000"),
        ("annotations", 2, {"instance_id": -1}, r"annotations\[2\]\.instance_id: expected zero or more, found -1"),
        ("annotations", 2, drop("instance_id"), r"annotations\[2\]: expected instance_id, track_id or attributes\."),
        (
            "annotations",
            2,
            {"attributes": {"track_id": "a"}},
            r"annotations\[2\]\.attributes\.track_id: expected a whole",
        ),
        ("annotations", 2, {"segmentation": "abc"}, r"annotations\[2\]\..*expected a run-length mask, a list of poly"),
        ("annotations", 2, {"segmentation": [[1, 2, 3]]}, r"annotations\[2\]\..*expected polygons"),
        ("annotations", 2, {"segmentation": {"size": [40, 24], "counts": [960]}}, r"annotations\[2\]\..*\[24, 40\]"),
        (
            "annotations",
            2,
            {"segmentation": [], "bbox": [1, 2, 3, 4]},
            r"annotations\[2\]\.segmentation: expected poly",
        ),
    ],
)
def test_cocovid_refuses(
    tiny_dataset: MakeDataset, tmp_path: Path, key: str, index: int, change: Any, message: str
) -> None:
    content = cocovid(tiny_dataset(), lambda v, i: {"instance_id": 10 * v + i})
    record = content[key][index]
    if callable(change):
        change(record)
    else:
        record.update(change)
    path = write_json(tmp_path / "coco.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        import_cocovid(path)
    assert str(caught.value).startswith(f"{path}: ")


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([1e300, float("nan"), float("inf"), 2**70]),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-1, 5), st.floats(), st.none()), max_size=3),
    st.dictionaries(st.sampled_from(["counts", "size", "track_id"]), st.integers(-1, 5), max_size=2),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_malformed_cocovid_gives_a_message_or_a_sound_dataset(tmp_path: Path, data: st.DataObject) -> None:
    code = mask_utils.encode(np.asfortranarray(np.eye(4, 6, dtype=np.uint8)))
    record = {"category_id": 1, "iscrowd": 0, "bbox": [0, 0, 4, 4]}
    masks = [
        [[0, 0, 4, 0, 4, 4]],
        {"size": [4, 6], "counts": [2, 22]},
        {"size": [4, 6], "counts": code["counts"].decode()},
    ]
    content: dict[str, Any] = {
        "categories": [{"id": 1, "name": "one"}],
        "videos": [{"id": 1, "height": 4, "width": 6}],
        "images": [
            {"id": t, "file_name": f"a/{t}.jpg", "height": 4, "width": 6, "video_id": 1, "frame_id": t}
            for t in range(3)
        ],
        "annotations": [
            {"id": t, "image_id": t, "segmentation": mask, **record, "instance_id": 2} for t, mask in enumerate(masks)
        ],
    }
    owner: Any = content[data.draw(st.sampled_from(list(content)))]
    while isinstance(owner, (list, dict)) and owner:
        key = data.draw(st.sampled_from(range(len(owner)) if isinstance(owner, list) else list(owner)))
        if not isinstance(owner[key], (list, dict)) or data.draw(st.booleans()):
            owner[key] = data.draw(WRONG)
            break
        owner = owner[key]
    path = write_json(tmp_path / "coco.json", content)
    try:
        dataset = import_cocovid(path)
    except ValueError as error:
        message = str(error)
    else:
        round_trip(dataset, tmp_path / "out" / "out.json")
        message = f"{path}: "
    assert message.startswith(f"{path}: ")


def test_cocovid_merges_the_parts_of_an_instance_where_it_is_told_to(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(3,), absent=[(0, 0, 1)])
    content = cocovid(made, lambda v, i: {"instance_id": i})
    content["annotations"] += [
        {**content["annotations"][0], "id": 100, "segmentation": [[30, 12, 36, 12, 36, 20, 30, 20]]},
        {**content["annotations"][0], "id": 101, "segmentation": []},  # a part without a pixel
    ]
    made.masks[1][0, 12:20, 30:36] = True
    path = write_json(tmp_path / "coco.json", content)
    with pytest.raises(ValueError, match=r"annotations\[5\]: expected .*, found annotations\[0\] too; .*--merge_parts"):
        import_cocovid(path)
    assert_same_masks(import_cocovid(path, merge_parts=True), made)


def test_cocovid_says_that_several_videos_have_frames_of_the_same_names(
    tiny_dataset: MakeDataset, tmp_path: Path
) -> None:
    made = tiny_dataset(lengths=(3, 3))
    for videos in (True, False):
        content = cocovid(made, lambda v, i: {"instance_id": i}, videos)
        for image in content["images"]:
            image["file_name"] = Path(image["file_name"]).name
        path = write_json(tmp_path / "coco.json", content)
        if videos:  # of which each has its own, but they are read from the same files
            with pytest.warns(
                UserWarning, match=r"found 3 file names of several images, such as \"0000.\.jpg\"; .*folder"
            ):
                import_cocovid(path)
        else:
            message = (
                r"images\[3\]\.file_name: .*, the name of images\[0\] too; .*CVAT project, export each video by it"
            )
            with pytest.raises(ValueError, match=message):
                import_cocovid(path)


def test_cocovid_leaves_out_polygons_of_two_points(tmp_path: Path) -> None:
    square = [8, 4, 20, 4, 20, 10, 8, 10]
    content = {
        "categories": [{"id": 1, "name": "box"}],
        "images": [{"id": t, "file_name": f"{t}.jpg", "height": HEIGHT, "width": WIDTH} for t in range(2)],
        "annotations": [
            {"id": t, "image_id": t, "category_id": 1, "track_id": 0, "segmentation": polygons}
            for t, polygons in enumerate([[square], [[1, 1, 5, 5], square, []]])
        ],
    }
    path = write_json(tmp_path / "coco.json", content)
    with pytest.warns(
        UserWarning, match=r"coco\.json: annotations\[1\]\.segmentation: expected .*three points or more"
    ):
        (video,) = import_cocovid(path).videos
    assert video.instances[0].segmentations[0] == video.instances[0].segmentations[1] is not None
    content["annotations"][1]["segmentation"] = [[1, 1, 5, 5]]  # and nothing else
    with pytest.raises(ValueError, match=r"annotations\[1\]\.segmentation: expected polygons"):
        import_cocovid(write_json(path, content))


def test_ids_that_would_become_too_long_are_numbered_anew() -> None:
    videos = [
        Video(id_, HEIGHT, WIDTH, (), 1, tuple(Instance(each, 1, False, (None,)) for each in (3, 2**60)))
        for id_ in (5, 2**62)
    ]
    assert [each.id for video in with_unique_ids(videos) for each in video.instances] == [1, 2, 3, 4]


def test_cocovid_refuses_a_video_without_images(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    content = cocovid(tiny_dataset(), lambda v, i: {"instance_id": 10 * v + i})
    content["videos"].append({"id": 3, "name": "lost"})
    with pytest.raises(ValueError, match=r"videos\[2\]: expected an image or more of this video_id, found none"):
        import_cocovid(write_json(tmp_path / "coco.json", content))


@pytest.mark.parametrize("text", ["", "[]", "3", '{"images": []}', '{"categories": [{"id": 1, "name": "a"}]}'])
def test_cocovid_refuses_what_is_not_coco(tmp_path: Path, text: str) -> None:
    path = tmp_path / "coco.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"coco\.json: "):
        import_cocovid(path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        import_cocovid(tmp_path / "none.json")


def test_sizes_of_images_come_from_their_video_where_they_have_none(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    content = cocovid(tiny_dataset(), lambda v, i: {"instance_id": 10 * v + i})
    for image in content["images"]:
        del image["height"], image["width"]
    for video in content["videos"]:
        video.update(height=HEIGHT, width=WIDTH)
    dataset = import_cocovid(write_json(tmp_path / "coco.json", content))
    assert [(video.height, video.width) for video in dataset.videos] == [(HEIGHT, WIDTH)] * 2
