"""Orientation of image files, for every reader: as EXIF says, and as viewers and labeling tools show them."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import ExifTags, Image

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
