"""The datasets of an experiment, for Lightning's Trainer and command line."""

from __future__ import annotations

import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
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
from instanceformer.data.clips import ClipDataset, ClipSampler, SeededClips, collate_clips, leave_signals_to_the_trainer
from instanceformer.data.images import check_frames
from instanceformer.data.packed import open_annotations, pack
from instanceformer.data.pseudo_video import JointImages, PseudoClips
from instanceformer.data.streaming import RawStream, RawVideo, StreamingVideos, find_videos

PAPER_AUGMENTATION = Augmentation()
SEED = "PL_GLOBAL_SEED"
"""Environment variable through which Lightning's ``seed_everything`` passes the seed to other processes."""
PAPER_EVAL_SIZE, PAPER_MAX_SIZE = 360, 768


class VideoDataModule(LightningDataModule):
    """Training clips, and streams of whole videos for validation, testing and prediction.

    A catalog dataset needs only ``root`` and ``name``. Its training split is used for training, and its validation
    split for testing, prediction and, if it has annotations, validation. A split given explicitly takes precedence.

    An interrupted training run resumes exactly where it stopped: which clips a batch has, and how they are drawn and
    augmented, depends only on the seed (``seed_everything``) and the batch number; see ``ClipSampler``.

    Args:
        train: split to train on; must have annotations.
        valid: split to validate on; must have annotations.
        test: split to test on; without annotations, results are written but not evaluated.
        predict: split to write results for; its annotations, if any, are ignored. Or the path of a video file, a folder
            of images, or a folder of either (see ``find_videos``); the classes are then those of the checkpoint.
        root: folder with one subfolder per dataset, such as ``root/ovis``.
        name: name of a catalog dataset.
        joint: images to train on together with the videos; none: videos only.
        augmentation: random augmentation of the training clips.
        batch_size: training clips per process.
        clip_frames: number of frames in a training clip.
        clip_step: maximum distance between neighboring frames of a clip; none: no limit.
        far_frames: how many of a clip's frames are drawn from anywhere in the video despite ``clip_step``.
        cuts: fraction of video clips that cut to another clip, as films do, so that the network learns that identities
            disappear and return; see ``with_cut``.
        clips_per_video: number of clips per video and epoch; none: one for each frame in which an instance is visible.
        chunk_frames: number of frames that evaluation and prediction read at once.
        eval_size: length of the frames' shorter side in evaluation and prediction, in pixels; none: that of the
            checkpoint, or else 360.
        max_size: maximum length of the longer side in pixels, unless an augmentation sets its own ``max_size``; none:
            that of the checkpoint, or else 768.
        num_workers: number of worker processes per data loader.
        skip_unreadable: in training, replace a clip that has an unreadable image by another one, with a warning, and
            log the number of such clips as ``train/replaced_clips``. If false, an unreadable image ends the training.
        outside_images: allow file names and links that lead out of a split's image folder.

    Attributes:
        seed: seed of the training data: that of ``seed_everything``, or else the checkpoint's, or else torch's.
        given_sizes: ``eval_size`` and ``max_size`` as passed in.
        skip: ids of videos that test and predict leave out. ``setup`` clears it; set it before the loaders are created.
        raw_videos: the videos to predict if ``predict`` is a path; available after ``setup``.
        broken: those of them that cannot be read and are left out.

    Raises:
        ValueError: a size or count is below 1, or ``root`` is missing where it is needed.
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
        self.training_clips: SeededClips | None = None  # set when the training loader is created
        self.skip: frozenset[int] = frozenset()
        self.raw_videos: list[RawVideo] = []
        self.broken: list[RawVideo] = []
        self._datasets: dict[SplitName, VideoDataset] = {}

    @property
    def categories(self) -> tuple[Category, ...]:
        """The categories by class index, from a split that has been read, or else from the first one given.

        Empty after ``setup`` for prediction on videos without annotations.
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

    def count_classes(self, stage: str) -> int | None:
        """Number of categories in a stage's annotations, usable before ``setup``; None if it has no annotation file."""
        alone = stage == "predict" and self._predicted_path is not None
        is_given = self.splits[SPLIT_OF_STAGE[stage]] is not None or (self.root and self.dataset_name)
        return self.videos(stage)[0].num_classes if is_given and not alone else None

    def ground_truth(self, stage: str) -> VideoDataset | None:
        """Annotations that fit, validate or test is evaluated against; None if there are none."""
        if stage == "predict" or (stage == "fit" and not self._validates):
            return None
        dataset = self._dataset("test" if stage == "test" else "valid")
        return dataset if dataset.is_annotated else None

    def annotations_path(self, stage: str) -> Path:
        """Annotation file of a stage: fit, validate, test or predict."""
        return self._split(SPLIT_OF_STAGE[stage]).annotations

    def video_ids(self, stage: str) -> list[int]:
        """Video ids of a stage: test or predict."""
        return [video.id for video in self.raw_videos or self.videos(stage)[0].videos]

    def videos(self, stage: str) -> tuple[VideoDataset, Path]:
        """Annotations and image folder of a stage: fit, validate, test or predict."""
        name = SPLIT_OF_STAGE[stage]
        return self._dataset(name), self._split(name).images

    def setup(self, stage: str) -> None:
        """Read and check the data of a stage: fit (including validation if possible), validate, test or predict.

        Raises:
            FileNotFoundError: an annotation file or the first frame of a video is missing.
            ValueError: a split is missing, malformed or lacks required annotations; none of the videos without
                annotations can be read; two splits have different categories; there are too few clips for one batch;
                or a frame lies outside the image folder.
        """
        self.raw_videos, self.skip = [], frozenset()
        if stage == "predict" and self._predicted_path is not None:
            found = find_videos(self._predicted_path)
            self.raw_videos, self.broken = ([v for v in found if bool(v.problem) == bad] for bad in (False, True))
            if not self.raw_videos:
                raise ValueError(found[0].problem)
            for video in self.broken:
                rank_zero_info(f"{video.problem}; it is left out")
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
        """Use a checkpoint's sizes, in pixels, for those that were not given."""
        given_eval_size, given_max_size = self.given_sizes
        self.eval_size, self.max_size = given_eval_size or eval_size, given_max_size or max_size

    def state_dict(self) -> dict[str, Any]:
        """What the order of the training clips depends on, to be stored in a checkpoint."""
        return {
            "seed_everything": self.seed,
            "data.batch_size": self.batch_size,
            "number of processes": self._processes,
            "number of clips in an epoch": len(self._clips),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed training run will see the same clips as if it had not been interrupted.

        Raises:
            ValueError: something that the order of the clips depends on has changed.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        if SEED not in os.environ:  # no seed was given
            self.seed = state_dict.get("seed_everything", self.seed)
        for name, value in self.state_dict().items():
            if state_dict.get(name) != value:
                raise ValueError(
                    f"{name}: found {value}, expected {state_dict.get(name)} as in the checkpoint: a training that is "
                    "resumed goes on with the batches that it would have had; to begin another with its weights, give "
                    "the checkpoint as --model.init_from"
                )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ClipTargets]]:
        """Shuffled clips as ClipBatch, beginning with the first batch that training has not yet started."""
        # Lightning warns about loaders without state; this one follows the trainer's batch count
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
        """The chunks of this rank's share of the validation videos; an empty list without a validation split."""
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
        # Lightning warns about any iterable dataset that has a length; the workers of this one do share the chunks.
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
        """Whether training has a validation split."""
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
        """The images, with their categories mapped to those of the videos."""
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
