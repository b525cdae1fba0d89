"""The datasets of the paper: where their archives hold what, their categories, and how COCO's map onto them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from instanceformer.data.annotations import Category, VideoDataset
from instanceformer.data.packed import pack

DatasetName = Literal["ytvis19", "ytvis21", "ytvis22", "ovis", "coco"]
CatalogSplit = Literal["train", "valid", "test"]
SplitName = Literal["train", "valid", "test", "predict"]
SPLIT_OF_STAGE: dict[str, SplitName] = {"fit": "train", "validate": "valid", "test": "test", "predict": "predict"}
CATALOG_SPLITS: dict[SplitName, CatalogSplit] = {
    "train": "train",
    "valid": "valid",
    "test": "valid",  # the split whose results are published
    "predict": "valid",
}


@dataclass(frozen=True)
class Split:
    """Where one part of a dataset lies.

    Attributes:
        annotations: JSON file in the format of YouTube-VIS, or of COCO, whose images are videos of one frame.
        images: folder that the file names in it are relative to.
    """

    annotations: Path
    images: Path


@dataclass(frozen=True)
class SplitEntry:
    """One split of a dataset. Archives are unpacked in different ways, so the first path that exists counts.

    Attributes:
        annotations: possible paths of the annotation file, relative to the root of all datasets.
        images: possible paths of the folder that file names of frames are relative to, relative to the same root.
        annotated: whether the official file has annotations; if not, only the evaluation server has them.
        videos: number of videos (in COCO, of images); None if it is not certain.
        instances: number of annotations, crowds included; None if it is not certain.
    """

    annotations: tuple[str, ...]
    images: tuple[str, ...]
    annotated: bool
    videos: int | None = None
    instances: int | None = None


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset.

    Attributes:
        name: its key in the catalog and the name of its folder.
        homepage: where to get it.
        categories: with the official ids and spellings, in ascending order of id.
        splits: by name.
    """

    name: DatasetName
    homepage: str
    categories: tuple[Category, ...]
    splits: Mapping[CatalogSplit, SplitEntry]


def locate(root: Path, name: DatasetName, split: CatalogSplit) -> tuple[Path, Path]:
    """Find a split of a dataset of the catalog.

    Args:
        root: folder with one folder for each dataset, such as ``root/ovis``.
        name: the dataset.
        split: the split.

    Returns:
        The annotation file and the folder of images; both exist.

    Raises:
        FileNotFoundError: one or both do not exist; the message lists the paths that were tried.
    """
    dataset = CATALOG[name]
    entry = dataset.splits[split]
    annotations = next((root / path for path in entry.annotations if (root / path).is_file()), None)
    images = next((root / path for path in entry.images if (root / path).is_dir()), None)
    if annotations is not None and images is not None:
        return annotations, images
    missing = []
    if annotations is None:
        missing.append(f"no annotation file, looked for {' or '.join(entry.annotations)}")
    if images is None:
        missing.append(f"no folder of images, looked for {' or '.join(entry.images)}")
    raise FileNotFoundError(
        f"{name}, split {split}: under data.root = {root} there is {' and '.join(missing)}. Unpack the dataset "
        f"({dataset.homepage}) so that one of these exists, correct data.root, or give annotations and images as paths"
    )


def _spellings(split: CatalogSplit) -> tuple[str, ...]:
    """Names that copies of a dataset give to a split."""
    return ("valid", "val", "validation") if split == "valid" else (split,)


def _youtube_vis(folders: tuple[str, ...], split: CatalogSplit, videos: int) -> SplitEntry:
    files = [
        path
        for part in _spellings(split)
        for path in (f"{part}.json", f"{part}/instances.json", f"annotations/instances_{part}_sub.json")
    ]
    return SplitEntry(
        annotations=tuple(f"{folder}/{file}" for folder in folders for file in files),
        images=tuple(f"{folder}/{part}/JPEGImages" for folder in folders for part in _spellings(split)),
        annotated=split == "train",
        videos=videos,
    )


