"""Frames between file and network: augmentation in training, resizing in evaluation, normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from instanceformer.constants import constant

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of red, green and blue, as fractions of full brightness."""
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of red, green and blue."""


def normalize(frames: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 RGB to float32 of zero mean and unit deviation over ImageNet."""
    mean, std = _statistics(frames.device)
    return frames.float().sub_(mean).div_(std)


@constant
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of brightness in [0, 255], (3, 1, 1) each."""
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    on_gpu = device.type == "cuda"
    return mean.to(device, non_blocking=on_gpu), std.to(device, non_blocking=on_gpu)


def fit_size(height: int, width: int, size: int | None, max_size: int) -> tuple[int, int]:
    """The (height, width) of the same proportions with shorter side ``size``, or less to keep within ``max_size``.

    ``size=None`` keeps the frame's size unless its longer side exceeds ``max_size``.
    """
    scale = 1.0 if size is None else size / min(height, width)
    scale = min(scale, max_size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(frames: Tensor, size: int | None, max_size: int) -> Tensor:
    """Resize (T, 3, H, W) uint8 frames to ``fit_size``; frames of that size are returned as they are."""
    height, width = frames.shape[-2:]
    target = fit_size(height, width, size, max_size)
    if target == (height, width):
        return frames
    resized: Tensor = F.resize(frames, list(target), antialias=True)
    return resized


@dataclass(frozen=True)
class Geometry:
    """The part of its frames that a clip shows, resized and possibly mirrored.

    Attributes:
        crop: the part, (top, left, height, width) in pixels of the frame.
        size: (height, width) in pixels to which the part is resized.
        flip: whether left and right are exchanged.
    """

    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False

    def apply(self, frame: Tensor) -> Tensor:
        """Bring a frame (3, H, W) uint8 to (3, *size) uint8, with antialiasing."""
        frame = F.crop(frame, *self.crop)
        if self.size != self.crop[2:]:
            frame = F.resize(frame, list(self.size), antialias=True)
        return F.horizontal_flip(frame) if self.flip else frame

    @property
    def rows(self) -> Tensor:
        """(size[0],) int64: the frame's row for each row of a mask."""
        return self.crop[0] + _nearest(self.crop[2], self.size[0])

    @property
    def columns(self) -> Tensor:
        """(size[1],) int64: the frame's column for each column of a mask."""
        columns = self.crop[1] + _nearest(self.crop[3], self.size[1])
        return columns.flip(0) if self.flip else columns


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training clip, the same for all its frames; random numbers are torch's.

    The crop is DETR's: the frame is resized to a shorter side of ``crop_from``, a part with sides between the two
    ``crop_sides`` is cut out, and that part is resized like a whole frame. Both resizings are done as one.

    Attributes:
        flip: probability of mirroring left and right.
        sizes: shorter sides in pixels to draw from; empty: the frames keep their size.
        max_size: greatest length in pixels of the longer side in training; none: ``max_size`` of the data.
        crop: probability of a crop.
        crop_from: shorter sides in pixels before the crop, to draw from.
        crop_sides: least and greatest side of the crop in pixels.
        photometric: probability of each change of brightness, contrast, saturation, hue and order of the channels.
        max_instances: of a clip; if it has more, this many are drawn, each with all its masks.
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
        """Draw the part of its frames that a clip shows.

        Args:
            height: of the frames in pixels.
            width: of the frames in pixels.
            max_size: greatest length in pixels of the result's longer side, unless ``self.max_size`` is given.
        """
        max_size = max_size if self.max_size is None else self.max_size
        crop = (0, 0, height, width)
        if torch.rand(()) < self.crop:
            crop = self._draw_crop(height, width)
        size = fit_size(*crop[2:], _draw(self.sizes) if self.sizes else None, max_size)
        return Geometry(crop, size, flip=bool(torch.rand(()) < self.flip))

    def change_colors(self, frames: Tensor) -> Tensor:
        """Draw photometric changes of a clip (T, 3, H, W) uint8 and make them, the same in all frames."""
        return v2.RandomPhotometricDistort(p=self.photometric)(frames) if self.photometric else frames

    def _draw_crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop in pixels of the frame before resizing."""
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
    """(target,) int64: the nearest of ``length`` pixels to each of ``target`` pixels that span the same distance.

    This is "nearest-exact"; "nearest", the only mode of tv_tensors.Mask, moves a mask by up to half a pixel.
    """
    return (
        interpolate(torch.arange(length, dtype=torch.float32).view(1, 1, -1), target, mode="nearest-exact")
        .view(-1)
        .long()
    )
