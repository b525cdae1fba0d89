from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as mask_utils
from tests.data.conftest import TinyDataset

from instanceformer.cli import main
from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.importers import import_binary_masks, import_cocovid, import_davis, import_mots
from instanceformer.data.importers.identities import with_unique_ids
from instanceformer.data.reading import read_annotations
from instanceformer.data.writing import write_youtube_vis

MakeDataset = Callable[..., TinyDataset]
HEIGHT, WIDTH = 24, 40  # of the tiny dataset


def save(path: Path, labels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def save_palette(path: Path, labels: NDArray[np.uint8]) -> None:
    image = Image.fromarray(labels, mode="P")
    image.putpalette([value for index in range(256) for value in (index * 77 % 256, 255 - index, index)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def labels_of(masks: Sequence[NDArray[np.bool_]], values: Sequence[int], dtype: type = np.uint8) -> NDArray[Any]:
    labels = np.zeros(masks[0].shape, dtype=dtype)
    for mask, value in zip(masks, values, strict=True):
        labels[mask] = value
    return labels


def write_davis(made: TinyDataset, folder: Path, values: Sequence[int] = (1, 2), dtype: type = np.uint8) -> Path:
    """Label images of a tiny dataset with two instances in every video."""
    for v, video in enumerate(made.content["videos"]):
        for t, name in enumerate(video["file_names"]):
            masks = [made.masks[2 * v + 1][t], made.masks[2 * v + 2][t]]
            write = save_palette if dtype == np.uint8 else save
            write((folder / name).with_suffix(".png"), labels_of(masks, values, dtype))
    return folder


def round_trip(dataset: VideoDataset, path: Path) -> dict[str, Any]:
    """Write a dataset, assert that it is read back as it was, and return the file's content."""
    write_youtube_vis(path, dataset)
    assert [each.name for each in path.parent.iterdir() if each.suffix != ".png"] == [path.name]  # nothing temporary
    read = read_annotations(path)
    assert read.categories == dataset.categories
    for video, before in zip(read.videos, dataset.videos, strict=True):
        assert (video.id, video.height, video.width, video.file_names) == (
            before.id,
            before.height,
            before.width,
            before.file_names,
        )
        for instance, original in zip(video.instances, before.instances, strict=True):
            assert (instance.id, instance.category_id, instance.is_crowd, instance.segmentations) == (
                original.id,
                original.category_id,
                original.is_crowd,
                original.segmentations,
            )
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def masks_of(video: Video, index: int) -> NDArray[np.bool_]:
    return video.decode_masks([video.instances[index]], range(video.length))[:, 0].numpy().astype(bool)


def assert_same_masks(dataset: VideoDataset, made: TinyDataset) -> None:
    """The tiny dataset's instances of all videos, in its order."""
    masks = [masks_of(video, index) for video in dataset.videos for index in range(len(video.instances))]
    for mask, expected in zip(masks, made.masks.values(), strict=True):
        np.testing.assert_array_equal(mask, expected)


# --- COCO ------------------------------------------------------------------------------------------------------------


def cocovid(made: TinyDataset, identity: Callable[[int, int], dict[str, Any]], videos: bool = True) -> dict[str, Any]:
    """A tiny dataset as CocoVID; `identity` gives the fields that name instance i of video v. Images in odd order."""
    content: dict[str, Any] = {"categories": made.content["categories"], "images": [], "annotations": []}
    if videos:
        content["videos"] = [{"id": video["id"], "name": f"v{v}"} for v, video in enumerate(made.content["videos"])]
    for v, video in enumerate(made.content["videos"]):
        for t, file_name in enumerate(video["file_names"]):
            image = {"id": 1000 * v + t, "file_name": file_name, "height": HEIGHT, "width": WIDTH}
            content["images"].insert(0, {**image, "video_id": video["id"], "frame_id": t} if videos else image)
            for i, annotation in enumerate(made.content["annotations"][2 * v : 2 * v + 2]):
                segmentation = annotation["segmentations"][t]
                if segmentation is not None:
                    record = {"id": len(content["annotations"]), "image_id": image["id"], "segmentation": segmentation}
                    record |= {"category_id": annotation["category_id"], "iscrowd": 0, **identity(v, i)}
                    content["annotations"].append(record)
    return content


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


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


# --- label images ----------------------------------------------------------------------------------------------------


def test_davis_keeps_masks(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(absent=[(0, 0, 0), (0, 0, 3), (1, 1, 2)])
    labels = write_davis(made, tmp_path / "labels", values=(3, 12))
    dataset = import_davis(labels, made.images)
    content = round_trip(dataset, tmp_path / "out" / "out.json")
    assert_same_masks(dataset, made)
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert [annotation["id"] for annotation in content["annotations"]] == [103, 112, 203, 212]
    assert [video["file_names"] for video in content["videos"]] == [v["file_names"] for v in made.content["videos"]]


def test_davis_of_one_video_keeps_the_numbers(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2,))
    dataset = import_davis(write_davis(made, tmp_path / "labels", values=(9, 4)), made.images)
    assert [instance.id for instance in dataset.videos[0].instances] == [4, 9]
    np.testing.assert_array_equal(masks_of(dataset.videos[0], 1), made.masks[1])


def test_davis_ignores_255(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2,))
    dataset = import_davis(write_davis(made, tmp_path / "labels", values=(255, 2)), made.images)
    assert [instance.id for instance in dataset.videos[0].instances] == [2]
    with pytest.raises(ValueError, match=r"v0: expected the numbers of instances.*binary masks"):
        import_davis(write_davis(made, tmp_path / "binary", values=(255, 0)), made.images)


def disc(blur: float, value: int = 255, scale: int = 1) -> Image.Image:
    image = Image.new("L", (120 * scale, 80 * scale))
    ImageDraw.Draw(image).ellipse([20 * scale, 10 * scale, 80 * scale, 70 * scale], fill=value)
    return image.filter(ImageFilter.GaussianBlur(blur)).resize((120, 80), Image.Resampling.BOX)


def save_video(folder: Path, labels: Sequence[Image.Image]) -> None:
    """Write label images, and black frames of their size."""
    for t, image in enumerate(labels):
        for path in (folder / f"labels/v/{t}.png", folder / f"images/v/{t}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"labels/v/{t}.png")
        Image.new("RGB", image.size).save(folder / f"images/v/{t}.png")


@pytest.mark.parametrize(("blur", "value", "scale"), [(1, 255, 1), (3, 255, 1), (3, 40, 1), (0, 255, 4)])
@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_shades_of_blurred_and_anti_aliased_edges_are_no_instances(
    tmp_path: Path, mode: str, blur: float, value: int, scale: int
) -> None:
    image = disc(blur, value, scale)
    if mode == "P":
        palette = Image.new("P", image.size)
        palette.putdata(list(image.getdata()))
        palette.putpalette([level for level in range(256) for _ in range(3)])
        image = palette
    save_video(tmp_path, [image if mode == "P" else image.convert(mode)])
    message = r"0\.png: found \d+ values, \d+ of them nothing but thin edges .*value > 127"
    with pytest.raises(ValueError, match=message):
        import_davis(tmp_path / "labels", tmp_path / "images")


def test_a_few_labels_that_are_but_edges_are_said(tmp_path: Path) -> None:
    save_video(tmp_path, [disc(0, 200, 2)] * 2)  # 50, 100 and 150 along the edge
    with pytest.warns(UserWarning, match=r"v: the labels 50, 100, 150 are nothing but thin edges of others"):
        (video,) = import_davis(tmp_path / "labels", tmp_path / "images").videos
    assert [each.id for each in video.instances] == [50, 100, 150, 200]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["tiling", "small", "lines"])
def test_many_genuine_instances_are_kept(tmp_path: Path, kind: str) -> None:
    labels = np.zeros((80, 120), dtype=np.uint8)
    for i in range(60):
        y, x = divmod(i, 12)
        if kind == "tiling":  # most pixels of each touch another one
            labels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = i + 1
        elif kind == "small":  # without an inside
            labels[16 * y : 16 * y + 2, 10 * x : 10 * x + 2] = i + 1
        else:
            labels[:, 2 * i] = i + 1
    save_video(tmp_path, [Image.fromarray(labels)])
    (video,) = import_davis(tmp_path / "labels", tmp_path / "images").videos
    assert len(video.instances) == 60


def test_colors_are_instances_in_order_of_appearance(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(3, 3), absent=[(0, 0, 0)])
    colors = ((0, 0, 255), (255, 255, 255))  # of the first and second instance
    for v, video in enumerate(made.content["videos"]):
        for t, name in enumerate(video["file_names"]):
            image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            for i, color in enumerate(colors):
                image[made.masks[2 * v + 1 + i][t]] = color
            save((tmp_path / "labels" / name).with_suffix(".png"), image)
    names = {f"v{v}": {"#0000ff": "sky", "#FFFFFF": "cloud"} for v in range(2)}
    path = write_json(tmp_path / "names.json", names)
    first, second = import_davis(tmp_path / "labels", made.images, path).videos
    assert [(each.id, each.category_id) for each in first.instances] == [(11, 1), (12, 2)]  # the cloud came first
    assert [(each.id, each.category_id) for each in second.instances] == [(21, 2), (22, 1)]
    for video, index, instance in ((first, 0, 2), (first, 1, 1), (second, 0, 3), (second, 1, 4)):
        np.testing.assert_array_equal(masks_of(video, index), made.masks[instance])
    del names["v1"]["#0000ff"]
    with pytest.raises(ValueError, match=r"expected a name of instance #0000ff of video v1, found none"):
        import_davis(tmp_path / "labels", made.images, write_json(path, names))


def test_a_photograph_is_no_label_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    save_video(tmp_path, [Image.fromarray(noise)])
    with pytest.raises(
        ValueError, match=r"0\.png: expected one color for each instance, 254 at most .*, found 1\d\d\d;"
    ):
        import_davis(tmp_path / "labels", tmp_path / "images")


def test_names_give_categories(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset()
    labels = write_davis(made, tmp_path / "labels")
    names = {"v0": {"1": "dog", "002": "cat"}, "v1": {"1": "dog", "2": "dog"}, "elsewhere": {"1": "bear"}}
    dataset = import_davis(labels, made.images, write_json(tmp_path / "names.json", names), other_videos=True)
    assert [category.name for category in dataset.categories] == ["bear", "cat", "dog"]
    assert [each.category_id for video in dataset.videos for each in video.instances] == [3, 2, 3, 3]


def test_all_labels_without_a_name_are_said_at_once(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2, 2, 2))
    labels = write_davis(made, tmp_path / "labels")
    path = write_json(tmp_path / "names.json", {"v0": {"1": "dog", "2": "cat"}, "v1": {"1": "dog"}})
    message = r"names\.json: expected a name of instance 2 of video v1; instance 1, 2 of video v2, found none"
    with pytest.raises(ValueError, match=message):
        import_davis(labels, made.images, path)


@pytest.mark.parametrize("importer", [import_davis, import_binary_masks])
def test_names_of_a_video_that_is_not_there_are_refused_unless_asked_for(
    tiny_dataset: MakeDataset, tmp_path: Path, importer: Callable[..., VideoDataset]
) -> None:
    made = tiny_dataset(lengths=(2,))
    labels = write_davis(made, tmp_path / "labels")
    if importer is import_binary_masks:
        for name in made.content["videos"][0]["file_names"]:
            save((tmp_path / "masks" / "v0" / "1" / Path(name).name).with_suffix(".png"), made.masks[1][0])
        labels = tmp_path / "masks"
    names = {"v0": {"1": "dog", "2": "cat"}, "v01": {"1": "dog"}}
    path = write_json(tmp_path / "names.json", names)
    with pytest.raises(
        ValueError, match=r"names\.json: found names of v01, expected names of the videos in .*--other_v"
    ):
        importer(labels, made.images, path)
    assert importer(labels, made.images, path, other_videos=True).videos[0].instances


def test_names_of_what_no_frame_shows_are_said(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(2,))
    names = write_json(tmp_path / "names.json", {"v0": {"1": "dog", "2": "cat", "7": "cow"}})
    with pytest.warns(UserWarning, match=r"names\.json: found names of what no frame shows: instance 7 of video v0"):
        import_davis(write_davis(made, tmp_path / "labels"), made.images, names)


@pytest.mark.parametrize("names", [[], {}, {"v0": ["dog"]}, {"v0": {"one": "dog"}}, {"v0": {"1": 3}}])
def test_names_of_another_form_are_refused(tmp_path: Path, names: object) -> None:
    with pytest.raises(ValueError, match=r"names\.json: .*expected an object"):
        import_davis(tmp_path, tmp_path, write_json(tmp_path / "names.json", names))


def test_mots_has_classes_and_crowds(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(3,))
    labels = write_davis(made, tmp_path / "labels", values=(1007, 2000), dtype=np.uint16)
    ignored = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    ignored[1, -4:, -4:] = True
    save(
        labels / "v0" / "00001.png",
        labels_of([made.masks[1][1], made.masks[2][1], ignored[1]], (1007, 2000, 10000), np.uint16),
    )
    dataset = import_mots(labels, made.images)
    content = round_trip(dataset, tmp_path / "out" / "out.json")
    assert [(a["id"], a["category_id"], a["iscrowd"]) for a in content["annotations"]] == [
        (1007, 1, 0),
        (2000, 2, 0),
        (10001, 1, 1),
        (10002, 2, 1),
    ]
    for index, expected in enumerate([made.masks[1], made.masks[2], ignored, ignored]):
        np.testing.assert_array_equal(masks_of(dataset.videos[0], index), expected)
    assert content["categories"] == [{"id": 1, "name": "car"}, {"id": 2, "name": "pedestrian"}]


@pytest.mark.parametrize("label", [7, 3001, 10001])
def test_mots_refuses_labels_of_no_class(tiny_dataset: MakeDataset, tmp_path: Path, label: int) -> None:
    made = tiny_dataset(lengths=(3,), absent=[(0, 0, 0)])
    labels = write_davis(made, tmp_path / "labels", values=(label, 2001), dtype=np.uint16)
    with pytest.raises(ValueError, match=rf"v0.00001\.png: expected labels class \* 1000 .* found {label}"):
        import_mots(labels, made.images)


def test_binary_masks_may_overlap_and_be_absent(tiny_dataset: MakeDataset, tmp_path: Path) -> None:
    made = tiny_dataset(lengths=(4, 3), absent=[(0, 1, 2)])
    for t in range(4):
        made.masks[1][t, :, 20] = True  # through the other instance
        save(tmp_path / f"masks/v0/000/{t:05d}.png", made.masks[1][t])  # 1 bit
        save(tmp_path / f"masks/v0/001/{t:05d}.png", made.masks[2][t].astype(np.uint8) * 255)
    for t in range(3):
        save_palette(tmp_path / f"masks/v1/002/{t:05d}.png", made.masks[3][t].astype(np.uint8))
        save(tmp_path / f"masks/v1/003/{t:05d}.png", made.masks[4][t].astype(np.uint8) * 7)
        save(tmp_path / f"masks/v1/004/{t:05d}.png", np.zeros((HEIGHT, WIDTH), dtype=bool))  # never there
    (tmp_path / "masks/v1/003/00000.png").unlink()
    made.masks[4][0] = False
    dataset = import_binary_masks(tmp_path / "masks", made.images)
    content = round_trip(dataset, tmp_path / "out" / "out.json")
    assert_same_masks(dataset, made)
    assert [annotation["id"] for annotation in content["annotations"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("folder", "value", "message"),
    [
        ("dog", 1, r"dog: expected a folder for each instance, named by its number"),
        ("9" * 19, 1, r"9: expected a folder for each instance, named by its number"),
        ("01", 1, r"(01|1): expected a number of its own, found (01|1) too"),
        ("2", 9, r"00000\.png: expected zeros and one other value, found 3 values up to 9; .*value > 127"),
    ],
)
def test_binary_masks_refuse(tiny_dataset: MakeDataset, tmp_path: Path, folder: str, value: int, message: str) -> None:
    made = tiny_dataset(lengths=(2,))
    save(tmp_path / "masks/v0/1/00000.png", made.masks[1][0])
    labels = made.masks[1][0].astype(np.uint8)
    labels[0, 0] = value
    save(tmp_path / f"masks/v0/{folder}/00000.png", labels)
    with pytest.raises(ValueError, match=message):
        import_binary_masks(tmp_path / "masks", made.images)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_shows_how_names_are_written_and_passes_its_options_on(
    tiny_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    example = '{"v0": {"1": "car", "2": "person"}}'
    assert example.replace("v0", "street") in shown

    made = tiny_dataset(lengths=(2,))
    labels = write_davis(made, tmp_path / "labels")
    names = write_json(tmp_path / "names.json", {**json.loads(example), "v9": {"1": "dog"}})
    output = tmp_path / "out.json"
    command = ["import", "davis", str(labels), str(output), f"--images={made.images}", f"--names={names}"]
    with pytest.raises(SystemExit, match="found names of v9"):
        main(command)
    main([*command, "--other_videos"])
    assert [category.name for category in read_annotations(output).categories] == ["car", "dog", "person"]

    content = cocovid(made, lambda v, i: {"instance_id": 0, "category_id": 3})
    path = str(write_json(tmp_path / "coco.json", content))
    with pytest.raises(SystemExit, match="--merge_parts"):
        main(["import", "cocovid", path, str(output), "--overwrite"])
    main(["import", "cocovid", path, str(output), "--overwrite", "--merge_parts"])
    assert len(read_annotations(output).videos[0].instances) == 1
    for wrong in (["davis", "--merge_parts"], ["mots", "--other_videos"]):
        with pytest.raises(SystemExit):
            main(["import", wrong[0], str(labels), str(output), f"--images={made.images}", "--overwrite", wrong[1]])
        assert f"{wrong[1]}: expected" in capsys.readouterr().err


# --- files and folders -----------------------------------------------------------------------------------------------


def test_frames_are_ordered_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    for t in (1, 2, 10):
        save(tmp_path / f"images/video/frame{t}.png", np.zeros((4, 6, 3), dtype=np.uint8))
    for name in (".hidden.png", "notes.txt"):
        (tmp_path / "images/video" / name).write_text("no image")
    save(tmp_path / "labels/video/frame10.png", np.ones((4, 6), dtype=np.uint8))
    save(tmp_path / "labels/video/frame2.png", np.zeros((4, 6), dtype=np.uint8))
    with pytest.warns(UserWarning, match=r"video: 1 of 3 frames have no label, left out"):
        (video,) = import_davis(tmp_path / "labels", tmp_path / "images").videos
    assert video.file_names == ("video/frame2.png", "video/frame10.png")
    assert [mask is not None for mask in video.instances[0].segmentations] == [False, True]


@pytest.fixture
def labelled(tiny_dataset: MakeDataset, tmp_path: Path) -> TinyDataset:
    """A tiny dataset with label images in `labels` beside its images."""
    made = tiny_dataset(lengths=(3, 3))
    write_davis(made, made.images.parent / "labels")
    return made


def import_labelled(made: TinyDataset) -> VideoDataset:
    return import_davis(made.images.parent / "labels", made.images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8),
            r"expected 24x40 pixels, as the frames of v1 have, found 24x41",
        ),
        (np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8), r"expected a PNG of mode P or L or RGB .*, found RGBA"),
        (np.zeros((HEIGHT, WIDTH), dtype=np.uint16), r"expected a PNG of mode P or L or RGB .*, found I;16"),
        (
            np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8),
            r"expected labels of one kind in a video, found numbers and RGB",
        ),
    ],
)
def test_label_images_of_another_kind_or_size_are_refused(
    labelled: TinyDataset, labels: NDArray[Any], message: str
) -> None:
    path = labelled.images.parent / "labels/v1/00002.png"
    save(path, labels)
    with pytest.raises(ValueError, match=message) as caught:
        import_labelled(labelled)
    assert str(caught.value).startswith(f"{path}: ")