def _ovis(split: CatalogSplit, videos: int) -> SplitEntry:
    parts = _spellings(split)
    files = [
        path
        for part in parts
        for path in (f"annotations_{part}.json", f"annotations/annotations_{part}.json", f"{part}.json")
    ]
    return SplitEntry(
        annotations=tuple(f"ovis/{file}" for file in files),
        images=tuple(f"ovis/{part}{inner}" for part in parts for inner in ("/JPEGImages", "")),  # inside, if both are
        annotated=split == "train",
        videos=videos,
    )


def _coco(part: str, file: str, images: int, instances: int | None) -> SplitEntry:
    return SplitEntry(
        annotations=(f"coco/annotations/{file}",),
        images=(f"coco/{part}", f"coco/images/{part}"),
        annotated=instances is not None,
        videos=images,
        instances=instances,
    )


def _numbered(names: str) -> tuple[Category, ...]:
    """Categories numbered from 1, of names between commas."""
    return tuple(Category(id_, name) for id_, name in enumerate(names.split(", "), start=1))


_YTVIS19 = _numbered(
    "person, giant_panda, lizard, parrot, skateboard, sedan, ape, dog, snake, monkey, hand, rabbit, duck, cat, cow, "
    "fish, train, horse, turtle, bear, motorbike, giraffe, leopard, fox, deer, owl, surfboard, airplane, truck, zebra, "
    "tiger, elephant, snowboard, boat, shark, mouse, frog, eagle, earless_seal, tennis_racket"
)
_YTVIS21 = _numbered(
    "airplane, bear, bird, boat, car, cat, cow, deer, dog, duck, earless_seal, elephant, fish, flying_disc, fox, frog, "
    "giant_panda, giraffe, horse, leopard, lizard, monkey, motorbike, mouse, parrot, person, rabbit, shark, "
    "skateboard, snake, snowboard, squirrel, surfboard, tennis_racket, tiger, train, truck, turtle, whale, zebra"
)
_OVIS = _numbered(
    "Person, Bird, Cat, Dog, Horse, Sheep, Cow, Elephant, Bear, Zebra, Giraffe, Poultry, Giant_panda, Lizard, Parrot, "
    "Monkey, Rabbit, Tiger, Fish, Turtle, Bicycle, Motorcycle, Airplane, Boat, Vehical"
)
_COCO = tuple(  # ids up to 90, ten of them unused
    category
    for category in _numbered(
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, "
        "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, "
        "backpack, umbrella, -, -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
        "baseball glove, skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, "
        "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, "
        "bed, -, dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
        "toaster, sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
    )
    if category.name != "-"
)

_YOUTUBE_VIS_PAGE = "https://youtube-vos.org/dataset/vis/"

CATALOG: Mapping[DatasetName, DatasetEntry] = {
    "ytvis19": DatasetEntry(
        name="ytvis19",
        homepage=_YOUTUBE_VIS_PAGE,
        categories=_YTVIS19,
        splits={
            "train": _youtube_vis(("ytvis19",), "train", videos=2238),
            "valid": _youtube_vis(("ytvis19",), "valid", videos=302),
            "test": _youtube_vis(("ytvis19",), "test", videos=343),
        },
    ),
    "ytvis21": DatasetEntry(
        name="ytvis21",
        homepage=_YOUTUBE_VIS_PAGE,
        categories=_YTVIS21,
        splits={
            "train": _youtube_vis(("ytvis21",), "train", videos=2985),
            "valid": _youtube_vis(("ytvis21",), "valid", videos=421),
            "test": _youtube_vis(("ytvis21",), "test", videos=453),
        },
    ),
    "ytvis22": DatasetEntry(
        name="ytvis22",
        homepage=_YOUTUBE_VIS_PAGE,
        categories=_YTVIS21,
        splits={
            "train": _youtube_vis(("ytvis22", "ytvis21"), "train", videos=2985),  # the videos of 2021
            "valid": _youtube_vis(("ytvis22",), "valid", videos=421 + 71),  # those of 2021, and the long ones
            "test": _youtube_vis(("ytvis22",), "test", videos=453 + 89),
        },
    ),
    "ovis": DatasetEntry(
        name="ovis",
        homepage="https://songbai.site/ovis/",
        categories=_OVIS,
        splits={"train": _ovis("train", 607), "valid": _ovis("valid", 140), "test": _ovis("test", 154)},
    ),
    "coco": DatasetEntry(
        name="coco",
        homepage="https://cocodataset.org/#download",
        categories=_COCO,
        splits={
            "train": _coco("train2017", "instances_train2017.json", images=118287, instances=860001),
            "valid": _coco("val2017", "instances_val2017.json", images=5000, instances=36781),
            "test": _coco("test2017", "image_info_test2017.json", images=40670, instances=None),
        },
    ),
}


