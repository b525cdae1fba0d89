from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from instanceformer import InstanceFormer, checkpoints
from instanceformer.checkpoints import Checkpoint, FrameSize, load_for_trainer
from instanceformer.checkpoints.checkpoint import take_over
from instanceformer.cli import main
from instanceformer.data.annotations import Category
from instanceformer.data.augment import Augmentation
from instanceformer.data.catalog import CATALOG, DatasetName, find_namesakes
from instanceformer.data.datamodule import Split, VideoDataModule
from instanceformer.training.module import InstanceFormerModule
from instanceformer.training.optim import OptimizerOptions

CATEGORIES = tuple(Category(3 * i, f"kind {i}") for i in range(5))


@pytest.mark.parametrize(("name", "backbone"), [("a.ckpt", "resnet18"), ("made/a.safetensors", "swin_t")])
@torch.no_grad()
def test_one_file_is_enough(tiny, tmp_path: Path, name: str, backbone: str) -> None:
    network = tiny(location="refined", backbone=backbone)
    told = {"frame_size": FrameSize(96, 160), "inference": {"candidates": "any_frame", "max_tracks": 7}}
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict(), CATEGORIES, **told), tmp_path / name)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]
    found = checkpoints.read(tmp_path / name)
    assert found.options == vars(network.options)
    assert found.categories == CATEGORIES
    assert {key: getattr(found, key) for key in told} == told
    assert set(found.weights) == set(network.state_dict())
    loaded = InstanceFormer.from_checkpoint(tmp_path / name)
    frames = torch.randn(1, 2, 3, 64, 96)
    assert not loaded.training
    for one, other in zip(loaded.parameters(), network.parameters(), strict=True):
        assert (one.device, one.stride(), one.requires_grad) == (other.device, other.stride(), other.requires_grad)
    assert torch.equal(loaded(frames)[0].logits, network(frames)[0].logits)


def test_other_programs_can_read_the_exported_weights(tiny, tmp_path: Path) -> None:
    network = tiny()
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(network.state_dict())
        assert json.loads(file.metadata()["instanceformer"])["network_options"]["num_classes"] == 5


class ReadingIO(TorchCheckpointIO):
    """Lightning's files, read by this package."""

    def load_checkpoint(self, path: str, *_: object, **__: object) -> dict[str, object]:
        return load_for_trainer(path)


def test_a_training_goes_on_from_what_is_read_and_evaluates_either_format(tiny, tmp_path: Path) -> None:
    main(["synthesize", str(tmp_path), "--train_videos=1", "--valid_videos=1", "--length=8", "--workers=1"])
    images = tmp_path / "JPEGImages"
    train, valid = (Split(tmp_path / f"{name}.json", images) for name in ("train", "valid"))
    small = {"clip_frames": 2, "clips_per_video": 2, "batch_size": 1, "eval_size": 64, "max_size": 128}
    plain = Augmentation(sizes=[], crop=0)
    data = VideoDataModule(train=train, valid=valid, augmentation=plain, num_workers=0, **small)

    def trainer(**options: Any) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
        return Trainer(**quiet, num_sanity_val_steps=0, plugins=[ReadingIO()], **options)

    def module() -> InstanceFormerModule:
        schedule = OptimizerOptions(schedule="cosine", warmup_steps=1)
        return InstanceFormerModule(tiny(num_classes=4, backbone_norm="batch"), optimizer=schedule)

    def keeping() -> list[Callback]:
        best = ModelCheckpoint(tmp_path / "run", monitor="val/AP", mode="max", save_last=True)
        return [best, EarlyStopping("val/AP", mode="max"), Timer("00:01:00:00")]

    trained = module()
    trainer(callbacks=keeping(), max_epochs=1).fit(trained, data)
    path = tmp_path / "run" / "last.ckpt"
    content, found = load_for_trainer(path), checkpoints.read(path)
    assert set(torch.load(path, weights_only=True)) == set(content)
    assert content.keys() >= {"optimizer_states", "lr_schedulers", "loops", "callbacks", "state_dict"}
    resumed = trainer(callbacks=keeping(), max_epochs=2)
    resumed.fit(module(), data, ckpt_path=path)
    assert resumed.global_step == 2 * content["global_step"] > 0

    assert found.categories == data.categories
    assert {category.name for category in found.categories} >= {"circle"}
    for name in ("written.ckpt", "written.safetensors"):
        checkpoints.write(found, tmp_path / name)
        other = module()
        trainer(enable_checkpointing=False).validate(other, data, ckpt_path=tmp_path / name, verbose=False)
        assert torch.equal(other.network.query_content, trained.network.query_content)


