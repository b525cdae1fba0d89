"""Videos that are pictures: folders of images, and animated ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from instanceformer.files import natural_order
from instanceformer.orientation import upright, upright_size
from instanceformer.video.cut_off import cut_off
from instanceformer.video.frames import BrokenVideo, Frame, OpenVideo, TimedFrame

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ANIMATED = ("GIF", "PNG", "WEBP")  # formats of images that may move
SHORTEST, USUAL = 10, 100  # milliseconds: a picture that is to be shown no longer than one is shown for the other
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # of damaged images


def find_images(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names with numbers as numbers."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(files, key=lambda path: natural_order(path.name))


def open_folder(folder: Path, fps: float) -> OpenVideo:
    """The images of a folder, one a frame; see ``open_video``."""
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
        yield TimedFrame(pixels, index / fps)


def open_animation(path: Path) -> OpenVideo | None:
    """A GIF, PNG or WebP, its pictures shown as long as browsers show them; None for what is none of these."""
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
        problem = cut_off(path, "gif") if image.format == "GIF" else None
    except IMAGE_ERRORS as error:
        problem = f"cannot be read as an image ({error})"
    if problem:
        raise (BrokenVideo if count else ValueError)(f"{path}: {problem}; {count} frames could be decoded")


def _pictures(image: Image.Image) -> range:
    """The numbers of an image's pictures, without one that is only for programs that cannot show the others."""
    return range(int(bool(image.info.get("default_image"))), getattr(image, "n_frames", 1))


def _seconds(image: Image.Image) -> float:
    """How long the picture at which an image stands is shown."""
    milliseconds = float(image.info.get("duration") or 0)
    return (milliseconds if milliseconds > SHORTEST else USUAL) / 1000


def _to_rgb(image: Image.Image) -> Frame:
    shown = upright(image)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # Pillow would cut off at 255
        return np.repeat((np.asarray(shown) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, expected 8 or 16 bits")
    return np.array(shown.convert("RGB"))
