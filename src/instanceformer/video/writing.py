"""Writing films."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from instanceformer.files import replacing
from instanceformer.video.frames import Frame

TICKS = 90_000  # of a film's clock in a second: the usual frame rates are whole numbers of them


class VideoWriter:
    """Write frames to an H.264 file (mp4, yuv420p), which plays everywhere.

    A context manager. The file appears under its name when the block ends without an exception; after an exception
    nothing is left of it. Sides of an odd number of pixels, which the format cannot hold, get their last row or column
    twice.

    Args:
        path: of the film; the name should end in .mp4.
        fps: frames per second.

    Raises:
        ValueError: if fps is not positive; on leaving the block, if no frame was written.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        if not fps > 0:
            raise ValueError(f"fps = {fps}, expected a positive number of frames per second")
        self.path = Path(path)
        self._fps = Fraction(fps).limit_denominator(1001)  # 30000 / 1001 is television's 29.97
        self._stream: VideoStream | None = None
        self._shape: tuple[int, ...] = ()
        self._count = 0
        self._ticks = -1  # of the last frame

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            container = av.open(str(temporary.absolute()), "w", format="mp4", options={"movflags": "faststart"})
            self._container = container
            stack.callback(self._close)
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def write(self, frame: Frame, seconds: float | None = None) -> None:
        """Append an (H, W, 3) uint8 RGB frame; all frames of a film have one size.

        Args:
            frame: to append.
            seconds: when it is shown, since the film's beginning and after the frame before it; None: as fps says.

        Raises:
            ValueError: if the frame is something else, or not of the first frame's size.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"a frame of shape {frame.shape} and type {frame.dtype}, expected (H, W, 3) uint8")
        height, width = frame.shape[:2]
        if self._stream is None:
            self._shape = frame.shape
            self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": "20"})
            self._stream.pix_fmt = "yuv420p"
            self._stream.height, self._stream.width = height + height % 2, width + width % 2
            self._stream.codec_context.time_base = Fraction(1, TICKS)
            self._stream.codec_context.colorspace = Colorspace.ITU601  # as pictures are converted
            self._stream.codec_context.color_range = ColorRange.MPEG
        if frame.shape != self._shape:
            raise ValueError(f"a frame of shape {frame.shape} in a film whose first has shape {self._shape}")
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(even, format="rgb24")
        shown = self._count / self._fps if seconds is None else seconds
        self._ticks = max(self._ticks + 1, round(shown * TICKS))
        picture.pts, picture.time_base = self._ticks, Fraction(1, TICKS)
        self._count += 1
        with _writing(self.path):
            self._container.mux(self._stream.encode(picture))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _close(self) -> None:
        with suppress(av.FFmpegError):  # which comes after the error that says what is wrong
            self._container.close()

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what the encoder holds back, and the index; after an exception nothing."""
        if kind is not None:
            return
        if self._stream is None:
            raise ValueError(f"{self.path}: no frame was written to the film")
        with _writing(self.path):
            self._container.mux(self._stream.encode())
            self._container.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """FFmpeg's errors as one that names the film."""
    try:
        yield
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
