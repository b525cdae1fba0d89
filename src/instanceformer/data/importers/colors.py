from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_COLORS = 254
"""Most colors of a video that are taken for instances."""


class Colors:
    """Numbers the colors of a video's label images in order of first appearance, in one image by ascending value."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        """By number the color, such as ``#ff0000``."""
        self._numbers = {0: 0}

    def number(self, image: NDArray[np.uint8], path: Path) -> NDArray[np.int64]:
        """Turn (height, width, 3) colors into (height, width) numbers of instances; black is background, 0.

        Raises:
            ValueError: the video has too many colors.
        """
        packed = image.astype(np.int64) @ np.array([2**16, 2**8, 1])
        found, places = np.unique(packed, return_inverse=True)
        for value in found.tolist():
            if value not in self._numbers:
                self._numbers[value] = len(self._numbers)
                self.names[self._numbers[value]] = f"#{value:06x}"
        if len(self.names) > MAX_COLORS:
            raise ValueError(
                f"{path}: expected one color for each instance, {MAX_COLORS} at most in a video, found "
                f"{len(self.names)}; are the colors blended at edges, or is this a photograph? Export the labels "
                "without anti-aliasing, as lossless PNGs"
            )
        return np.array([self._numbers[value] for value in found.tolist()])[places].reshape(packed.shape)
