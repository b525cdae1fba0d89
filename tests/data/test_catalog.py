from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from instanceformer.data.annotations import Category, Instance, Video, VideoDataset
from instanceformer.data.catalog import CATALOG, KNOWN_AS, CatalogSplit, DatasetName, locate, map_categories

DATASETS: tuple[DatasetName, ...] = ("ytvis19", "ytvis21", "ytvis22", "ovis", "coco")
SPLITS: tuple[CatalogSplit, ...] = ("train", "valid", "test")

# How people unpack the archives: dataset, split, annotations, images.
LAYOUTS: list[tuple[DatasetName, CatalogSplit, str, str]] = [
    ("ytvis19", "train", "ytvis19/train.json", "ytvis19/train/JPEGImages"),
    ("ytvis19", "train", "ytvis19/train/instances.json", "ytvis19/train/JPEGImages"),
    ("ytvis19", "valid", "ytvis19/annotations/instances_val_sub.json", "ytvis19/val/JPEGImages"),
    ("ytvis19", "test", "ytvis19/test.json", "ytvis19/test/JPEGImages"),
    ("ytvis19", "valid", "ytvis19/validation.json", "ytvis19/validation/JPEGImages"),
    ("ytvis21", "valid", "ytvis21/val/instances.json", "ytvis21/val/JPEGImages"),
    ("ytvis21", "train", "ytvis21/train/instances.json", "ytvis21/train/JPEGImages"),
    ("ytvis21", "valid", "ytvis21/valid/instances.json", "ytvis21/valid/JPEGImages"),
    ("ytvis22", "train", "ytvis21/train/instances.json", "ytvis21/train/JPEGImages"),
    ("ytvis22", "train", "ytvis22/train.json", "ytvis22/train/JPEGImages"),
    ("ytvis22", "valid", "ytvis22/valid/instances.json", "ytvis22/valid/JPEGImages"),
    ("ovis", "train", "ovis/annotations_train.json", "ovis/train"),
    ("ovis", "valid", "ovis/annotations/annotations_valid.json", "ovis/valid"),
    ("ovis", "valid", "ovis/annotations_val.json", "ovis/val"),
    ("ovis", "valid", "ovis/annotations_valid.json", "ovis/validation/JPEGImages"),  # spelled in two ways
    ("ovis", "valid", "ovis/annotations/annotations_validation.json", "ovis/val"),
    ("ovis", "test", "ovis/test.json", "ovis/test/JPEGImages"),
    ("coco", "train", "coco/annotations/instances_train2017.json", "coco/train2017"),
    ("coco", "valid", "coco/annotations/instances_val2017.json", "coco/images/val2017"),
    ("coco", "test", "coco/annotations/image_info_test2017.json", "coco/test2017"),
]


def unpack(root: Path, annotations: str, images: str) -> tuple[Path, Path]:
    (root / images).mkdir(parents=True, exist_ok=True)
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).touch()
    return root / annotations, root / images


@pytest.mark.parametrize(("name", "split", "annotations", "images"), LAYOUTS)
def test_locate_finds_every_layout(
    tmp_path: Path, name: DatasetName, split: CatalogSplit, annotations: str, images: str
) -> None:
    expected = unpack(tmp_path, annotations, images)
    assert locate(tmp_path, name, split) == expected


def test_locate_takes_the_first_place_that_exists(tmp_path: Path) -> None:
    unpack(tmp_path, "ytvis21/train.json", "ytvis21/train/JPEGImages")
    expected = unpack(tmp_path, "ytvis22/train/instances.json", "ytvis22/train/JPEGImages")
    assert locate(tmp_path, "ytvis22", "train") == expected


def test_validation_is_never_taken_from_another_year(tmp_path: Path) -> None:
    unpack(tmp_path, "ytvis21/valid.json", "ytvis21/valid/JPEGImages")
    with pytest.raises(FileNotFoundError, match="ytvis22, split valid"):
        locate(tmp_path, "ytvis22", "valid")