# Names that replace COCO's; the first that the target has counts. Whole names are compared: a teddy bear is no bear.
# Categories that are only similar have no entry and are dropped if the target lacks their name: a bicycle is no
# motorbike, skis are no snowboard, and birds cannot be divided into the owls and eagles of YouTube-VIS 2019.
KNOWN_AS: dict[str, tuple[str, ...]] = {
    "bus": ("bus", "vehical", "vehicle"),  # OVIS spells it Vehical
    "car": ("car", "sedan", "vehical", "vehicle"),
    "frisbee": ("frisbee", "flying_disc"),
    "motorcycle": ("motorcycle", "motorbike"),
    "mouse": (),  # a computer's; in YouTube-VIS an animal
    "truck": ("truck", "vehical", "vehicle"),
}


def map_categories(source: VideoDataset, target: Sequence[Category]) -> VideoDataset:
    """Express a dataset in the categories of another, by name.

    Case, underscores and spaces do not matter. Instances of categories that the target lacks are dropped, and with them
    the videos that have no other; videos without any instance stay. Crowds keep their category like other instances.

    Args:
        source: has COCO's categories, or some of them.
        target: categories to end up with, in ascending order of id.

    Returns:
        The dataset with the target's categories.

    Raises:
        ValueError: the target has none of the source's categories.
    """
    ids = {_key(category.name): category.id for category in target}
    known_as = {_key(name): names for name, names in KNOWN_AS.items()}
    mapping: dict[int, int] = {}
    for category in source.categories:
        names = known_as.get(_key(category.name), (category.name,))
        if (id_ := next((ids[_key(name)] for name in names if _key(name) in ids), None)) is not None:
            mapping[category.id] = id_
    if not mapping:
        raise ValueError(
            f"no category can be mapped by its name: found {', '.join(c.name for c in source.categories)}; expected "
            f"names that lead to {', '.join(c.name for c in target)}; add synonyms to KNOWN_AS in {__name__}"
        )
    return replace(source, categories=tuple(target), videos=pack(source.videos).with_categories(mapping))


def find_namesakes(ours: Sequence[Category], theirs: Sequence[Category]) -> tuple[int | None, ...]:
    """Find the class of another list that each of ours is: by name or, failing that, by a synonym in KNOWN_AS.

    Case, underscores and spaces do not matter, nor which of the lists is COCO's. One of theirs can be several of ours:
    OVIS' Vehical is the car and the truck of YouTube-VIS 2021.

    Args:
        ours: in class order.
        theirs: in class order; of several synonyms the first counts.

    Returns:
        For each of ours the index of theirs, or None.
    """
    keys = [_key(category.name) for category in theirs]
    groups = [{_key(name), *map(_key, names)} for name, names in KNOWN_AS.items() if names]
    homonyms = (
        set() if _are_cocos(ours) == _are_cocos(theirs) else {_key(n) for n, names in KNOWN_AS.items() if not names}
    )

    def namesake(name: str) -> int | None:
        if name in homonyms:
            return None
        if name in keys:
            return keys.index(name)
        synonyms = set().union(*(group for group in groups if name in group))
        return next((i for i, key in enumerate(keys) if key in synonyms), None)

    return tuple(namesake(_key(category.name)) for category in ours)


def _are_cocos(categories: Sequence[Category]) -> bool:
    return {_key(c.name) for c in categories} <= {_key(c.name) for c in CATALOG["coco"].categories}


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "")
