"""Pseudo videos: clips of random views of a single image, for training on images and videos together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from instanceformer.data.annotations import VideoDataset
from instanceformer.data.augment import Augmentation, normalize
from instanceformer.data.batch import ClipTargets
from instanceformer.data.catalog import Split
from instanceformer.data.clips import UNCHANGED, clip_targets, read_clip
from instanceformer.data.packed import pack


@dataclass(frozen=True)
class PseudoVideo:
    """How to turn an image into a clip. Uses torch's random number generator.

    One frame, at a random index, is the image itself. Every other frame is an independent random view of it: an affine
    and perspective transform of the image and its masks, a change of brightness and saturation, and sometimes motion
    blur. Pixels outside the image are black and belong to no instance; an instance that leaves the view is not visible.

    Attributes:
        rotation: maximum rotation to either side in degrees, in [0, 180].
        shear: maximum shear to either side in degrees, in [0, 80].
        zoom: maximum factor by which a view is enlarged or reduced, in [1, 10].
        translation: maximum shift in either direction, as a fraction of the height or width, in [0, 1].
        perspective: maximum shift of each corner, as a fraction of half the height and width, in [0, 0.45].
        brightness: maximum relative change in brightness, in [0, 1].
        saturation: maximum relative change in saturation, in [0, 1].
        blurred: probability that a view is blurred, in [0, 1].
        blur: maximum length of the motion blur in pixels, in [3, 100]; the minimum is 3.

    Raises:
        ValueError: an option is out of range.
    """

    rotation: float = 15.0
    shear: float = 10.0
    zoom: float = 1.25
    translation: float = 0.1
    perspective: float = 0.1
    brightness: float = 0.2
    saturation: float = 0.2
    blurred: float = 0.25
    blur: int = 9

    def __post_init__(self) -> None:
        ranges = {
            "rotation": (0, 180),
            "shear": (0, 80),
            "zoom": (1, 10),
            "translation": (0, 1),
            "perspective": (0, 0.45),  # the quadrilateral stays convex up to 0.5
            "brightness": (0, 1),
            "saturation": (0, 1),
            "blurred": (0, 1),
            "blur": (3, 100),  # at most angles, 2 pixels would leave the image unchanged
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"pseudo_video: {name} is in [{low}, {high}], found {getattr(self, name)}")

    def __call__(self, image: Tensor, masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Make a clip of T = ``count`` frames.

        Args:
            image: (3, H, W) uint8.
            masks: (n, H, W) uint8, zeros and ones.
            count: number of frames in the clip.

        Returns:
            (T, 3, H, W) uint8 frames and (T, n, H, W) uint8 masks.
        """
        unchanged = int(torch.randint(count, ()))
        views = [(image, masks) if t == unchanged else self._draw_view(image, masks) for t in range(count)]
        return torch.stack([view[0] for view in views]), torch.stack([view[1] for view in views])

    def _draw_view(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[-2:]
        corners = [[0, 0], [width, 0], [width, height], [0, height]]
        moved = self._draw_corners(height, width).tolist()
        image = F.perspective(image, corners, moved)
        masks = F.perspective(masks, corners, moved, interpolation=v2.InterpolationMode.NEAREST)
        image = v2.ColorJitter(brightness=self.brightness, saturation=self.saturation)(image)
        if torch.rand(()) < self.blurred:
            image = motion_blur(image, int(torch.randint(3, self.blur + 1, ())), _draw(math.pi))
        return image, masks

    def _draw_corners(self, height: int, width: int) -> Tensor:
        """Draw new positions of a frame's corners: (4, 2) float64, (x, y) in pixels, clockwise from the top left."""
        half = torch.tensor([width / 2, height / 2], dtype=torch.float64)
        corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
        corners = half * (corners + self.perspective * (2 * torch.rand(4, 2) - 1))
        angle, shear, zoom = math.radians(_draw(self.rotation)), math.tan(math.radians(_draw(self.shear))), _draw(1.0)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        affine = math.pow(self.zoom, zoom) * turn.double() @ torch.tensor([[1, shear], [0, 1]], dtype=torch.float64)
        center = half * (1 + 2 * self.translation * (2 * torch.rand(2) - 1))
        return center + corners @ affine.T


@dataclass(frozen=True)
class JointImages:
    """Images to train on together with the videos, as the paper does with COCO.

    Their categories are mapped to those of the videos by name; see ``map_categories``.

    Attributes:
        share: fraction of an epoch's clips that are made from images, greater than 0 and less than 1. Each epoch draws
            new images.
        split: the images and their annotations; none: COCO's training split under ``data.root``.
        pseudo_video: how to turn an image into a clip.
        augmentation: random augmentation of the image before that; none: as for the videos.

    Raises:
        ValueError: ``share`` is out of range.
    """

    share: float = 0.5
    split: Split | None = None
    pseudo_video: PseudoVideo = PseudoVideo()
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"data.joint.share: expected a fraction between 0 and 1, found {self.share}")


