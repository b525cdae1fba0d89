from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from instanceformer import InstanceFormer
from instanceformer.checkpoints import Checkpoint
from instanceformer.checkpoints.classes import take_over
from instanceformer.data.annotations import Category
from instanceformer.data.catalog import CATALOG, DatasetName, find_namesakes


def named(*names: str) -> tuple[Category, ...]:
    return tuple(Category(10 * i, name) for i, name in enumerate(names, start=1))


def taken(
    tiny: Callable[..., InstanceFormer], ours: tuple[Category, ...], theirs: tuple[Category, ...], **options: object
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], str]:
    """State dicts of our network before, of theirs, of ours after, and what is said."""
    before = tiny(len(ours), **options).state_dict()
    source = tiny(len(theirs))
    after, said = take_over(before, ours, Checkpoint(source.options, source.state_dict(), theirs))
    assert {name: x.shape for name, x in after.items()} == {name: x.shape for name, x in before.items()}
    return before, source.state_dict(), after, said


def test_classes_are_taken_over_by_name_wherever_they_stand(tiny) -> None:
    ours, theirs = named("fish", "Tennis_Racket", "dog", "cat"), named("cat", "pizza", "tennis racket", "dog", "apple")
    before, source, after, said = taken(tiny, ours, theirs)
    assert said == "3 of 4 classes are taken over by name (Tennis_Racket from tennis racket); new: fish"
    found = {1: 2, 2: 3, 3: 0}
    for i in range(2):
        for part in ("weight", "bias"):
            name = f"decoder.class_heads.{i}.{part}"
            assert torch.equal(after[name][0], before[name][0])
            assert all(torch.equal(after[name][a], source[name][b]) for a, b in found.items())
    name = "class_prior.temporal.weight"
    for a in range(4):
        for b in range(4):
            known = a in found and b in found
            assert after[name][a, b] == (source[name][found[a], found[b]] if known else before[name][a, b])
    assert torch.equal(after["class_prior.temporal.bias"][1:], source["class_prior.temporal.bias"][[2, 3, 0]])
    name = "memory.projection.weight"  # 32 of the content, the classes, 4 of the box
    assert torch.equal(after[name][:, :32], source[name][:, :32])
    assert torch.equal(after[name][:, 32], before[name][:, 32])
    assert torch.equal(after[name][:, 33:36], source[name][:, [34, 35, 32]])
    assert torch.equal(after[name][:, 36:], source[name][:, 37:])
    classes = [n for n in after if "class" in n or n == "memory.projection.weight"]
    assert all(torch.equal(after[n], source[n]) for n in after if n not in classes)
    assert not any(torch.equal(after[n], before[n]) for n in classes)


def test_the_same_categories_are_taken_over_to_the_bit(tiny) -> None:
    categories = named("square", "disc", "star")
    _, source, after, said = taken(tiny, categories, categories)
    assert said == "3 of 3 classes are taken over by name"
    assert all(torch.equal(x, source[name]) for name, x in after.items())


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (named("apple", "pear"), "0 of 2 classes are taken over by name; new: cat, dog"),
        ((), "all 2 classes are new, since it does not say what its own are"),
    ],
)
def test_without_a_namesake_every_class_is_new_though_the_shapes_agree(tiny, theirs, said: str) -> None:
    ours = tiny(2).state_dict()
    source = tiny(2)
    after, found = take_over(ours, named("cat", "dog"), Checkpoint(source.options, source.state_dict(), theirs))
    assert found == said
    for name in ("decoder.class_heads.0.weight", "decoder.class_heads.1.bias", "class_prior.temporal.weight"):
        assert torch.equal(after[name], ours[name])
    assert torch.equal(after["memory.projection.weight"][:, 32:34], ours["memory.projection.weight"][:, 32:34])
    assert torch.equal(after["query_content"], source.state_dict()["query_content"])


def test_what_does_not_fit_is_said_with_the_classes(tiny) -> None:
    before, _, after, said = taken(tiny, named("cat", "dog"), named("dog"), location="refined", num_queries=9)
    assert said == (
        "1 of 2 classes are taken over by name; new: cat; not taken over, since shapes or names differ: "
        "location.step.bias, location.step.weight, query_content, query_position"
    )
    assert torch.equal(after["query_content"], before["query_content"])


def test_class_heads_of_other_channels_stay(tiny) -> None:
    before, _, after, said = taken(tiny, named("cat"), named("cat"), dim=64, num_heads=4)
    assert "decoder.class_heads.0.weight" in said
    assert "memory.projection.weight" in said
    assert torch.equal(after["decoder.class_heads.0.weight"], before["decoder.class_heads.0.weight"])


def namesakes(ours: DatasetName, theirs: DatasetName) -> dict[str, str | None]:
    a, b = CATALOG[ours].categories, CATALOG[theirs].categories
    found = find_namesakes(a, b)
    return {our.name: None if i is None else b[i].name for our, i in zip(a, found, strict=True)}


def test_namesakes_among_the_datasets() -> None:
    from_coco = namesakes("ovis", "coco")
    assert (from_coco["Person"], from_coco["Vehical"], from_coco["Motorcycle"]) == ("person", "car", "motorcycle")
    assert {name for name, found in from_coco.items() if found is None} == {
        *("Fish", "Giant_panda", "Lizard", "Monkey", "Parrot", "Poultry", "Rabbit", "Tiger", "Turtle")
    }
    years = namesakes("ytvis21", "ytvis19")
    assert (years["car"], years["truck"], years["motorbike"], years["mouse"]) == (
        "sedan",
        "truck",
        "motorbike",
        "mouse",
    )
    assert {name for name, found in years.items() if found is None} == {"bird", "flying_disc", "squirrel", "whale"}
    assert namesakes("ytvis21", "ovis")["truck"] == "Vehical"
    assert namesakes("ovis", "ytvis19")["Vehical"] == "sedan"
    assert namesakes("ytvis19", "coco")["mouse"] is None  # a computer's
    assert namesakes("coco", "ytvis19")["mouse"] is None
    assert all(name == found for name, found in namesakes("coco", "coco").items())


def test_a_name_comes_before_its_synonyms_and_synonyms_are_no_chain() -> None:
    cars = named("vehicle", "sedan", "car")
    assert find_namesakes(named("car", "sedan", "truck", "bus", "vehical"), cars) == (2, 1, 0, 0, 0)
    assert find_namesakes(named("car"), named("truck", "bus")) == (None,)