@pytest.mark.parametrize(("name", "split"), list(product(DATASETS, SPLITS)))
def test_a_missing_dataset_is_refused_with_all_places(tmp_path: Path, name: DatasetName, split: CatalogSplit) -> None:
    with pytest.raises(FileNotFoundError) as error:
        locate(tmp_path, name, split)
    entry = CATALOG[name].splits[split]
    for part in (*entry.annotations, *entry.images, CATALOG[name].homepage, f"data.root = {tmp_path}"):
        assert part in str(error.value)


def test_only_what_is_missing_is_named(tmp_path: Path) -> None:
    unpack(tmp_path, "ovis/annotations_train.json", "ovis/elsewhere")
    with pytest.raises(FileNotFoundError, match="no folder of images, looked for ovis/train/JPEGImages or") as error:
        locate(tmp_path, "ovis", "train")
    assert "no annotation file" not in str(error.value)


def test_a_folder_is_no_annotation_file_and_a_file_no_folder(tmp_path: Path) -> None:
    (tmp_path / "coco/annotations/instances_val2017.json").mkdir(parents=True)
    (tmp_path / "coco/val2017").touch()
    with pytest.raises(FileNotFoundError, match=r"no annotation file, .* and no folder of images"):
        locate(tmp_path, "coco", "valid")


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("ytvis19", 40, {1: "person", 6: "sedan", 21: "motorbike", 36: "mouse", 40: "tennis_racket"}),
        ("ytvis21", 40, {1: "airplane", 14: "flying_disc", 24: "mouse", 26: "person", 40: "zebra"}),
        ("ytvis22", 40, {1: "airplane", 14: "flying_disc", 24: "mouse", 26: "person", 40: "zebra"}),
        ("ovis", 25, {1: "Person", 13: "Giant_panda", 22: "Motorcycle", 25: "Vehical"}),
        ("coco", 80, {1: "person", 13: "stop sign", 44: "bottle", 67: "dining table", 74: "mouse", 90: "toothbrush"}),
    ],
)
def test_categories_have_the_official_ids(name: DatasetName, count: int, some: dict[int, str]) -> None:
    assert CATALOG[name].name == name
    categories = CATALOG[name].categories
    names = {category.id: category.name for category in categories}
    assert len(names) == len(set(names.values())) == count
    assert some.items() <= names.items()
    VideoDataset(categories, ())  # refuses ids that do not ascend


def test_coco_has_the_official_gaps() -> None:
    used = {category.id for category in CATALOG["coco"].categories}
    assert set(range(1, 91)) - used == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_categories_of_the_genuine_ovis(shared: Path) -> None:
    content = json.loads((shared / "real" / "formats" / "ovis_85aa3b0e_3frames.json").read_text())
    assert CATALOG["ovis"].categories == tuple(Category(c["id"], c["name"]) for c in content["categories"])


def test_splits() -> None:
    annotated = {(n, s) for n, s in product(DATASETS, SPLITS) if CATALOG[n].splits[s].annotated}
    assert annotated == {*product(DATASETS, ["train"]), ("coco", "valid")}
    totals = {n: sum(entry.videos or 0 for entry in CATALOG[n].splits.values()) for n in DATASETS}
    assert totals == {"ytvis19": 2883, "ytvis21": 3859, "ytvis22": 3859 + 71 + 89, "ovis": 901, "coco": 163957}


def dataset(categories: list[Category], *videos: list[int]) -> VideoDataset:
    """One-frame videos with instances of the given category ids; a negative id is a crowd."""
    count = iter(range(1000))
    return VideoDataset(
        tuple(categories),
        tuple(
            Video(
                id=v,
                height=4,
                width=4,
                file_names=(f"{v}.jpg",),
                length=1,
                instances=tuple(
                    Instance(id=next(count), category_id=abs(id_), is_crowd=id_ < 0, segmentations=(b"04",))
                    for id_ in ids
                ),
            )
            for v, ids in enumerate(videos)
        ),
    )


