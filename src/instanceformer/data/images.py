"""Frames from image files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image


class ImageError(ValueError):
    """An image file that cannot be read."""


class ImageSizeError(ImageError):
    """An image of another size than its video's."""


def read_image(path: Path, height: int, width: int, what: str) -> Tensor:
    """Read an image.

    Args:
        path: of the file.
        height: that it must have, in pixels.
        width: likewise.
        what: it is, for messages.

    Returns:
        (3, height, width) uint8 RGB.

    Raises:
        ImageSizeError: it is of another size.
        ImageError: it is missing, not an image, or not a single one of 8 bits a channel.
    """
    try:
        image: Tensor = decode_image(str(path), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(f"{path}: {what} cannot be read as an image ({reason})") from error
    if image.dtype != torch.uint8 or image.ndim != 3:
        found = f"{len(image)} images" if image.ndim == 4 else f"values of type {image.dtype}"
        raise ImageError(f"{path}: {what} is to be one image of 8 bits a channel, found {found}; convert the file")
    if image.shape[1:] != (height, width):
        raise ImageSizeError(
            f"{path}: {what} is {image.shape[1]}x{image.shape[2]} (height x width), but the annotation file says "
            f"{height}x{width}; resize the frames or correct the file"
        )
    return image
