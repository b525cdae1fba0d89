"""How image files are turned, in every reader alike: as EXIF says, and as viewers and labelling tools show them."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import ExifTags, Image

_TURNS = {  # by EXIF orientation what makes an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


def image_orientation(path: Path) -> int:
    """How an image file is to be turned, see ``orientation``, of which only the head is read; 1 if Pillow cannot."""
    try:
        with Image.open(path) as image:
            return orientation(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 1


def orientation(image: Image.Image) -> int:
    """How an image that was just opened is to be turned, as EXIF's number; 1 where it is upright or nothing is said.

    What Pillow turns by itself, which is TIFF, is upright.
    """
    data = image.info.get("exif")  # Pillow's getexif would decode a whole PNG, and take XMP's word as nothing else does
    if not data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        found = exif.get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, OSError, struct.error):  # damaged, as decoders pass over it
        return 1
    return found if found in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels of an image that was just opened, once it is upright."""
    return (image.width, image.height) if orientation(image) in SIDEWAYS else (image.height, image.width)
