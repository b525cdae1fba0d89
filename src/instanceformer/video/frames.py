"""What a video is once it is open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]  # (H, W, 3), RGB


class BrokenVideo(ValueError):  # noqa: N818  (what it is, for whoever catches it)
    """A video of which a part could be read, and that part has been handed out before this is raised."""


@dataclass(frozen=True)
class TimedFrame:
    """A frame and its time.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        seconds: since the video's first frame.
    """

    image: Frame
    seconds: float


@dataclass(frozen=True)
class OpenVideo:
    """A video that is open to be read once.

    Attributes:
        frames: in order of presentation, all of one size. Reading raises ValueError where the first frame cannot be
            had, BrokenVideo after the last that can.
        fps: frames per second, on the average.
        length: number of frames that its file declares, or that its duration makes likely; None where it says neither.
    """

    frames: Iterator[TimedFrame]
    fps: float
    length: int | None