class PseudoClips(Dataset[tuple[Tensor, ClipTargets]]):
    """Clips made from randomly drawn images. Uses torch's random number generator.

    Args:
        dataset: the images, as videos of one frame; in longer videos, every frame counts as an image.
        images: folder that the file names are relative to.
        length: number of clips in an epoch.
        clip_frames: number of frames in a clip, T.
        pseudo_video: how to turn an image into a clip.
        augmentation: random augmentation of the image before that; None: ``UNCHANGED``.
        max_size: maximum length of a frame's longer side in pixels.

    Raises:
        ValueError: an option is out of range, or no image shows an instance.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        images: Path | str,
        *,
        length: int,
        clip_frames: int = 4,
        pseudo_video: PseudoVideo,
        augmentation: Augmentation | None = None,
        max_size: int = 768,
    ) -> None:
        if length < 1:
            raise ValueError(f"length: expected 1 or more, found {length}")
        if clip_frames < 1:
            raise ValueError(f"clip_frames: expected 1 or more, found {clip_frames}")
        self.dataset = dataset
        self.images = Path(images)
        self.length = length
        self.clip_frames = clip_frames
        self.pseudo_video = pseudo_video
        self.augmentation = UNCHANGED if augmentation is None else augmentation
        self.max_size = max_size
        self.items = pack(dataset.videos).populated_frames()
        if not len(self.items):
            raise ValueError(
                f"{self.images}: none of {len(dataset.videos)} images shows an instance to make clips of; expected "
                "instances that are not crowds, of the categories in use"
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, ClipTargets]:
        """Draw a random image and make a clip from it; ``index`` is ignored.

        Returns:
            (T, 3, H, W) float32 normalized frames, and their targets with n instances.

        Raises:
            ValueError: an image is missing, unreadable, or not the size given in the annotations.
        """
        video, frame = self.items[int(torch.randint(len(self.items), ()))].tolist()
        image, masks, labels = read_clip(
            self.dataset, self.dataset.videos[video], [frame], self.images, self.augmentation, self.max_size
        )
        frames, masks = self.pseudo_video(image[0], masks[0], self.clip_frames)
        return normalize(frames), clip_targets(labels, masks.view(torch.bool))


def motion_blur(image: Tensor, length: int, angle: float) -> Tensor:
    """Blur (3, H, W) uint8 along a line of ``length`` pixels at ``angle`` radians from the x axis toward the y axis."""
    reach = length // 2
    height, width = image.shape[-2:]
    padded = F.pad(image, [reach], padding_mode="edge").float()
    total = torch.zeros(image.shape)
    for step in range(length):
        along = step - (length - 1) / 2
        x = reach + math.floor(along * math.cos(angle) + 0.5)
        y = reach + math.floor(along * math.sin(angle) + 0.5)
        total += padded[:, y : y + height, x : x + width]
    return total.div_(length).round_().to(torch.uint8)


def _draw(bound: float) -> float:
    """Draw a number uniformly from -bound to bound."""
    return bound * (2 * float(torch.rand(())) - 1)
