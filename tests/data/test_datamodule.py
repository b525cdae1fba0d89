from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from instanceformer.data.augment import Augmentation
from instanceformer.data.batch import ClipBatch, VideoChunk
from instanceformer.data.datamodule import Split, VideoDataModule

PLAIN = Augmentation(sizes=(), crop=0)


def split_of(tiny: Any) -> Split:
    return Split(tiny.annotations, tiny.images)


@pytest.fixture
def data(tiny_dataset: Callable[..., Any]) -> VideoDataModule:
    train, valid = split_of(tiny_dataset(lengths=(6, 5))), split_of(tiny_dataset(lengths=(7, 3), name="valid"))
    return VideoDataModule(
        train, valid, augmentation=PLAIN, batch_size=2, clip_frames=3, chunk_frames=4, eval_size=24, num_workers=0
    )


def test_loaders_give_clips_and_chunks(data: VideoDataModule) -> None:
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 5  # of 11 clips; an incomplete batch is left out
    assert all(isinstance(batch, ClipBatch) for batch in batches)
    assert batches[0].frames.shape == (2, 3, 3, 24, 40)
    chunks = list(data.val_dataloader())
    assert all(isinstance(chunk, VideoChunk) for chunk in chunks)
    assert [(chunk.video_id, chunk.start) for chunk in chunks] == [(1, 0), (1, 4), (2, 0)]


def test_categories_are_known_before_setup(data: VideoDataModule) -> None:
    assert data.num_classes == 2
    assert data.category_names == ["three", "seven"]
    assert data.annotations_path("validate").parent.name == "valid"
    assert data.annotations_path("fit").parent.name == "tiny"


class Recorder(LightningModule):
    """A module that keeps what it is given."""

    def __init__(self, num_classes: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, num_classes)
        self.seen: list[Any] = []

    def training_step(self, batch: ClipBatch) -> Tensor:
        self.seen.append(batch)
        return self.layer(batch.frames.mean()[None]).sum()

    def validation_step(self, batch: VideoChunk) -> None:
        self.seen.append(batch)

    test_step = validation_step
    predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **quiet, **options)


@pytest.mark.filterwarnings("error:Your `IterableDataset` has")
def test_trainer_runs_every_stage(data: VideoDataModule) -> None:
    data.splits["test"] = data.splits["predict"] = data.splits["valid"]
    module = Recorder()
    runner = trainer(max_epochs=1, num_sanity_val_steps=0)
    runner.fit(module, data)
    kinds = [type(batch) for batch in module.seen]
    assert kinds == [ClipBatch] * 5 + [VideoChunk] * 3
    for run in (runner.validate, runner.test, runner.predict):
        module.seen.clear()
        run(module, data)
        assert [(chunk.video_id, chunk.start) for chunk in module.seen] == [(1, 0), (1, 4), (2, 0)]


def test_fit_without_a_validation_split(data: VideoDataModule) -> None:
    data.splits["valid"] = None
    module = Recorder()
    trainer(max_epochs=1).fit(module, data)
    assert len(module.seen) == 5


def test_command_line_sets_every_option_and_links_the_number_of_classes(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()

    class Cli(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    config = tiny.annotations.parent / "config.yaml"
    config.write_text(
        f"data:\n  train: {{annotations: {tiny.annotations}, images: {tiny.images}}}\n"
        "  augmentation: {sizes: [96, 128], crop: 0}\n  clips_per_video: 2\n"
    )
    args = ["--config", str(config), "--data.augmentation.flip", "0", "--data.clip_range=5", "--data.batch_size=3"]
    args += ["--data.valid.annotations", str(tiny.annotations), "--data.valid.images", str(tiny.images)]
    cli = Cli(Recorder, VideoDataModule, run=False, save_config_callback=None, args=args)
    data = cli.datamodule
    assert data.splits["train"] == data.splits["valid"] == Split(tiny.annotations, tiny.images)
    assert data.splits["test"] is None
    assert data.augmentation == Augmentation(flip=0, sizes=(96, 128), crop=0)
    assert (data.clips_per_video, data.clip_range, data.batch_size, data.clip_frames) == (2, 5, 3, 4)
    assert cli.model.layer.out_features == 2


def test_missing_split_is_named(data: VideoDataModule) -> None:
    with pytest.raises(ValueError, match=r"data\.test is not given; expected its `annotations`"):
        data.setup("test")
    with pytest.raises(ValueError, match="none of train, valid, test and predict is given"):
        _ = VideoDataModule().num_classes


def test_missing_annotation_file_is_named(data: VideoDataModule, tmp_path: Path) -> None:
    data.splits["valid"] = Split(tmp_path / "none.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such annotation file"):
        data.setup("fit")


def test_missing_frames_are_found_before_training(data: VideoDataModule) -> None:
    assert data.splits["valid"] is not None
    (data.splits["valid"].images / "v1" / "00000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.valid: .*v1/00000\.jpg, the first frame of video 2 .*images ="):
        data.setup("fit")


def test_different_categories_are_refused(tiny_dataset: Callable[..., Any]) -> None:
    train, valid = tiny_dataset(), tiny_dataset(name="valid")
    valid.content["categories"].append({"id": 5, "name": "five"})
    valid.write()
    data = VideoDataModule(split_of(train), split_of(valid))
    with pytest.raises(ValueError, match=r"data\.valid: the categories .* not those of data\.train.*name='five'"):
        data.setup("fit")


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_files_without_annotations_are_for_prediction_only(tiny_dataset: Callable[..., Any], stage: str) -> None:
    tiny = tiny_dataset()
    del tiny.content["annotations"]
    tiny.write()
    split = split_of(tiny)
    data = VideoDataModule(split, split, split, split, num_workers=0)
    with pytest.raises(ValueError, match=r"annotations\.json has no annotations; .*give such a file as data\.predict"):
        data.setup(stage)
    data.setup("predict")
    assert len(list(data.predict_dataloader())) == 2


def test_too_few_clips_for_a_batch_are_refused(tiny_dataset: Callable[..., Any]) -> None:
    data = VideoDataModule(split_of(tiny_dataset()), batch_size=3, clips_per_video=1)
    with pytest.raises(ValueError, match=r"data\.train: 2 clips an epoch are too few for one batch of 3"):
        data.setup("fit")


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.eval_size: expected 1 or more, found 0"):
        VideoDataModule(eval_size=0)


def test_davis_clips_and_streams(shared: Path) -> None:
    root = shared / "real" / "davis-mini"
    images = root / "JPEGImages"
    data = VideoDataModule(
        Split(root / "train.json", images), Split(root / "valid.json", images), batch_size=2, num_workers=0
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.frames.shape[:3] == (2, 4, 3)
    assert max(batch.frames.shape[-2:]) <= 768
    assert all(len(targets.labels) == 1 for targets in batch.targets)
    chunk = next(iter(data.val_dataloader()))
    assert chunk.frames.shape == (1, 6, 3, 360, 640)
    assert chunk.size == (240, 427)
    assert len(data.val_dataloader()) == 52
