"""Reading and writing video files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

Frame = npt.NDArray[np.uint8]  # (H, W, 3), RGB


def read_frames(path: str | Path) -> Iterator[Frame]:
    """Decode a video file frame by frame.

    Args:
        path: of a file in any container and codec that FFmpeg reads.

    Yields:
        (H, W, 3) uint8 RGB frames, in order of presentation.

    Raises:
        FileNotFoundError: if there is no such file (at the call, not at the first frame).
        ValueError: if it holds no video, or where it cannot be decoded any further.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    return _decode(path)


def _decode(path: Path) -> Iterator[Frame]:
    index = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: the file has no video stream")
            container.streams.video[0].thread_type = "AUTO"
            for index, frame in enumerate(container.decode(video=0), start=1):  # noqa: B007  (read where decoding fails)
                yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be decoded as a video after {index} frames ({error})") from error


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
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        if not fps > 0:
            raise ValueError(f"fps = {fps}, expected a positive number of frames per second")
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._fps = Fraction(fps).limit_denominator(1001)  # 30000 / 1001 is television's 29.97
        self._stream: VideoStream | None = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        self._container = av.open(str(self._temporary), "w", format="mp4", options={"movflags": "faststart"})
        return self

    def write(self, frame: Frame) -> None:
        """Append an (H, W, 3) uint8 RGB frame; all frames of a film have one size.

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
        if frame.shape != self._shape:
            raise ValueError(f"a frame of shape {frame.shape} in a film whose first has shape {self._shape}")
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._stream is None:
                    raise ValueError(f"{self.path}: no frame was written to the film")
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
