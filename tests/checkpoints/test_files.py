from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import safetensors
import torch
from lightning import Trainer

from instanceformer import InstanceFormer, checkpoints
from instanceformer.checkpoints import Checkpoint
from instanceformer.checkpoints.convert import convert_file
from instanceformer.checkpoints.files import load
from instanceformer.cli import main
from instanceformer.data.annotations import Category
from instanceformer.data.datamodule import Split, VideoDataModule
from instanceformer.training.module import InstanceFormerModule

CATEGORIES = tuple(Category(3 * i, f"kind {i}") for i in range(5))


@pytest.mark.parametrize("name", ["a.ckpt", "made/a.safetensors"])
@torch.no_grad()
def test_one_file_is_enough(tiny, tmp_path: Path, name: str) -> None:
    network = tiny(location="refined")
    checkpoints.write(Checkpoint(network.options, network.state_dict(), CATEGORIES), tmp_path / name)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]
    found = checkpoints.read(tmp_path / name)
    assert found.options == network.options
    assert found.categories == CATEGORIES
    assert set(found.weights) == set(network.state_dict())
    loaded = InstanceFormer.from_checkpoint(tmp_path / name)
    frames = torch.randn(1, 2, 3, 64, 96)
    assert not loaded.training
    assert torch.equal(loaded(frames)[0].logits, network(frames)[0].logits)


def test_other_programs_can_read_the_exported_weights(tiny, tmp_path: Path) -> None:
    network = tiny()
    checkpoints.write(Checkpoint(network.options, network.state_dict()), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(network.state_dict())
        assert json.loads(file.metadata()["instanceformer"])["network_options"]["num_classes"] == 5


def test_lightning_saves_what_the_classes_are_and_takes_a_written_file(tiny, tmp_path: Path) -> None:
    main(
        [
            "synthesize",
            str(tmp_path),
            "--train_videos=1",
            "--valid_videos=1",
            "--length=8",
            "--workers=1",
            "--overwrite",
        ]
    )
    data = VideoDataModule(
        valid=Split(tmp_path / "valid.json", tmp_path / "JPEGImages"), eval_size=64, num_workers=0, chunk_frames=2
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, enable_model_summary=False)
    network = tiny(num_classes=4)
    trainer.validate(InstanceFormerModule(network), data, verbose=False)
    trainer.save_checkpoint(tmp_path / "lightning.ckpt")
    found = checkpoints.read(tmp_path / "lightning.ckpt")
    assert found.categories == data.categories
    assert {category.name for category in found.categories} >= {"circle"}

    checkpoints.write(found, tmp_path / "written.ckpt")
    other = InstanceFormerModule(tiny(num_classes=4))
    trainer.validate(other, data, ckpt_path=tmp_path / "written.ckpt", verbose=False)
    assert torch.equal(other.network.query_content, network.query_content)


def test_a_checkpoint_from_before_categories_has_none(tiny, tmp_path: Path) -> None:
    network = tiny()
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "network_options": network.options, "loops": {}}, tmp_path / "a.ckpt")
    assert checkpoints.read(tmp_path / "a.ckpt").categories == ()


def test_categories_are_one_for_each_class() -> None:
    with pytest.raises(ValueError, match="found 5, expected one for each of 4"):
        Checkpoint({"num_classes": 4}, {}, CATEGORIES)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("code of the file ran",)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth: found an object of .*_Fail, which is not loaded, since"):
        load(tmp_path / "trap.pth")


def test_saved_arguments_do_not_keep_weights_from_being_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pth")
    assert torch.equal(load(tmp_path / "a.pth")["model"]["a"], torch.ones(2))


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_damaged_files_say_so(tiny, tmp_path: Path, name: str) -> None:
    network = tiny()
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        checkpoints.read(path)
    checkpoints.write(Checkpoint(network.options, network.state_dict()), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint", bytes(4096)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: .*damaged"):
            checkpoints.read(path)


def test_files_of_something_else_say_what_was_expected(tiny, tmp_path: Path) -> None:
    network = tiny()
    torch.save({"model": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"no 'network_options' but model; .*instanceformer convert"):
        InstanceFormer.from_checkpoint(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="found list, expected a dictionary"):
        checkpoints.read(tmp_path / "b.pth")
    torch.save({"network_options": network.options, "state_dict": None}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="not whole"):
        checkpoints.read(tmp_path / "c.ckpt")
    for wrong, message in (
        ({"wormholes": 3}, "options that no network of this version has; .*wormholes"),
        ({"dim": 33}, "options that no network of this version has; dim: found 33"),
        ({"dim": 64}, r"found shape \(.*32.*\) for .*, expected"),
        ({"memory": False}, "has too many 14 weights, such as memory"),
        ({"encoder_layers": 2}, r"lacks 16 weights, such as encoder\.layers\.1"),
    ):
        checkpoints.write(Checkpoint({**network.options, **wrong}, network.state_dict()), tmp_path / "d.ckpt")
        for use in (InstanceFormer.from_checkpoint, lambda path: convert_file(path, tmp_path / "e.safetensors")):
            with pytest.raises(ValueError, match=rf"d\.ckpt: {message}") as refusal:
                use(tmp_path / "d.ckpt")
            assert "\n" not in str(refusal.value)
    assert not (tmp_path / "e.safetensors").exists()
    weights = network.state_dict()
    for value, message in ((torch.full((5,), torch.nan), "NaN or infinity in decoder"), (5, "found int for decoder")):
        broken = Checkpoint(network.options, {**weights, "decoder.class_heads.0.bias": value})
        with pytest.raises(ValueError, match=f"checkpoint: .*{message}"):
            InstanceFormer.from_checkpoint(broken)
    with pytest.raises(ValueError, match=r"found suffix '\.pt', expected \.ckpt or \.safetensors"):
        checkpoints.write(Checkpoint(network.options, network.state_dict()), tmp_path / "e.pt")
