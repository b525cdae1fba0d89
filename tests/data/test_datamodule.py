from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import ConcatDataset

from instanceformer.data.augment import Augmentation
from instanceformer.data.batch import ClipBatch, VideoChunk
from instanceformer.data.clips import ClipDataset
from instanceformer.data.datamodule import JointImages, Split, VideoDataModule
from instanceformer.data.pseudo_video import PseudoClips, PseudoVideo

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
    assert [category.name for category in data.categories] == ["three", "seven"]
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
    args = ["--config", str(config), "--data.augmentation.flip", "0", "--data.clip_step=5", "--data.batch_size=3"]
    args += ["--data.root", str(tiny.images), "--data.name=ovis", "--data.far_frames=2", "--data.joint.share=0.25"]
    args += ["--data.joint.pseudo_video.rotation=5", "--data.joint.augmentation={sizes: [480, 768], max_size: 1333}"]
    args += ["--data.valid.annotations", str(tiny.annotations), "--data.valid.images", str(tiny.images)]
    cli = Cli(Recorder, VideoDataModule, run=False, save_config_callback=None, args=args)
    data = cli.datamodule
    assert data.splits["train"] == data.splits["valid"] == Split(tiny.annotations, tiny.images)
    assert data.splits["test"] is None
    images = Augmentation(sizes=(480, 768), max_size=1333)
    assert data.joint == JointImages(share=0.25, pseudo_video=PseudoVideo(rotation=5), augmentation=images)
    assert (data.dataset_name, data.far_frames) == ("ovis", 2)
    assert data.augmentation == Augmentation(flip=0, sizes=(96, 128), crop=0)
    assert (data.clips_per_video, data.clip_step, data.batch_size, data.clip_frames) == (2, 5, 3, 4)
    assert cli.model.layer.out_features == 2


def test_missing_split_is_named(data: VideoDataModule) -> None:
    with pytest.raises(ValueError, match=r"data\.test is not given; expected its `annotations`"):
        data.setup("test")
    with pytest.raises(ValueError, match="none of name, train, valid, test and predict is given"):
        _ = VideoDataModule().num_classes


