"""Frames, and videos that are made of pictures: folders and animated images; which way up a picture is."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from instanceformer.files import natural_order
from instanceformer.video.truncation import find_truncation

Frame = npt.NDArray[np.uint8]  # (H, W, 3), RGB

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ANIMATED = ("GIF", "PNG", "WEBP")  # formats that may hold several pictures
SHORTEST, USUAL = 10, 100  # milliseconds: durations up to the first are replaced by the second, as browsers do
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # of damaged images
_TURNS = {  # by EXIF orientation, what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


class BrokenVideo(ValueError):  # noqa: N818  (named for what was found, not for the failure)
    """Only a part of a video could be read; raised after all frames of that part were yielded."""


@dataclass(frozen=True)
class TimedFrame:
    """A frame and its time.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        seconds: since the video's first frame.
        name: of the image in a folder of images; otherwise empty.
    """

    image: Frame
    seconds: float
    name: str = ""


@dataclass(frozen=True)
class OpenVideo:
    """A video opened for reading once.

    Attributes:
        frames: in order of presentation, all of one size. Iterating raises ValueError if no frame can be read, and
            BrokenVideo after the last frame that can be read if more should follow.
        fps: average frames per second.
        length: number of frames that the file declares or its duration implies; None without either.
    """

    frames: Iterator[TimedFrame]
    fps: float
    length: int | None


def find_images(folder: Path) -> list[Path]:
    """The images of a folder, sorted by name, with numbers in numerical order."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(files, key=lambda path: natural_order(path.name))


def open_folder(folder: Path, fps: float) -> OpenVideo:
    """The images of a folder as frames; see ``open_video``."""
    files = find_images(folder)
    if not files:
        raise ValueError(
            f"{folder}: found no images, expected files with names that end in {', '.join(IMAGE_SUFFIXES)}"
        )
    sizes = []
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.append(upright_size(image))
        except IMAGE_ERRORS as error:
            raise ValueError(f"{file}: cannot be read as an image ({error})") from error
        if sizes[-1] != sizes[0]:
            (height, width), expected = sizes[-1], sizes[0]
            raise ValueError(
                f"{file}: found {width}x{height} pixels, expected {expected[1]}x{expected[0]} like {files[0].name}; "
                "the frames of a video have one size"
            )
    return OpenVideo(_read_images(files, fps), fps, len(files))


def _read_images(files: list[Path], fps: float) -> Iterator[TimedFrame]:
    for index, file in enumerate(files):
        try:
            with Image.open(file) as image:
                pixels = _to_rgb(image)
        except IMAGE_ERRORS as error:
            kind = BrokenVideo if index else ValueError
            raise kind(f"{file}: cannot be read as an image ({error})") from error
        yield TimedFrame(pixels, index / fps, file.name)


def open_animation(path: Path) -> OpenVideo | None:
    """A GIF, PNG or WebP, its pictures shown as long as browsers show them; None if the file is none of these."""
    try:
        with Image.open(path, formats=ANIMATED) as image:
            pictures = _pictures(image)
            image.seek(pictures.start)
            image.load()
            return OpenVideo(_read_animation(path), 1 / _seconds(image), len(pictures))
    except UnidentifiedImageError:
        return None
    except IMAGE_ERRORS as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def _read_animation(path: Path) -> Iterator[TimedFrame]:
    count, seconds = 0, 0.0
    problem: str | None = None
    try:
        with Image.open(path, formats=ANIMATED) as image:
            for index in _pictures(image):
                image.seek(index)
                yield TimedFrame(_to_rgb(image), seconds)
                count += 1
                seconds += _seconds(image)
        problem = find_truncation(path, "gif") if image.format == "GIF" else None
    except IMAGE_ERRORS as error:
        problem = f"cannot be read as an image ({error})"
    if problem:
        raise (BrokenVideo if count else ValueError)(f"{path}: {problem}; {count} frames could be decoded")


def _pictures(image: Image.Image) -> range:
    """The indices of an image's pictures, without a default one meant for programs that show no animations."""
    return range(int(bool(image.info.get("default_image"))), getattr(image, "n_frames", 1))


def _seconds(image: Image.Image) -> float:
    """How long the image's current picture is shown."""
    milliseconds = float(image.info.get("duration") or 0)
    return (milliseconds if milliseconds > SHORTEST else USUAL) / 1000


def _to_rgb(image: Image.Image) -> Frame:
    shown = upright(image)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # Pillow would clip at 255
        return np.repeat((np.asarray(shown) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, expected 8 or 16 bits")
    return np.array(shown.convert("RGB"))


def image_orientation(path: Path) -> int:
    """``orientation`` of an image file, from its header; 1 if Pillow cannot read it."""
    try:
        with Image.open(path) as image:
            return orientation(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 1


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image that was just opened, 1 to 8; 1 if it is upright or EXIF does not say.

    TIFF, which Pillow turns itself, is upright.
    """
    data = image.info.get("exif")  # Pillow's getexif would decode a whole PNG, and read XMP, which no other reader does
    if not data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, OSError, struct.error):  # damaged; decoders ignore it too
        return 1
    return value if value in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels of an image that was just opened, once it is upright."""
    return (image.width, image.height) if orientation(image) in SIDEWAYS else (image.height, image.width)
