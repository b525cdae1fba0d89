from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins import TorchCheckpointIO

from instanceformer import InstanceFormer, checkpoints
from instanceformer.checkpoints import Checkpoint, DamagedError, FrameSize, load_for_trainer
from instanceformer.checkpoints.convert import convert_file
from instanceformer.cli import main
from instanceformer.data.annotations import Category
from instanceformer.data.augment import Augmentation
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


def test_cut_off_safetensors_say_so(tiny, tmp_path: Path) -> None:
    network = tiny()
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: no such file"):
        checkpoints.read(path)
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint", bytes(4096)):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=r"a\.safetensors: a damaged safetensors file"):
            load_for_trainer(path)


def test_files_of_something_else_say_what_was_expected(tiny, tmp_path: Path) -> None:
    network = tiny()
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"no 'network_options' but model; .*instanceformer convert"):
        InstanceFormer.from_checkpoint(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="found list, expected a dictionary"):
        checkpoints.read(tmp_path / "b.pth")
    torch.save({"network_options": vars(network.options), "state_dict": None}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="not whole; state_dict: found NoneType, expected a dictionary"):
        checkpoints.read(tmp_path / "c.ckpt")
    for wrong, message in (
        ({"wormholes": 3}, "options that no network of this version has; .*wormholes"),
        ({"dim": 33}, "options that no network of this version has; dim: found 33"),
        ({"dim": 64}, r"found shape \(.*32.*\) for .*, expected"),
        ({"memory": False}, "has too many 14 weights, such as memory"),
        ({"encoder_layers": 2}, r"lacks 16 weights, such as encoder\.layers\.1"),
    ):
        checkpoints.write(Checkpoint({**vars(network.options), **wrong}, network.state_dict()), tmp_path / "d.ckpt")
        for use in (InstanceFormer.from_checkpoint, lambda path: convert_file(path, tmp_path / "e.safetensors")):
            with pytest.raises(ValueError, match=rf"d\.ckpt: {message}") as refusal:
                use(tmp_path / "d.ckpt")
            assert "\n" not in str(refusal.value)
    assert not (tmp_path / "e.safetensors").exists()
    weights = network.state_dict()
    for value, message in ((torch.full((5,), torch.nan), "NaN or infinity in decoder"), (5, "found int for decoder")):
        broken = Checkpoint(vars(network.options), {**weights, "decoder.class_heads.0.bias": value})
        with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
            InstanceFormer.from_checkpoint(broken)
    with pytest.raises(ValueError, match=r"found suffix '\.pt', expected \.ckpt or \.safetensors"):
        checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), tmp_path / "e.pt")


def content_of(network: InstanceFormer, **entries: object) -> dict[str, object]:
    """As ``load`` gives it, with other entries."""
    return {**Checkpoint(vars(network.options), network.state_dict(), CATEGORIES).to_lightning(), **entries}


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
        content = content_of(network, network_options={**vars(network.options), option: value}, categories=[])
        checkpoint = checkpoints.from_content(content, "a.ckpt")
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


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"categories": "cat"}, "categories: found str, expected a list"),
        ({"categories": 5}, "categories: found int, expected a list"),
        ({"categories": ["cat"]}, r"categories\[0\]: found str, expected a dictionary"),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: found id, expected id and name"),
        ({"categories": [{"id": "1", "name": "a"}]}, r"categories\[0\].id: found '1' of type str, expected a whole"),
        ({"categories": [{"id": True, "name": "a"}]}, r"id: found True of type bool, expected a whole number"),
        ({"categories": [{"id": math.nan, "name": "a"}]}, "id: found nan of type float, expected a whole number"),
        ({"categories": [{"id": 1, "name": None}]}, r"name: found None of type NoneType, expected text"),
        ({"categories": [{"id": 10**30, "name": "a"}]}, "found an id or a name that is too long"),
        ({"categories": [{"id": 1, "name": "a" * 10**6}]}, "found an id or a name that is too long"),
        ({"categories": [{"id": 1, "name": "a"}] * 5}, "found an id twice"),
        ({"categories": [{"id": 1, "name": "a"}]}, "categories: found 1, expected one for each of 5 classes"),
        ({"frame_size": 360}, "frame_size: found int, expected a dictionary"),
        ({"frame_size": {"size": 360}}, "frame_size: found size, expected size and max_size"),
        (
            {"frame_size": {"size": "360", "max_size": 768}},
            "frame_size.size: found '360' of type str, expected a whole",
        ),
        ({"frame_size": {"size": 0, "max_size": 768}}, "frame_size.size: found 0, expected at least 1 pixel"),
        ({"frame_size": {"size": 96, "max_size": -1}}, "frame_size.max_size: found -1, expected at least 1 pixel"),
        ({"frame_size": {"size": True, "max_size": 768}}, "frame_size.size: found True of type bool"),
        ({"frame_size": {"size": 10**9, "max_size": 10**9}}, "frame_size.size: found 1000000000, expected at most"),
        ({"inference": ["any_frame"]}, "inference: found list, expected a dictionary"),
        ({"inference": {3: 4}}, "inference: found dict, expected a dictionary of values by name"),
        ({"network_options": 3}, "network_options: found int, expected a dictionary"),
        ({"state_dict": {1: torch.ones(1)}}, "state_dict: found dict, expected a dictionary of values by name"),
    ],
)
def test_entries_of_a_wrong_kind_are_refused_in_words(tiny, entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.ckpt: a checkpoint that is not whole; .*{message}") as refusal:
        checkpoints.from_content(content_of(tiny(), **entries), "a.ckpt")
    assert len(str(refusal.value)) < 400


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