def test_missing_annotation_file_is_named(data: VideoDataModule, tmp_path: Path) -> None:
    data.splits["valid"] = Split(tmp_path / "none.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
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


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_training_and_validation_need_annotations(tiny_dataset: Callable[..., Any], stage: str) -> None:
    tiny = tiny_dataset()
    del tiny.content["annotations"]
    tiny.write()
    split = split_of(tiny)
    data = VideoDataModule(split, split, split, split, num_workers=0)
    with pytest.raises(ValueError, match=r"annotations\.json has no annotations; .*give such a file as data\.test or"):
        data.setup(stage)
    for other, loader in (("test", data.test_dataloader), ("predict", data.predict_dataloader)):
        data.setup(other)
        assert len(list(loader())) == 2


def test_videos_of_unknown_frames_are_refused(tiny_dataset: Callable[..., Any]) -> None:
    tiny = tiny_dataset()
    del tiny.content["videos"][1]["file_names"]
    tiny.write()
    with pytest.raises(ValueError, match=r"data\.predict: video 2 of .*annotations\.json has no file_names"):
        VideoDataModule(predict=split_of(tiny)).setup("predict")


@pytest.fixture
def root(tiny_dataset: Callable[..., Any], tmp_path: Path) -> Path:
    """Small datasets that lie as YouTube-VIS 2019 and COCO unpack: ids and names of the catalog, no valid masks."""
    videos, images = tiny_dataset(lengths=(6, 5), name="videos"), tiny_dataset(lengths=(1, 1, 1), name="images")
    names = {"ytvis19": {3: "lizard", 7: "sedan"}, "coco": {3: "car", 7: "train"}}
    for tiny, name in ((videos, "ytvis19"), (images, "coco")):
        tiny.content["categories"] = [{"id": id_, "name": text} for id_, text in names[name].items()]
    records = images.content.pop("videos")
    images.content["images"] = [{**record, "file_name": record["file_names"][0]} for record in records]
    for annotation in images.content["annotations"]:
        annotation["image_id"], (annotation["segmentation"],) = annotation["video_id"], annotation["segmentations"]
    root = tmp_path / "root"
    for folder in ("ytvis19/train", "ytvis19/valid", "coco/annotations"):
        (root / folder).mkdir(parents=True)
    (root / "ytvis19/train/JPEGImages").symlink_to(videos.images)
    (root / "ytvis19/valid/JPEGImages").symlink_to(videos.images)
    (root / "coco/train2017").symlink_to(images.images)
    (root / "coco/val2017").symlink_to(images.images)
    (root / "ytvis19/train.json").write_text(json.dumps(videos.content))
    del videos.content["annotations"]
    (root / "ytvis19/valid.json").write_text(json.dumps(videos.content))
    for split in ("train", "val"):
        (root / f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(images.content))
    return root


def test_a_dataset_of_the_catalog_needs_only_root_and_name(root: Path) -> None:
    data = VideoDataModule(
        root=root, name="ytvis19", augmentation=PLAIN, batch_size=2, clip_frames=3, eval_size=24, num_workers=0
    )
    assert data.num_classes == 40
    data.setup("fit")
    assert [category.name for category in data.categories] == ["lizard", "sedan"]
    assert len(list(data.train_dataloader())) == 5
    assert data.val_dataloader() == []
    for stage in ("test", "predict"):
        data.setup(stage)
        assert data.annotations_path(stage) == root / "ytvis19/valid.json"
    assert [chunk.video_id for chunk in data.test_dataloader()] == [1, 2]


def test_images_train_as_clips_of_one_frame_and_validate(root: Path) -> None:
    data = VideoDataModule(root=root, name="coco", augmentation=PLAIN, clip_frames=1, eval_size=24, num_workers=0)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [batch.frames.shape for batch in batches] == [(1, 1, 3, 24, 40)] * 3
    assert all(batch.targets.labels.tolist() == [[0, 1]] for batch in batches)
    assert [(chunk.video_id, chunk.length) for chunk in data.val_dataloader()] == [(1, 1), (2, 1), (3, 1)]


def test_videos_and_images_are_trained_on_together(root: Path) -> None:
    joint = JointImages(share=0.75)
    data = VideoDataModule(
        root=root, name="ytvis19", joint=joint, augmentation=PLAIN, clip_frames=3, clips_per_video=2, num_workers=0
    )
    data.setup("fit")
    labels = [batch.targets.labels[0].tolist() for batch in data.train_dataloader()]
    assert len(labels) == 16
    # a video shows a lizard and a sedan, an image a car, which is the sedan, and a train, which these videos lack
    assert sorted(labels) == [[0, 1]] * 4 + [[1]] * 12


def test_every_option_reaches_the_training_clips(tiny_dataset: Callable[..., Any]) -> None:
    videos, images = split_of(tiny_dataset(lengths=(9, 8))), split_of(tiny_dataset(lengths=(1, 1), name="images"))
    augmentation, pseudo_video = Augmentation(flip=0.25, sizes=(20,), crop=0), PseudoVideo(rotation=5)
    data = VideoDataModule(
        videos,
        joint=JointImages(0.5, images, pseudo_video),
        augmentation=augmentation,
        clip_frames=3,
        clip_step=7,
        far_frames=2,
        clips_per_video=4,
        max_size=33,
        num_workers=0,
    )
    together = data.train_dataloader().dataset.clips
    assert isinstance(together, ConcatDataset)
    clips, pseudo_clips = together.datasets
    assert isinstance(clips, ClipDataset)
    assert isinstance(pseudo_clips, PseudoClips)
    assert (len(clips), len(pseudo_clips)) == (8, 8)
    assert (clips.images, pseudo_clips.images) == (videos.images, images.images)
    assert (clips.clip_frames, clips.clip_step, clips.far_frames) == (3, 7, 2)
    assert (pseudo_clips.clip_frames, pseudo_clips.pseudo_video) == (3, pseudo_video)
    for part in (clips, pseudo_clips):
        assert (part.augmentation, part.max_size) == (augmentation, 33)


def test_images_may_have_sizes_of_their_own(tiny_dataset: Callable[..., Any]) -> None:
    videos, images = split_of(tiny_dataset()), split_of(tiny_dataset(lengths=(1, 1), name="images"))  # of 24x40 pixels
    joint = JointImages(split=images, augmentation=replace(PLAIN, sizes=(48,), max_size=70))
    data = VideoDataModule(videos, joint=joint, augmentation=replace(PLAIN, sizes=(12,)), max_size=18, num_workers=0)
    data.setup("fit")
    shapes = [tuple(batch.frames.shape[-2:]) for batch in data.train_dataloader()]
    assert Counter(shapes) == {(11, 18): len(shapes) // 2, (42, 70): len(shapes) // 2}


def test_images_of_a_split_of_their_own_are_looked_for_before_training(
    tiny_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    videos, images = tiny_dataset(), tiny_dataset(lengths=(1, 1), name="images")
    # the root, which has no COCO, does not matter then
    data = VideoDataModule(split_of(videos), root=tmp_path, joint=JointImages(split=split_of(images)), num_workers=0)
    data.setup("fit")
    (images.images / "v1" / "00000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.joint: .*images/v1/00000\.jpg, the first frame of video 2 "):
        data.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ovis"}, r"data\.root: found none, expected .* which data\.name=ovis needs"),
        ({"joint": JointImages()}, r"data\.root: found none, expected .* which data\.joint without a split needs"),
    ],
)
def test_what_lies_under_the_root_needs_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoDataModule(**options)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_images_is_a_fraction(share: float) -> None:
    with pytest.raises(ValueError, match=r"data\.joint\.share: expected a fraction between 0 and 1"):
        JointImages(share=share)


def test_too_few_clips_for_a_batch_are_refused(tiny_dataset: Callable[..., Any]) -> None:
    data = VideoDataModule(split_of(tiny_dataset()), batch_size=3, clips_per_video=1)
    with pytest.raises(ValueError, match=r"data\.train: 2 clips an epoch are too few for one batch of 3"):
        data.setup("fit")


def test_every_device_needs_clips_for_its_batch(tiny_dataset: Callable[..., Any]) -> None:
    data = VideoDataModule(split_of(tiny_dataset()), batch_size=2, clips_per_video=1)
    data.trainer = trainer()
    data.setup("fit")
    data.trainer = trainer(devices=2, strategy="ddp")
    with pytest.raises(ValueError, match=r"2 clips an epoch are too few for one batch of 4 \(batch_size 2 on each"):
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
    assert batch.targets.labels.shape == (2, 1)
    chunk = next(iter(data.val_dataloader()))
    assert chunk.frames.shape == (1, 6, 3, 360, 640)
    assert chunk.size == (240, 427)
    assert len(data.val_dataloader()) == 52
