"""The datasets of one experiment, as Lightning's Trainer and command line use them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from instanceformer.data.annotations import Category, VideoDataset, read_youtube_vis
from instanceformer.data.augment import Augmentation
from instanceformer.data.batch import ClipTargets, VideoChunk
from instanceformer.data.clips import ClipDataset, collate_clips
from instanceformer.data.streaming import StreamingVideos

SplitName = Literal["train", "valid", "test", "predict"]
SPLIT_OF_STAGE: dict[str, SplitName] = {"fit": "train", "validate": "valid", "test": "test", "predict": "predict"}
PAPER_AUGMENTATION = Augmentation()


@dataclass(frozen=True)
class Split:
    """Where one part of a dataset lies.

    Attributes:
        annotations: JSON file in YouTube-VIS format.
        images: folder that the file names in it are relative to.
    """

    annotations: Path
    images: Path


class VideoDataModule(LightningDataModule):
    """Training clips, and streams of whole videos for validation, test and prediction.

    Args:
        train: split to train on; must have annotations.
        valid: split to validate on; must have annotations.
        test: split to test on; must have annotations.
        predict: split to write results for; its annotations, if any, are not used.
        augmentation: random changes of the training clips.
        batch_size: training clips of each process.
        clip_frames: frames of a training clip.
        clip_range: a clip's frames lie within a window of this many consecutive frames; none: anywhere in the video.
        clips_per_video: clips an epoch has of each video; none: one around each frame in which an instance is visible.
        chunk_frames: frames that evaluation and prediction read at once.
        eval_size: shorter side in pixels of the frames in evaluation and prediction.
        max_size: greatest length in pixels of the longer side, everywhere.
        num_workers: processes that read data, for each loader.
    """

    def __init__(
        self,
        train: Split | None = None,
        valid: Split | None = None,
        test: Split | None = None,
        predict: Split | None = None,
        augmentation: Augmentation = PAPER_AUGMENTATION,
        batch_size: int = 1,
        clip_frames: int = 4,
        clip_range: int | None = None,
        clips_per_video: int | None = None,
        chunk_frames: int = 6,
        eval_size: int = 360,
        max_size: int = 768,
        num_workers: int = 4,
    ) -> None:
        super().__init__()
        options = {
            "batch_size": batch_size,
            "chunk_frames": chunk_frames,
            "eval_size": eval_size,
            "max_size": max_size,
        }
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"data.{name}: expected 1 or more, found {value}")
        self.splits: dict[SplitName, Split | None] = {"train": train, "valid": valid, "test": test, "predict": predict}
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.clip_frames = clip_frames
        self.clip_range = clip_range
        self.clips_per_video = clips_per_video
        self.chunk_frames = chunk_frames
        self.eval_size = eval_size
        self.max_size = max_size
        self.num_workers = num_workers
        self._datasets: dict[SplitName, VideoDataset] = {}

    @property
    def categories(self) -> tuple[Category, ...]:
        """The categories in the order of their class indices, from a split in use or else the first that is given."""
        for dataset in self._datasets.values():
            return dataset.categories
        for name, split in self.splits.items():
            if split is not None:
                return self._dataset(name).categories
        raise ValueError("data: none of train, valid, test and predict is given; expected one at least")

    @property
    def num_classes(self) -> int:
        """Number of categories, K."""
        return len(self.categories)

    @property
    def category_names(self) -> list[str]:
        """Names of the categories by class index."""
        return [category.name for category in self.categories]

    def annotations_path(self, stage: str) -> Path:
        """Annotation file of a stage: fit, validate, test or predict."""
        return self._split(SPLIT_OF_STAGE[stage]).annotations

    def videos(self, stage: str) -> tuple[VideoDataset, Path]:
        """Annotations and folder of images of a stage: fit, validate, test or predict."""
        name = SPLIT_OF_STAGE[stage]
        return self._dataset(name), self._split(name).images

    def setup(self, stage: str) -> None:
        """Read and check what a stage needs: fit (which validates too if it can), validate, test or predict.

        Raises:
            FileNotFoundError: an annotation file or the first frame of a video is missing.
            ValueError: a split is not given, not in the format or without annotations, or two splits differ in their
                categories, or there are too few clips for one batch.
        """
        names = [SPLIT_OF_STAGE[stage]]
        if stage == "fit" and self.splits["valid"] is not None:
            names.append("valid")
        for name in names:
            self._check(name)
        if stage == "fit":
            clips = len(self._clips())
            needed = self.batch_size * (1 if self.trainer is None else self.trainer.world_size)
            if clips < needed:
                raise ValueError(
                    f"data.train: {clips} clips an epoch are too few for one batch of {needed} (batch_size "
                    f"{self.batch_size} on each device); lower batch_size or raise clips_per_video"
                )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ClipTargets]]:
        """Shuffled batches of clips: ClipBatch. An incomplete last batch is left out."""
        return DataLoader(
            self._clips(),
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=collate_clips,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[VideoChunk] | list[DataLoader[VideoChunk]]:
        """The chunks of this rank's share of the validation videos; no loader where no such split is given."""
        return self._stream("valid") if self.splits["valid"] is not None else []

    def test_dataloader(self) -> DataLoader[VideoChunk]:
        """The chunks of this rank's share of the test videos."""
        return self._stream("test")

    def predict_dataloader(self) -> DataLoader[VideoChunk]:
        """The chunks of this rank's share of the videos to predict."""
        return self._stream("predict")

    def _clips(self) -> ClipDataset:
        return ClipDataset(
            self._dataset("train"),
            self._split("train").images,
            clip_frames=self.clip_frames,
            clip_range=self.clip_range,
            clips_per_video=self.clips_per_video,
            augmentation=self.augmentation,
            max_size=self.max_size,
        )

    def _stream(self, name: SplitName) -> DataLoader[VideoChunk]:
        # Lightning warns of any iterable dataset that has a length; the workers of this one do share the chunks.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        videos = StreamingVideos(
            self._dataset(name),
            self._split(name).images,
            chunk_frames=self.chunk_frames,
            size=self.eval_size,
            max_size=self.max_size,
        )
        return DataLoader(
            videos,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _split(self, name: SplitName) -> Split:
        split = self.splits[name]
        if split is None:
            raise ValueError(f"data.{name} is not given; expected its `annotations` file and its folder of `images`")
        return split

    def _dataset(self, name: SplitName) -> VideoDataset:
        if name not in self._datasets:
            self._datasets[name] = read_youtube_vis(self._split(name).annotations)
        return self._datasets[name]

    def _check(self, name: SplitName) -> None:
        split, dataset = self._split(name), self._dataset(name)
        if name != "predict" and not dataset.is_annotated:
            raise ValueError(
                f"data.{name}: {split.annotations} has no annotations; expected some, to train on or to measure "
                "against; give such a file as data.predict, which only writes results"
            )
        for known, other in self._datasets.items():
            if other.categories != dataset.categories:
                unlike = min(set(other.categories) ^ set(dataset.categories), key=lambda category: category.id)
                raise ValueError(
                    f"data.{name}: the categories of {split.annotations} are not those of data.{known}, "
                    f"{self._split(known).annotations}; the first that is not in both is {unlike}. Class indices would "
                    "not mean the same; give both files the same list of categories"
                )
        for video in dataset.videos:
            path = split.images / video.file_names[0]
            if not path.is_file():
                raise FileNotFoundError(
                    f"data.{name}: {path}, the first frame of video {video.id} in {split.annotations}, does not exist; "
                    f"is data.{name}.images = {split.images} the folder that file_names are relative to?"
                )