def test_an_early_checkpoint_has_no_categories_and_no_sizes(tiny, tmp_path: Path) -> None:
    network = tiny()
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "network_options": vars(network.options), "loops": {}}, tmp_path / "a.ckpt")
    found = checkpoints.read(tmp_path / "a.ckpt")
    assert (found.categories, found.frame_size, found.inference) == ((), None, None)


def test_categories_are_one_for_each_class() -> None:
    with pytest.raises(ValueError, match="found 5, expected one for each of 4"):
        Checkpoint({"num_classes": 4}, {}, CATEGORIES)


OTHER: dict[str, object] = {
    "num_classes": 7,
    "backbone": "resnet18",
    "backbone_norm": "batch",
    "num_queries": 13,
    "dim": 64,
    "num_heads": 8,
    "num_levels": 3,
    "num_points": 2,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "feedforward_dim": 96,
    "dropout": 0.3,
    "cross_position": False,
    "mask_stride": 4,
    "mask_upsampling": "aligned",
    "propagate_queries": False,
    "location": "refined",
    "location_from": "position",
    "class_prior": False,
    "class_history": "held",
    "memory": False,
    "memory_frames": 5,
    "memory_tokens": 2,
    "temporal_index": "place",
    "min_confidence": 0.4,
    "max_overlap": 0.5,
    "free_queries": "renew",
    "identity": "recover",
}


WRONG = ("text", None, [1], {}, math.nan, -1, 10**9, 10**30, -0.5, 2.5, True, 1)


@pytest.mark.parametrize("option", OTHER)
def test_no_option_in_a_header_is_built_without_a_look(tiny, option: str) -> None:
    network = tiny()
    default = getattr(network.options, option)
    for value in WRONG:
        asked = Checkpoint(vars(network.options), network.state_dict()).to_lightning()
        asked["network_options"] = {**vars(network.options), option: value}
        checkpoint = checkpoints.from_content(asked, "a.ckpt")
        right_kind = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        try:
            InstanceFormer.from_checkpoint(checkpoint)
        except ValueError as error:
            refusal = str(error)
            assert refusal.startswith("a.ckpt: ")
            assert "expected" in refusal
            assert len(refusal.splitlines()) == 1
            assert right_kind or f"{option}: found" in refusal, refusal
        else:
            assert right_kind, value  # a few of these values are right
            assert value == value
            assert value in (True, 1, 0.5, getattr(network.options, option)), value


def test_a_header_that_asks_for_a_million_layers_is_refused_in_words(tiny, tmp_path: Path) -> None:
    network = tiny()
    for option in ("encoder_layers", "decoder_layers", "memory_frames", "num_queries", "dim"):
        options = {**vars(network.options), option: 8 * 10**6}
        checkpoints.write(Checkpoint(options, network.state_dict()), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=rf"{option}: found 8000000, expected at least 1 and at most \d+$"):
            InstanceFormer.from_checkpoint(tmp_path / "a.safetensors")


def test_a_few_numbers_that_seem_many_are_refused_before_room_is_made_for_them(tiny) -> None:
    network = tiny()
    weights = network.state_dict()
    for name in ("query_content", "query_position"):
        weights[name] = torch.ones(()).expand(10**5, 32)
    checkpoint = Checkpoint({**vars(network.options), "num_queries": 10**5}, weights)
    with pytest.raises(ValueError, match=r"fewer numbers for query_content than its shape \(100000, 32\) has"):
        InstanceFormer.from_checkpoint(checkpoint)


def test_other_values_are_known_for_every_option(tiny) -> None:
    assert set(OTHER) == set(vars(tiny().options))


@pytest.mark.parametrize("option", OTHER)
def test_what_changes_the_weights_is_refused_by_name_and_nothing_else(tiny, option: str) -> None:
    network = tiny()
    needs = {"min_confidence": 0.3} if option in ("free_queries", "class_history", "identity") else {}
    other = tiny(**{option: OTHER[option], **needs})
    theirs, ours = ({name: x.shape for name, x in n.state_dict().items()} for n in (network, other))
    checkpoint = Checkpoint(vars(network.options), network.state_dict(), name="x.ckpt")
    if theirs == ours:
        checkpoint.check_network(vars(other.options), other.state_dict())
        other.load_state_dict(network.state_dict())
    else:
        value = getattr(network.options, option)
        value = str(value).lower() if isinstance(value, bool) else value
        with pytest.raises(ValueError, match=rf"^x\.ckpt: made .*--model\.network\.{option}={value}$"):
            checkpoint.check_network(vars(other.options), other.state_dict())


