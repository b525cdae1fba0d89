"""Label images of a video's instances, one for each frame."""

from __future__ import annotations

import os
import re
import shutil
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from instanceformer.files import check_writable, replacing
from instanceformer.inference.render import instance_color, largest_first
from instanceformer.inference.tracks import FrameInstances

PALETTE = [0, 0, 0] + [channel for number in range(1, 256) for channel in instance_color(number)]


def holds_only_masks(path: Path) -> bool:
    """Whether a path is a folder with no files but those that MasksWriter writes."""
    return path.is_dir() and all(re.fullmatch(r"\d{6,}\.png", entry.name) for entry in path.iterdir())


class MasksWriter:
    """Writes a folder of label images, see ``write_label_image``, each named by its frame's number.

    A context manager. In a new or empty folder the images appear as they are written, and stay after an exception.
    Images of an earlier run are replaced when the block ends without an exception.

    Args:
        folder: for the images, created with the first of them.
        whole: let the folder appear, too, when the block ends without an exception.
    """

    def __init__(self, folder: Path, whole: bool = False) -> None:
        self.folder = folder.absolute()
        self._whole = whole
        self._failed = False

    def __enter__(self) -> Self:
        self._replaces = self._whole or (self.folder.is_dir() and any(self.folder.iterdir()))
        self._target = self._beside("new") if self._replaces else self.folder
        if self._replaces:
            for leftover in self.folder.parent.glob(f".{escape(self.folder.name)}.*.tmp"):  # of killed processes
                shutil.rmtree(leftover)
        check_writable(self._target / "0" if self._target.is_dir() else self._target)
        return self

    def _beside(self, kind: str) -> Path:
        return self.folder.with_name(f".{self.folder.name}.{os.getpid()}.{kind}.tmp")

    def write(self, number: int, instances: FrameInstances) -> None:
        """Write a frame's image."""
        self._failed = True  # until the image is complete
        self._target.mkdir(exist_ok=True)
        write_label_image(self._target / f"{number:06}.png", instances)
        self._failed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._replaces:
            return
        try:
            if kind is None and not self._failed:
                if self.folder.is_dir():
                    self.folder.rename(self._beside("old"))
                self._target.rename(self.folder)
                shutil.rmtree(self._beside("old"), ignore_errors=True)
        finally:
            shutil.rmtree(self._target, ignore_errors=True)


def write_label_image(path: Path, instances: FrameInstances) -> None:
    """Write a PNG whose values are ids, 0 where there is no instance; small instances lie in front of large ones.

    The values have 8 bits and a palette of the colors in which instances are drawn, or 16 bits in gray if an id is
    above 255; ids above 65535 start again from 1. The file appears under its name only when it is complete.

    Args:
        path: of the file, in a folder that exists.
        instances: of a frame.
    """
    masks = instances.masks.numpy()
    labels = np.zeros(masks.shape[1:], dtype=np.uint16)
    for index in largest_first(masks):
        labels[masks[index]] = (int(instances.ids[index]) - 1) % 65535 + 1
    image = Image.fromarray(labels if labels.max() > 255 else labels.astype(np.uint8))
    if image.mode == "L":
        image.putpalette(PALETTE)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
