"""Frames in image files: where they may lie, and how they are read. Imports torch only to read one."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from instanceformer.data.formats.run_lengths import show
from instanceformer.orientation import SIDEWAYS, image_orientation, upright

if TYPE_CHECKING:
    from torch import Tensor

    from instanceformer.data.annotations import Video
    from instanceformer.data.catalog import Split


class ImageError(ValueError):
    """An image file that is missing, damaged, or no image."""


class ImageSizeError(ImageError):
    """An image of another size than its video's."""


def frame_path(images: Path, name: str, outside: bool = False) -> Path:
    """The file of a frame.

    Args:
        images: folder that the file names of an annotation file are relative to; it may itself be a link.
        name: one of these.
        outside: allow names and links that lead out of the folder.

    Raises:
        ImageError: no file can have this name.
        ValueError: it leads out of the folder, by ``..``, as an absolute path or by a link, and that is not allowed.
    """
    path = images / name
    if outside:
        return path
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:  # reading the file gives the reason
        is_link = False
    except ValueError as error:
        raise ImageError(f"{images}: found the file name {show(name)}, which no file can have ({error})") from error
    folder, last = os.path.split(path)
    target = os.path.realpath(path) if is_link or last == ".." else os.path.join(_real(folder), last)
    if not _is_inside(target, images):
        raise ValueError(
            f"{images}: found the file name {show(name)}, which leads out of this folder, to {shorten(target)}; "
            "expected frames inside it; correct the file names, or allow it by the option outside_images "
            "(of data, or of check)"
        )
    return path


def check_frames(option: str, videos: Iterable[Video], split: Split, outside: bool) -> None:
    """See that all frames may be read and that the first frame of every video exists.

    Args:
        option: of the command line that gives the split, for messages.
        videos: of the split.
        split: the annotation file, for messages, and the folder of images.
        outside: as in ``frame_path``.

    Raises:
        FileNotFoundError: the first frame of a video does not exist.
        ImageError, ValueError: a video has no file names, or as ``frame_path``.
    """
    folder = FrameFolder(split.images, outside)
    for video in videos:
        if not video.file_names:
            raise ValueError(
                f"{option}: video {video.id} of {split.annotations} has no file_names; expected its frames, "
                f"relative to {option}.images = {split.images}"
            )
        present = [folder.has(name) for name in video.file_names]
        if not present[0]:
            raise FileNotFoundError(
                f"{option}: {split.images / video.file_names[0]}, the first frame of video {video.id} in "
                f"{split.annotations}, does not exist; is {option}.images = {split.images} the folder that "
                "file_names are relative to?"
            )


class FrameFolder:
    """Tells which frames exist by listing each of their folders once; arguments are as in ``frame_path``."""

    def __init__(self, images: Path, outside: bool = False) -> None:
        self.images, self.outside = images, outside
        self._plain: dict[str, frozenset[str]] = {}  # by folder the names of its files that are no links

    def has(self, name: str) -> bool:
        """Whether the file of a frame exists."""
        folder, last = os.path.split(name)
        if folder not in self._plain:
            self._plain[folder] = self._list(self.images / folder)
        return last in self._plain[folder] or frame_path(self.images, name, self.outside).is_file()

    def _list(self, folder: Path) -> frozenset[str]:
        try:
            if not self.outside and not _is_inside(_real(str(folder)), self.images):
                return frozenset()
            with os.scandir(folder) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
        except (OSError, ValueError):  # frame_path gives the reason
            return frozenset()


def _is_inside(target: str, images: Path) -> bool:
    return os.path.join(target, "").startswith(os.path.join(_real(str(images)), ""))


@lru_cache(maxsize=2**14)  # called for every frame, so it is to take microseconds
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def read_image(path: Path, height: int, width: int, what: str) -> Tensor:
    """Read an image, turned as its EXIF orientation says and as viewers and labeling tools show it.

    Args:
        path: of the file.
        height: expected height of the upright image in pixels.
        width: expected width.
        what: description of the image for messages.

    Returns:
        (3, height, width) uint8 RGB.

    Raises:
        ImageSizeError: it is of another size.
        ImageError: it is missing, not an image, or not a single one of 8 bits a channel.
    """
    import torch  # here, so that commands that only look at files start without it
    from torchvision.io import ImageReadMode, decode_image

    name = shorten(path)
    try:
        data = np.fromfile(path, dtype=np.uint8)
        image: Tensor = decode_image(torch.from_numpy(data), mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else re.sub(r"^\w+, \S+:\d+, |\n.*", "", str(error))
        raise ImageError(f"{name}: {what} cannot be read as an image ({reason})") from error
    if image.dtype != torch.uint8 or image.ndim != 3:
        found = f"{len(image)} images" if image.ndim == 4 else f"values of type {image.dtype}"
        raise ImageError(f"{name}: {what} is to be one image of 8 bits a channel, found {found}; convert the file")
    if data[8:12].tobytes() == b"WEBP" and image_orientation(path) != 1:  # torchvision does not turn WebP
        with Image.open(path) as picture:
            image = torch.from_numpy(np.array(upright(picture.convert("RGB")))).permute(2, 0, 1).contiguous()
    if image.shape[1:] == (height, width):
        return image
    found = f"{image.shape[1]}x{image.shape[2]} (height x width)"
    if image.shape[1:] == (width, height) and (turned := image_orientation(path)) in SIDEWAYS:
        raise ImageSizeError(
            f"{name}: {what} is {found}, turned as its EXIF orientation {turned} says and as viewers and labeling "
            f"tools show it, but the annotation file says {height}x{width}, as it is stored; if the masks were drawn "
            "on the pixels as stored, remove the tag from the files (exiftool -Orientation= FILE), otherwise correct "
            "the annotation file"
        )
    raise ImageSizeError(
        f"{name}: {what} is {found}, but the annotation file says {height}x{width}; resize the frames or correct the "
        "file"
    )


def shorten(path: Path | str) -> str:
    """A path for a message, cut off if it is longer than a file's can be."""
    text = str(path)
    return text if len(text) <= 500 else f"{text[:100]}... ({len(text)} characters)"