def test_label_images_cut_short_are_refused(labelled: TinyDataset) -> None:
    path = labelled.images.parent / "labels/v1/00002.png"
    content = path.read_bytes()
    end = content.index(b"IDAT") + 20  # of the pixels' first bytes
    for length in range(0, end, 23):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"v1.00002\.png: cannot be read as a PNG"):
            import_labelled(labelled)


def test_frames_of_different_sizes_or_that_are_no_images_are_refused(labelled: TinyDataset) -> None:
    path = labelled.images / "v1" / "00001.jpg"
    Image.new("RGB", (WIDTH, HEIGHT + 2)).save(path)
    with pytest.raises(ValueError, match=r"00001\.jpg: expected 24x40 pixels, the size of 00000\.jpg, found 26x40"):
        import_labelled(labelled)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"00001\.jpg: cannot be read as an image"):
        import_labelled(labelled)


def test_labels_without_frame_and_frames_twice_are_refused(labelled: TinyDataset) -> None:
    frame = labelled.images / "v0" / "00001.jpg"
    twin = Image.open(frame)
    twin.save(frame.with_suffix(".png"))
    with pytest.raises(ValueError, match=r"00001\.(jpg|png): expected one file for each frame, found 00001\.(jpg|png)"):
        import_labelled(labelled)
    frame.with_suffix(".png").unlink()
    frame.unlink()
    with pytest.raises(ValueError, match=r"labels.v0.00001\.png: expected a frame of the name 00001 in .*v0, found"):
        import_labelled(labelled)


