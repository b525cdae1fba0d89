"""Where the parts of a dataset lie, and what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instanceformer.data.augment import Augmentation
from instanceformer.data.catalog import CatalogSplit
from instanceformer.data.pseudo_video import PseudoVideo

SplitName = Literal["train", "valid", "test", "predict"]
SPLIT_OF_STAGE: dict[str, SplitName] = {"fit": "train", "validate": "valid", "test": "test", "predict": "predict"}
CATALOG_SPLITS: dict[SplitName, CatalogSplit] = {
    "train": "train",
    "valid": "valid",
    "test": "valid",  # the split of which results are published
    "predict": "valid",
}


@dataclass(frozen=True)
class Split:
    """Where one part of a dataset lies.

    Attributes:
        annotations: JSON file in the format of YouTube-VIS, or of COCO, whose images are videos of one frame.
        images: folder that the file names in it are relative to.
    """

    annotations: Path
    images: Path


@dataclass(frozen=True)
class JointImages:
    """Images to train on together with the videos, as the paper does with COCO.

    Their categories are mapped onto those of the videos by name, see ``map_categories``.

    Attributes:
        share: fraction of an epoch's clips that are made of images, between 0 and 1; the images are drawn anew in each.
        split: where they lie; none: COCO's training split under ``data.root``.
        pseudo_video: how an image becomes a clip.
        augmentation: random changes of the image before that; none: those of the videos.
    """

    share: float = 0.5
    split: Split | None = None
    pseudo_video: PseudoVideo = PseudoVideo()
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"data.joint.share: expected a fraction between 0 and 1, found {self.share}")