def test_a_checkpoint_of_before_identity_says_how_to_go_on(tiny) -> None:
    old, new = tiny(), tiny(identity="recover", min_confidence=0.3)
    options = {name: value for name, value in vars(old.options).items() if name != "identity"}
    checkpoint = Checkpoint(options, old.state_dict(), name="x.ckpt")
    checkpoint.check_network(vars(old.options), old.state_dict())
    with pytest.raises(ValueError, match=r"made with identity=none, found recover; .*--model\.network\.identity=none$"):
        checkpoint.check_network(vars(new.options), new.state_dict())


def test_classes_come_first_with_their_names_where_a_network_is_another(tiny) -> None:
    network, other = tiny(), tiny(25, dim=64, min_confidence=0.2)
    checkpoint = Checkpoint(vars(network.options), network.state_dict(), CATEGORIES, name="x.ckpt")
    with pytest.raises(ValueError) as refusal:
        checkpoint.check_network(vars(other.options), other.state_dict())
    assert str(refusal.value) == (
        "x.ckpt: made for 5 classes (kind 0, kind 1, kind 2, kind 3, kind 4), found 25 in model.network.num_classes; "
        "made with dim=32, found 64; give the options it was trained with: --model.network.num_classes=5 "
        "--model.network.dim=32"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_a_training_ruined_are_refused_for_a_network_that_fits(tiny, value: float) -> None:
    network = tiny()
    weights = {**network.state_dict(), "decoder.class_heads.0.bias": torch.full((5,), value)}
    checkpoint = checkpoints.from_content(Checkpoint(vars(network.options), weights).to_lightning(), "x.ckpt")
    with pytest.raises(ValueError, match=r"^x\.ckpt: found NaN or infinity in decoder.class_heads.0.bias, expected"):
        checkpoint.check_network(vars(network.options), network.state_dict())


def test_other_categories_than_the_datas_are_refused() -> None:
    checkpoint = Checkpoint({"num_classes": 5}, {}, CATEGORIES, name="x.ckpt")
    with warnings.catch_warnings(action="error"):
        checkpoint.check_categories(list(CATEGORIES))
        checkpoint.check_categories([Category(c.id + 100, c.name) for c in CATEGORIES])  # classes have their own order
    reordered = [Category(c.id, other.name) for c, other in zip(CATEGORIES, CATEGORIES[::-1], strict=True)]
    for data, message in (
        (reordered, r"class 0: made for 'kind 0' \(id 0\), found 'kind 4' \(id 0\), expected the same names in the"),
        (CATEGORIES[::-1], "class 0: made for 'kind 0'"),
        ([Category(0, "star"), *CATEGORIES[1:]], "class 0: made for 'kind 0' .* found 'star'"),
        (CATEGORIES[:4], r"classes \(kind 0, .*\), found 4 in the data \(kind 0, .*\); expected the same"),
        ([Category(c.id, c.name) for c in CATEGORIES[:3]] + [Category(12, "kind 3"), Category(9, "kind 4")], "class 3"),
    ):
        with pytest.raises(ValueError, match=rf"^x\.ckpt: made for 5 .*{message}"):
            checkpoint.check_categories(data)


def test_a_checkpoint_that_knows_no_classes_says_so() -> None:
    with pytest.warns(UserWarning, match=r"x\.ckpt: does not say what its classes are; .*: kind 0, .*, kind 4$"):
        Checkpoint({"num_classes": 5}, {}, name="x.ckpt").check_categories(CATEGORIES)


def named(*names: str) -> tuple[Category, ...]:
    return tuple(Category(10 * i, name) for i, name in enumerate(names, start=1))


def taken(
    tiny: Callable[..., InstanceFormer], ours: tuple[Category, ...], theirs: tuple[Category, ...], **options: object
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], str]:
    """State dicts of our network before, of theirs, of ours after, and what is said."""
    before = tiny(len(ours), **options).state_dict()
    source = tiny(len(theirs))
    after, said = take_over(before, ours, Checkpoint(vars(source.options), source.state_dict(), theirs))
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
    after, found = take_over(ours, named("cat", "dog"), Checkpoint(vars(source.options), source.state_dict(), theirs))
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
