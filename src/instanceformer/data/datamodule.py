"""The datasets of one experiment, as Lightning's Trainer and command line use them."""

from __future__ import annotations

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from instanceformer.data.annotations import Category, VideoDataset
from instanceformer.data.augment import Augmentation
from instanceformer.data.batch import ClipTargets, VideoChunk
from instanceformer.data.catalog import (
    CATALOG,
    CATALOG_SPLITS,
    SPLIT_OF_STAGE,
    DatasetName,
    Split,
    SplitName,
    locate,
    map_categories,
)
from instanceformer.data.clips import ClipDataset, collate_clips
from instanceformer.data.images import check_frames
from instanceformer.data.packed import open_annotations, pack
from instanceformer.data.pseudo_video import JointImages, PseudoClips
from instanceformer.data.sampling import ClipSampler, SeededClips, leave_signals_to_the_trainer
from instanceformer.data.streaming import RawStream, RawVideo, StreamingVideos, find_videos

PAPER_AUGMENTATION = Augmentation()
SEED = "PL_GLOBAL_SEED"
"""Environment variable in which Lightning's ``seed_everything`` leaves the seed for other processes."""
PAPER_EVAL_SIZE, PAPER_MAX_SIZE = 360, 768


class VideoDataModule(LightningDataModule):
    """Training clips, and streams of whole videos for validation, test and prediction.

    A dataset of the catalog needs only ``root`` and ``name``: its training split is trained on, its validation split
    is tested and predicted, and validated on if it has annotations. A split that is given replaces that split.

    An interrupted training goes on as if it had not been: the clips of a batch, and how they are drawn and augmented,
    follow from the seed (``seed_everything``) and the number of the batch, see ``ClipSampler``.

    Args:
        train: split to train on; must have annotations.
        valid: split to validate on; must have annotations.
        test: split to test on; without annotations its results are written but not measured.
        predict: split to write results for, whose annotations, if any, are not used; or the path of a video file, of a
            folder of images, or of a folder of either, see ``find_videos``, whose classes are then the checkpoint's.
        root: folder with one folder for each dataset, such as ``root/ovis``.
        name: dataset of the catalog.
        joint: images to train on together with the videos; none: videos alone.
        augmentation: random changes of the training clips.
        batch_size: training clips of each process.
        clip_frames: frames of a training clip.
        clip_step: greatest distance between neighboring frames of a clip; none: they lie anywhere in the video.
        far_frames: number of a clip's frames that lie anywhere in the video despite ``clip_step``.
        cuts: fraction of the clips of videos that are cut to another one, as films are, so that identities learn to
            disappear and to return; see ``with_cut``.
        clips_per_video: clips of each video in an epoch; none: one around each frame in which an instance is visible.
        chunk_frames: frames that evaluation and prediction read at once.
        eval_size: shorter side in pixels of the frames in evaluation and prediction; none: that of the evaluated
            checkpoint, or 360.
        max_size: greatest length in pixels of the longer side, unless an augmentation has its ``max_size``; none: that
            of the checkpoint, or 768.
        num_workers: processes that read data, for each loader.
        skip_unreadable: in training, replace a clip with an unreadable image by another, with a warning; their number
            is logged as ``train/replaced_clips``. If false, such an image ends the training.
        outside_images: allow file names and links that lead out of a split's folder of images.

    Attributes:
        seed: of the training data: that of ``seed_everything``, or else the checkpoint's, or torch's.
        given_sizes: ``eval_size`` and ``max_size`` as they were given.
        skip: ids of videos that test and predict leave out, empty after ``setup``; given before the loaders are made.
        raw_videos: those to predict where ``predict`` is a path, once ``setup`` was called.
    """

    def __init__(
        self,
        train: Split | None = None,
        valid: Split | None = None,
        test: Split | None = None,
        predict: Split | Path | None = None,
        root: Path | None = None,
        name: DatasetName | None = None,
        joint: JointImages | None = None,
        augmentation: Augmentation = PAPER_AUGMENTATION,
        batch_size: int = 1,
        clip_frames: int = 4,
        clip_step: int | None = None,
        far_frames: int = 0,
        cuts: float = 0.0,
        clips_per_video: int | None = None,
        chunk_frames: int = 6,
        eval_size: int | None = None,
        max_size: int | None = None,
        num_workers: int = 4,
        skip_unreadable: bool = False,
        outside_images: bool = False,
    ) -> None:
        super().__init__()
        names = ("batch_size", "chunk_frames", "eval_size", "max_size")
        for option, value in zip(names, (batch_size, chunk_frames, eval_size, max_size), strict=True):
            if value is not None and value < 1:
                raise ValueError(f"data.{option}: expected 1 or more, found {value}")
        if root is None and (name is not None or (joint is not None and joint.split is None)):
            found = f"data.name={name}" if name is not None else "data.joint without a split"
            raise ValueError(f"data.root: found none, expected the folder of all datasets, which {found} needs")
        self.root, self.dataset_name, self.joint = root, name, joint
        self._predicted_path = predict if isinstance(predict, Path) else None
        self.splits: dict[SplitName, Split | None] = {"train": train, "valid": valid, "test": test}
        self.splits["predict"] = predict if isinstance(predict, Split) else None
        self.augmentation, self.batch_size, self.num_workers = augmentation, batch_size, num_workers
        self.clip_frames, self.clip_step, self.far_frames = clip_frames, clip_step, far_frames
        self.cuts, self.clips_per_video, self.chunk_frames = cuts, clips_per_video, chunk_frames
        self.given_sizes = (eval_size, max_size)
        self.eval_size, self.max_size = eval_size or PAPER_EVAL_SIZE, max_size or PAPER_MAX_SIZE
        self.skip_unreadable, self.outside_images = skip_unreadable, outside_images
        self.seed = 0
        self.training_clips: SeededClips | None = None  # once there is a loader of them
        self.skip: frozenset[int] = frozenset()
        self.raw_videos: list[RawVideo] = []
        self._datasets: dict[SplitName, VideoDataset] = {}

    @property
    def categories(self) -> tuple[Category, ...]:
        """The categories in the order of their class indices, from a split in use or else the first that is given.

        Empty once ``setup`` took videos that have no annotations.
        """
        if self.raw_videos:
            return ()
        for dataset in self._datasets.values():
            return dataset.categories
        for name, split in self.splits.items():
            if split is not None:
                return self._dataset(name).categories
        if self.dataset_name is not None:
            return CATALOG[self.dataset_name].categories
        raise ValueError("data: none of name, train, valid, test and predict is given; expected one at least")

    @property
    def num_classes(self) -> int:
        """Number of categories, K."""
        return len(self.categories)

    @property
    def category_names(self) -> list[str]:
        """Names of the categories by class index."""
        return [category.name for category in self.categories]

    def count_classes(self, stage: str) -> int | None:
        """Number of categories of a stage's annotations, before ``setup``; None where no annotations are given."""
        alone = stage == "predict" and self._predicted_path is not None
        is_given = self.splits[SPLIT_OF_STAGE[stage]] is not None or (self.root and self.dataset_name)
        return self.videos(stage)[0].num_classes if is_given and not alone else None

    def ground_truth(self, stage: str) -> VideoDataset | None:
        """Annotations that the validation of fit or validate, or test, is measured against; None if there are none."""
        if stage == "predict" or (stage == "fit" and not self._validates):
            return None
        dataset = self._dataset("test" if stage == "test" else "valid")
        return dataset if dataset.is_annotated else None

    def annotations_path(self, stage: str) -> Path:
        """Annotation file of a stage: fit, validate, test or predict."""
        return self._split(SPLIT_OF_STAGE[stage]).annotations

    def video_ids(self, stage: str) -> list[int]:
        """Ids of the videos of a stage: test or predict."""
        return [video.id for video in self.raw_videos or self.videos(stage)[0].videos]

    def videos(self, stage: str) -> tuple[VideoDataset, Path]:
        """Annotations and folder of images of a stage: fit, validate, test or predict."""
        name = SPLIT_OF_STAGE[stage]
        return self._dataset(name), self._split(name).images

    def setup(self, stage: str) -> None:
        """Read and check what a stage needs: fit (which validates too if it can), validate, test or predict.

        Raises:
            FileNotFoundError: an annotation file or the first frame of a video is missing.
            ValueError: a split is not given, not in the format or without annotations, or two splits differ in their
                categories, there are too few clips for one batch, or a frame lies outside the images' folder.
        """
        self.raw_videos, self.skip = [], frozenset()
        if stage == "predict" and self._predicted_path is not None:
            self.raw_videos = find_videos(self._predicted_path)
            return
        names = [SPLIT_OF_STAGE[stage]]
        if stage == "fit" and self._validates:
            names.append("valid")
        for name in names:
            self._check(name)
        if stage == "fit":
            if self.joint is not None:
                images = pack(self._joint_images.videos).without_instances()
                check_frames("data.joint", images, self._joint_split, self.outside_images)
            self.seed = int(os.environ.get(SEED, torch.initial_seed()))
            if self.trainer is not None:
                self.seed = self.trainer.strategy.broadcast(self.seed)
            clips = len(self._clips)
            needed = self.batch_size * self._processes
            if clips < needed:
                raise ValueError(
                    f"data.train: {clips} clips an epoch are too few for one batch of {needed} (batch_size "
                    f"{self.batch_size} on each device); lower batch_size or raise clips_per_video"
                )

    def adopt_sizes(self, eval_size: int, max_size: int) -> None:
        """Take the sizes of a checkpoint, in pixels, where none were given."""
        given_eval_size, given_max_size = self.given_sizes
        self.eval_size, self.max_size = given_eval_size or eval_size, given_max_size or max_size

    def state_dict(self) -> dict[str, Any]:
        """What the order of the training clips follows from, for a checkpoint."""
        return {
            "seed_everything": self.seed,
            "data.batch_size": self.batch_size,
            "number of processes": self._processes,
            "number of clips in an epoch": len(self._clips),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See that a resumed training goes on with the clips that it would have had.

        Raises:
            ValueError: something that their order follows from is not as it was.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        if SEED not in os.environ:  # none was given
            self.seed = state_dict.get("seed_everything", self.seed)
        for name, value in self.state_dict().items():
            if state_dict.get(name) != value:
                raise ValueError(
                    f"{name}: found {value}, expected {state_dict.get(name)} as in the checkpoint: a training that is "
                    "resumed goes on with the batches that it would have had; to begin another with its weights, give "
                    "the checkpoint as --model.init_from"
                )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ClipTargets]]:
        """Shuffled batches of clips: ClipBatch. It begins with the first one that the training has not begun."""
        # Lightning warns of loaders without a state; this one follows the trainer's count of batches
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        trainer, clips = self.trainer, self._clips
        self.training_clips = SeededClips(clips, self.skip_unreadable)
        return DataLoader(
            self.training_clips,
            batch_size=self.batch_size,
            sampler=ClipSampler(
                len(clips),
                batch_size=self.batch_size,
                seed=self.seed,
                begun=lambda: 0 if trainer is None else trainer.fit_loop.total_batch_idx + 1,
                rank=0 if trainer is None else trainer.global_rank,
                world_size=self._processes,
            ),
            drop_last=True,
            collate_fn=collate_clips,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[VideoChunk] | list[DataLoader[VideoChunk]]:
        """The chunks of this rank's share of the validation videos; no loader where no such split is given."""
        return self._stream("valid") if self._validates else []

    def test_dataloader(self) -> DataLoader[VideoChunk]:
        """The chunks of this rank's share of the test videos."""
        return self._stream("test")

    def predict_dataloader(self) -> DataLoader[VideoChunk]:
        """The chunks of this rank's share of the videos to predict."""
        if self.raw_videos:
            stream = RawStream(
                self.raw_videos,
                chunk_frames=self.chunk_frames,
                size=self.eval_size,
                max_size=self.max_size,
                skip=self.skip,
            )
            return self._chunk_loader(stream, min(1, self.num_workers))
        return self._stream("predict")

    @property
    def _processes(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.world_size)

    @cached_property
    def _clips(self) -> ClipDataset | ConcatDataset[tuple[Tensor, ClipTargets]]:
        clips = ClipDataset(
            self._dataset("train"),
            self._split("train").images,
            clip_frames=self.clip_frames,
            clip_step=self.clip_step,
            far_frames=self.far_frames,
            cuts=self.cuts,
            clips_per_video=self.clips_per_video,
            augmentation=self.augmentation,
            max_size=self.max_size,
        )
        if self.joint is None:
            return clips
        pseudo_clips = PseudoClips(
            self._joint_images,
            self._joint_split.images,
            length=max(1, round(len(clips) * self.joint.share / (1 - self.joint.share))),
            clip_frames=self.clip_frames,
            pseudo_video=self.joint.pseudo_video,
            augmentation=self.joint.augmentation or self.augmentation,
            max_size=self.max_size,
        )
        return ConcatDataset([clips, pseudo_clips])

    def _stream(self, name: SplitName) -> DataLoader[VideoChunk]:
        # Lightning warns of any iterable dataset that has a length; the workers of this one do share the chunks.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        videos = StreamingVideos(
            self._dataset(name),
            self._split(name).images,
            chunk_frames=self.chunk_frames,
            size=self.eval_size,
            max_size=self.max_size,
            skip=self.skip,
        )
        return self._chunk_loader(videos, self.num_workers)

    def _chunk_loader(self, videos: IterableDataset[VideoChunk], num_workers: int) -> DataLoader[VideoChunk]:
        return DataLoader(
            videos,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
        )

    def _split(self, name: SplitName) -> Split:
        split = self.splits[name]
        if split is not None:
            return split
        if self.dataset_name is None or self.root is None:
            raise ValueError(
                f"data.{name} is not given; expected its `annotations` file and its folder of `images`, or a data.name "
                f"of the catalog, one of {', '.join(CATALOG)}"
            )
        return Split(*locate(self.root, self.dataset_name, CATALOG_SPLITS[name]))

    @property
    def _validates(self) -> bool:
        """Whether a training has a validation split."""
        if self.splits["valid"] is not None or self.dataset_name is None:
            return self.splits["valid"] is not None
        return CATALOG[self.dataset_name].splits[CATALOG_SPLITS["valid"]].annotated

    def _dataset(self, name: SplitName) -> VideoDataset:
        if name not in self._datasets:
            self._datasets[name] = open_annotations(self._split(name).annotations)
        return self._datasets[name]

    @property
    def _joint_split(self) -> Split:
        assert self.joint is not None
        if self.joint.split is not None:
            return self.joint.split
        assert self.root is not None  # see __init__
        return Split(*locate(self.root, "coco", "train"))

    @cached_property
    def _joint_images(self) -> VideoDataset:
        """The images in the categories of the videos."""
        return map_categories(open_annotations(self._joint_split.annotations), self._dataset("train").categories)

    def _check(self, name: SplitName) -> None:
        split, dataset = self._split(name), self._dataset(name)
        if name in ("train", "valid") and not dataset.is_annotated:
            raise ValueError(
                f"data.{name}: {split.annotations} has no annotations; expected some, to train on or to measure "
                "against; give such a file as data.test or data.predict, which then only write results"
            )
        for known, other in self._datasets.items():
            if other.categories != dataset.categories:
                unlike = min(set(other.categories) ^ set(dataset.categories), key=lambda category: category.id)
                raise ValueError(
                    f"data.{name}: the categories of {split.annotations} are not those of data.{known}, "
                    f"{self._split(known).annotations}; the first that is not in both is {unlike}. Class indices would "
                    "not mean the same; give both files the same list of categories"
                )
        check_frames(f"data.{name}", pack(dataset.videos).without_instances(), split, self.outside_images)
