"""Frame preprocessing: augmentation for training, resizing for evaluation, and normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from instanceformer.constants import constant

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of red, green and blue, on a scale of [0, 1]."""
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of red, green and blue, on a scale of [0, 1]."""


def normalize(frames: Tensor) -> Tensor:
    """Convert (..., 3, H, W) uint8 RGB to float32, normalized with the ImageNet mean and standard deviation."""
    mean, std = _statistics(frames.device)
    return frames.float().sub_(mean).div_(std)


@constant
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet mean and standard deviation on the [0, 255] scale, each (3, 1, 1)."""
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    on_gpu = device.type == "cuda"
    return mean.to(device, non_blocking=on_gpu), std.to(device, non_blocking=on_gpu)


def fit_size(height: int, width: int, size: int | None, max_size: int) -> tuple[int, int]:
    """The (height, width) after scaling the shorter side to ``size`` while keeping the aspect ratio.

    The result is scaled down further if its longer side would exceed ``max_size``. With ``size=None`` the frame keeps
    its size unless its longer side exceeds ``max_size``.
    """
    scale = 1.0 if size is None else size / min(height, width)
    scale = min(scale, max_size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(frames: Tensor, size: int | None, max_size: int) -> Tensor:
    """Resize (T, 3, H, W) uint8 frames to ``fit_size``; frames that already have that size are returned unchanged."""
    height, width = frames.shape[-2:]
    target = fit_size(height, width, size, max_size)
    if target == (height, width):
        return frames
    resized: Tensor = F.resize(frames, list(target), antialias=True)
    return resized


@dataclass(frozen=True)
class Geometry:
    """A crop, resize and optional flip that applies to all frames of a clip.

    Attributes:
        crop: (top, left, height, width) in pixels of the original frame.
        size: (height, width) in pixels that the crop is resized to.
        flip: whether to mirror left and right.
    """

    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False

    def apply(self, frame: Tensor) -> Tensor:
        """Transform a (3, H, W) uint8 frame to (3, *size) uint8, with antialiasing."""
        frame = F.crop(frame, *self.crop)
        if self.size != self.crop[2:]:
            frame = F.resize(frame, list(self.size), antialias=True)
        return F.horizontal_flip(frame) if self.flip else frame

    @property
    def rows(self) -> Tensor:
        """(size[0],) int64: the row of the original frame that each row of a transformed mask is taken from."""
        return self.crop[0] + _nearest(self.crop[2], self.size[0])

    @property
    def columns(self) -> Tensor:
        """(size[1],) int64: the column of the original frame that each column of a transformed mask is taken from."""
        columns = self.crop[1] + _nearest(self.crop[3], self.size[1])
        return columns.flip(0) if self.flip else columns


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a training clip, the same for all its frames. Uses torch's random number generator.

    Crops are as in DETR: the frame is resized so that its shorter side is one of ``crop_from``, a crop whose sides lie
    in the range ``crop_sides`` is cut out, and the crop is resized like a whole frame. The two resizes are done as one.

    Attributes:
        flip: probability of mirroring left and right.
        sizes: lengths of the shorter side, in pixels, to choose from; empty: the frames keep their size.
        max_size: maximum length of the longer side in training, in pixels; none: ``max_size`` of the data.
        crop: probability of a crop.
        crop_from: lengths of the shorter side before the crop, in pixels, to choose from.
        crop_sides: minimum and maximum side length of the crop in pixels.
        photometric: probability of each change of brightness, contrast, saturation, hue and channel order.
        max_instances: maximum number of instances in a clip; from a larger number, a random subset is kept.

    Raises:
        ValueError: an option is out of range.
    """

    flip: float = 0.5
    sizes: tuple[int, ...] = (288, 320, 352, 392, 416, 448, 480, 512)
    max_size: int | None = None
    crop: float = 0.5
    crop_from: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    photometric: float = 0.0
    max_instances: int | None = None

    def __post_init__(self) -> None:
        for name in ("flip", "crop", "photometric"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation: {name} is a probability in [0, 1], found {getattr(self, name)}")
        sizes = (*self.sizes, self.max_size, *self.crop_from, *self.crop_sides)
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"augmentation: sizes are positive numbers of pixels, found {self}")
        if self.max_instances is not None and self.max_instances < 1:
            raise ValueError(f"augmentation: max_instances is 1 or more (or none), found {self.max_instances}")
        if self.crop and (not self.crop_from or self.crop_sides[0] > self.crop_sides[1]):
            raise ValueError(
                f"augmentation: a crop needs one size or more in crop_from and (least, greatest) in crop_sides, found "
                f"crop_from={self.crop_from} and crop_sides={self.crop_sides}; crop=0 turns it off"
            )

    def draw_geometry(self, height: int, width: int, max_size: int) -> Geometry:
        """Draw a random crop, size and flip for a clip.

        Args:
            height: frame height in pixels.
            width: frame width in pixels.
            max_size: maximum length of the result's longer side in pixels; ``self.max_size`` overrides it if given.
        """
        max_size = max_size if self.max_size is None else self.max_size
        crop = (0, 0, height, width)
        if torch.rand(()) < self.crop:
            crop = self._draw_crop(height, width)
        size = fit_size(*crop[2:], _draw(self.sizes) if self.sizes else None, max_size)
        return Geometry(crop, size, flip=bool(torch.rand(()) < self.flip))

    def change_colors(self, frames: Tensor) -> Tensor:
        """Apply random photometric changes to a (T, 3, H, W) uint8 clip, the same in all frames."""
        return v2.RandomPhotometricDistort(p=self.photometric)(frames) if self.photometric else frames

    def _draw_crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw a crop: (top, left, height, width) in pixels of the original frame."""
        scale = _draw(self.crop_from) / min(height, width)
        spans = []
        for side in (height, width):
            scaled = round(side * scale)
            least, greatest = min(self.crop_sides[0], scaled), min(self.crop_sides[1], scaled)
            span = min(side, max(1, round(int(torch.randint(least, greatest + 1, ())) / scale)))
            spans.append((int(torch.randint(side - span + 1, ())), span))
        (top, crop_height), (left, crop_width) = spans
        return top, left, crop_height, crop_width


def _draw(sizes: tuple[int, ...]) -> int:
    return sizes[int(torch.randint(len(sizes), ()))]


def _nearest(length: int, target: int) -> Tensor:
    """(target,) int64: source indices for nearest-neighbor resizing from ``length`` to ``target`` pixels.

    The mode is "nearest-exact". "nearest", the only mode of tv_tensors.Mask, shifts a mask by up to half a pixel.
    """
    return (
        interpolate(torch.arange(length, dtype=torch.float32).view(1, 1, -1), target, mode="nearest-exact")
        .view(-1)
        .long()
    )
