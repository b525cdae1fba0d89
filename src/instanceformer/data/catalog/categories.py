"""COCO's categories under the names that video datasets have for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from instanceformer.data.annotations import Category, VideoDataset
from instanceformer.data.catalog.datasets import CATALOG
from instanceformer.data.packed import pack

# The names to look for in place of COCO's own; the first that the target has counts. Names are compared whole: a teddy
# bear is no bear. What is only similar keeps its own name and is dropped where the target lacks that: a bicycle is no
# motorbike, skis are no snowboard, and birds cannot be told into the owls and eagles of YouTube-VIS 2019.
KNOWN_AS: dict[str, tuple[str, ...]] = {
    "bus": ("bus", "vehical", "vehicle"),  # OVIS spells it Vehical
    "car": ("car", "sedan", "vehical", "vehicle"),
    "frisbee": ("frisbee", "flying_disc"),
    "motorcycle": ("motorcycle", "motorbike"),
    "mouse": (),  # a computer's; in YouTube-VIS an animal
    "truck": ("truck", "vehical", "vehicle"),
}


def map_categories(source: VideoDataset, target: Sequence[Category]) -> VideoDataset:
    """Express a dataset in the categories of another one, by name.

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
        found = next((ids[_key(name)] for name in names if _key(name) in ids), None)
        if found is not None:
            mapping[category.id] = found
    if not mapping:
        raise ValueError(
            f"no category can be mapped by its name: found {', '.join(c.name for c in source.categories)}; expected "
            f"names that lead to {', '.join(c.name for c in target)}; add synonyms to KNOWN_AS in {__name__}"
        )
    return replace(source, categories=tuple(target), videos=pack(source.videos).with_categories(mapping))


def find_namesakes(ours: Sequence[Category], theirs: Sequence[Category]) -> tuple[int | None, ...]:
    """Which class of another list each of ours is, by name or, where no name agrees, by a synonym of KNOWN_AS.

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
        synonyms = set().union(*(group for group in groups if name in group))
        alike = [
            *(i for i, key in enumerate(keys) if key == name),
            *(i for i, key in enumerate(keys) if key in synonyms),
        ]
        return next(iter(alike), None)

    return tuple(namesake(_key(category.name)) for category in ours)


def _are_cocos(categories: Sequence[Category]) -> bool:
    return {_key(c.name) for c in categories} <= {_key(c.name) for c in CATALOG["coco"].categories}


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "")