IN_ALL = {"airplane", "bear", "boat", "cat", "cow", "dog", "elephant", "giraffe", "horse", "person", "zebra"}
IN_YTVIS = {"skateboard", "snowboard", "surfboard", "train", "truck"}
COCO_IN: dict[DatasetName, dict[str, str]] = {
    "ytvis19": {
        **{name: name for name in IN_ALL | IN_YTVIS},
        "car": "sedan",
        "motorcycle": "motorbike",
        "tennis racket": "tennis_racket",
    },
    "ytvis21": {
        **{name: name for name in IN_ALL | IN_YTVIS},
        "bird": "bird",
        "car": "car",
        "frisbee": "flying_disc",
        "motorcycle": "motorbike",
        "tennis racket": "tennis_racket",
    },
    "ovis": {
        **{name: name.capitalize() for name in IN_ALL},
        "bicycle": "Bicycle",
        "bird": "Bird",
        "bus": "Vehical",
        "car": "Vehical",
        "motorcycle": "Motorcycle",
        "sheep": "Sheep",
        "truck": "Vehical",
    },
}


@pytest.mark.parametrize("target", ["ytvis19", "ytvis21", "ovis"])
def test_every_category_of_coco(target: DatasetName) -> None:
    coco = list(CATALOG["coco"].categories)
    mapped = map_categories(dataset(coco, *([category.id] for category in coco)), CATALOG[target].categories)
    assert mapped.categories == CATALOG[target].categories
    names = {category.id: category.name for category in mapped.categories}
    found = {coco[video.id].name: names[video.instances[0].category_id] for video in mapped.videos}
    assert found == COCO_IN[target]


def test_the_table_is_of_coco_names() -> None:
    assert KNOWN_AS.keys() <= {category.name for category in CATALOG["coco"].categories}


def test_instances_and_videos_of_other_classes_go() -> None:
    source = dataset([Category(1, "cat"), Category(5, "pizza")], [1, 5, -1], [5, 5], [], [-1])
    target = [Category(30, "CAT"), Category(40, "zebra")]
    mapped = map_categories(source, target)
    assert [video.id for video in mapped.videos] == [0, 2, 3]
    first, empty, crowd = mapped.videos
    assert [(i.id, i.category_id, i.is_crowd) for i in first.instances] == [(0, 30, False), (2, 30, True)]
    assert empty == source.videos[2]
    assert [(i.category_id, i.is_crowd) for i in crowd.instances] == [(30, True)]
    assert first.instances[0].segmentations == source.videos[0].instances[0].segmentations


def test_case_underscores_and_spaces_do_not_matter() -> None:
    source = dataset([Category(1, "Tennis_Racket"), Category(2, "MOUSE"), Category(3, "Motor Cycle")], [1], [2], [3])
    mapped = map_categories(source, [Category(1, "mouse"), Category(2, "tennis racket"), Category(9, "motorbike")])
    assert [(video.id, video.instances[0].category_id) for video in mapped.videos] == [(0, 2), (2, 9)]


@pytest.mark.parametrize(("name", "other"), [("car", "sedan"), ("truck", "vehicle"), ("frisbee", "flying disc")])
def test_the_preferred_name_wins(name: str, other: str) -> None:
    source = dataset([Category(1, name)], [1])
    mapped = map_categories(source, [Category(1, other), Category(2, name)])
    assert mapped.videos[0].instances[0].category_id == 2


def test_nothing_in_common_is_refused() -> None:
    source = dataset([Category(1, "mouse"), Category(2, "hot dog")], [1])
    with pytest.raises(ValueError, match=r"found mouse, hot dog; expected names that lead to dog, mouse"):
        map_categories(source, [Category(1, "dog"), Category(2, "mouse")])