def test_missing_and_empty_folders_are_refused(tmp_path: Path, labelled: TinyDataset) -> None:
    labels = labelled.images.parent / "labels"
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected one with a folder for each video"):
        import_davis(tmp_path / "nowhere", labelled.images)
    with pytest.raises(ValueError, match=r"v0: expected a folder for each video, found none"):
        import_davis(labels / "v0", labelled.images)
    with pytest.raises(FileNotFoundError, match=r"nowhere.v0: no such folder; expected the \.jpg or"):
        import_davis(labels, tmp_path / "nowhere")
    (tmp_path / "empty" / "v0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"v0: expected \.png files, one for each frame, found none"):
        import_davis(tmp_path / "empty", labelled.images)


def test_a_failed_write_leaves_the_old_file(
    labelled: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "out.json"
    path.parent.mkdir()
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("instanceformer.data.writing.track_fields", fail)
    with pytest.raises(OSError, match="disk full"):
        write_youtube_vis(path, import_labelled(labelled))
    assert [(each.name, each.read_text()) for each in path.parent.iterdir()] == [("out.json", "old")]


def test_davis_mini_as_palette_images_and_back(shared: Path, tmp_path: Path) -> None:
    """Two real videos: palette images, binary masks and MOTS labels give the masks of the JSON again."""
    root = shared / "real" / "davis-mini"
    original = read_annotations(root / "valid.json")
    chosen = [video for video in original.videos if video.length <= 16][:2]
    names = {category.id: category.name for category in original.categories}
    semantics = {}
    for video in chosen:
        folder = Path(video.file_names[0]).parent.name
        semantics[folder] = {"1": names[video.instances[0].category_id]}
        (tmp_path / "images" / folder).mkdir(parents=True)
        for mask, name in zip(masks_of(video, 0), video.file_names, strict=True):
            (tmp_path / "images" / name).symlink_to(root / "JPEGImages" / name)
            save_palette((tmp_path / "davis" / name).with_suffix(".png"), mask.astype(np.uint8))
            save((tmp_path / "mots" / name).with_suffix(".png"), mask.astype(np.uint16) * 1001)
            save((tmp_path / "binary" / folder / "1" / Path(name).name).with_suffix(".png"), mask)
    path, images = write_json(tmp_path / "semantics.json", semantics), tmp_path / "images"
    for dataset in (
        import_davis(tmp_path / "davis", images, path),
        import_mots(tmp_path / "mots", images),
        import_binary_masks(tmp_path / "binary", images, path),
    ):
        round_trip(dataset, tmp_path / "out" / "out.json")
        by_name = {video.file_names: video for video in dataset.videos}
        assert len(by_name) == len(chosen)
        for video in chosen:
            assert by_name[video.file_names].instances[0].segmentations == video.instances[0].segmentations
    categories = {category.id: category.name for category in dataset.categories}
    for video in chosen:
        imported = by_name[video.file_names].instances[0]
        assert categories[imported.category_id] == names[video.instances[0].category_id]
