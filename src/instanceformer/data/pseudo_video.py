"""Images as videos: a clip of random views of one image, to train on images and videos together."""

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
    """How an image becomes a clip; random numbers are torch's.

    One frame, at a random index, is the image itself. Every other is an independent view of it: an affine and
    perspective change of the image and its masks, changed brightness and saturation, and sometimes motion blur. Pixels
    outside the image are black and belong to no instance; an instance that leaves the view is absent.

    Attributes:
        rotation: greatest angle in degrees, to either side, in [0, 180].
        shear: greatest angle in degrees, to either side, in [0, 80].
        zoom: greatest factor by which a view is larger, or smaller, than the image, in [1, 10].
        translation: greatest movement to any side, as a fraction of the height or width, in [0, 1].
        perspective: greatest movement of each corner, as a fraction of half the height and width, in [0, 0.45].
        brightness: greatest change of the brightness, as a fraction of it, in [0, 1].
        saturation: greatest change of the saturation, as a fraction of it, in [0, 1].
        blurred: probability that a view is blurred, in [0, 1].
        blur: greatest length in pixels of the line that a point is blurred to, in [3, 100]; the least is 3.

    Raises:
        ValueError: an option is out of its range.
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
            "perspective": (0, 0.45),  # the corners of a frame stay those of a convex shape up to 0.5
            "brightness": (0, 1),
            "saturation": (0, 1),
            "blurred": (0, 1),
            "blur": (3, 100),  # along most lines, 2 pixels leave an image as it is
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"pseudo_video: {name} is in [{low}, {high}], found {getattr(self, name)}")

    def __call__(self, image: Tensor, masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Make a clip of T = ``count`` frames.

        Args:
            image: (3, H, W) uint8.
            masks: (n, H, W) uint8, zero or one.
            count: frames of the clip.

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
        """(4, 2) float64: new positions of a frame's corners, (x, y) in pixels, clockwise from the upper left."""
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

    Their categories are mapped to those of the videos by name, see ``map_categories``.

    Attributes:
        share: fraction of an epoch's clips that are made of images, between 0 and 1; each epoch draws them anew.
        split: of the images; none: COCO's training split under ``data.root``.
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


class PseudoClips(Dataset[tuple[Tensor, ClipTargets]]):
    """Clips made of images that are drawn at random; random numbers are torch's.

    Args:
        dataset: the images, as videos of one frame; of longer videos, every frame serves as an image.
        images: folder that the file names are relative to.
        length: items of an epoch.
        clip_frames: frames of a clip, T.
        pseudo_video: how an image becomes a clip.
        augmentation: random changes of the image before that; None: ``UNCHANGED``.
        max_size: greatest length of a frame's longer side in pixels.

    Raises:
        ValueError: an option is out of its range, or no image shows an instance.
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
        """Draw an image and make a clip of it.

        Returns:
            (T, 3, H, W) float32 normalized frames, and their targets with n instances.

        Raises:
            ValueError: an image is missing, unreadable or not of the size that its annotations say.
        """
        video, frame = self.items[int(torch.randint(len(self.items), ()))].tolist()
        image, masks, labels = read_clip(
            self.dataset, self.dataset.videos[video], [frame], self.images, self.augmentation, self.max_size
        )
        frames, masks = self.pseudo_video(image[0], masks[0], self.clip_frames)
        return normalize(frames), clip_targets(labels, masks.view(torch.bool))


def motion_blur(image: Tensor, length: int, angle: float) -> Tensor:
    """Blur (3, H, W) uint8 along a line of ``length`` pixels at ``angle``, in radians from the x axis towards y."""
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
    """A number from -bound to bound."""
    return bound * (2 * float(torch.rand(())) - 1)
