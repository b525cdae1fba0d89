"""Image files of frames: where they may be, and how to read them. torch is imported only when an image is read."""

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
from instanceformer.video.frames import SIDEWAYS, image_orientation, upright

if TYPE_CHECKING:
    from torch import Tensor

    from instanceformer.data.annotations import Video
    from instanceformer.data.catalog import Split


class ImageError(ValueError):
    """An image file is missing, damaged, or not an image."""


class ImageSizeError(ImageError):
    """An image does not have the size of its video."""


def frame_path(images: Path, name: str, outside: bool = False) -> Path:
    """The path of a frame's image file, which need not exist.

    Args:
        images: folder that the file names in an annotation file are relative to; may itself be a link.
        name: a file name from the annotation file.
        outside: allow names and links that lead out of the folder.

    Raises:
        ImageError: no file can have this name.
        ValueError: the name leads out of the folder through ``..``, an absolute path or a link, and ``outside`` is
            false.
    """
    path = images / name
    if outside:
        return path
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:  # reading the file will give the reason
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
    """Check that no frame lies outside the image folder and that the first frame of every video exists.

    Args:
        option: command-line option that set the split, for messages.
        videos: the videos of the split.
        split: the image folder, and the annotation file, which is used in messages.
        outside: as in ``frame_path``.

    Raises:
        FileNotFoundError: the first frame of a video does not exist.
        ImageError: no file can have the name of a frame.
        ValueError: a video has no file names, or a frame lies outside the image folder.
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
    """Tells which frames exist, listing each folder only once. Arguments are as in ``frame_path``."""

    def __init__(self, images: Path, outside: bool = False) -> None:
        self.images, self.outside = images, outside
        self._plain: dict[str, frozenset[str]] = {}  # names of regular files (not links), by folder

    def has(self, name: str) -> bool:
        """Whether the file of a frame exists; raises as ``frame_path`` does."""
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
        except (OSError, ValueError):  # frame_path will give the reason
            return frozenset()


def _is_inside(target: str, images: Path) -> bool:
    return os.path.join(target, "").startswith(os.path.join(_real(str(images)), ""))


@lru_cache(maxsize=2**14)  # called for every frame, so it must take only microseconds
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def read_image(path: Path, height: int, width: int, what: str) -> Tensor:
    """Read an image and apply its EXIF orientation, as viewers and labeling tools do.

    Args:
        path: the image file.
        height: expected height of the upright image in pixels.
        width: expected width of the upright image in pixels.
        what: description of the image for messages.

    Returns:
        (3, height, width) uint8 RGB.

    Raises:
        ImageSizeError: the image has a different size.
        ImageError: the file is missing, is not an image, has several images, or does not have 8 bits per channel.
    """
    import torch  # imported here so that commands that only look at files do not load it
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
    if data[8:12].tobytes() == b"WEBP" and image_orientation(path) != 1:  # which torchvision does not turn
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
    """A path for a message, truncated if it is absurdly long."""
    text = str(path)
    return text if len(text) <= 500 else f"{text[:100]}... ({len(text)} characters)"
