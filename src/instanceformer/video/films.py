"""Films and streams, read and written with FFmpeg."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from instanceformer.files import replacing
from instanceformer.video.frames import BrokenVideo, Frame, OpenVideo, TimedFrame
from instanceformer.video.truncation import find_truncation

STREAM_TIMEOUT = 30.0  # seconds without data after which a stream counts as broken off
FIRST_REST, LONGEST_REST = 0.5, 30.0  # seconds between two tries to open a stream again; each doubles the last
LONGEST_PAUSE = 600.0  # seconds from one frame to the next; a longer step means that the camera's clock was set,
LONGEST_STEP_BACK = 1.0  # and so does a longer step back; time stands still during a shorter one
UNSPECIFIED = 2  # FFmpeg's number of an unspecified color space
HD_HEIGHT = 720  # rows from which a film of unspecified color space is taken for ITU-R BT.709
TICKS = 90_000  # per second of a film's clock: at the usual frame rates a frame takes a whole number


def open_film(name: str, fps: float, device: str | None = None, reconnect: float = 0.0) -> OpenVideo:
    """A file or stream; see ``open_video``.

    Args:
        name: absolute path or address.
        fps: frames per second if the file does not say.
        device: FFmpeg's input device, for a camera.
        reconnect: seconds for which to try to open a stream again when it drops.
    """
    container, stream = _open(name, device)
    fps = float(stream.average_rate or fps)
    length = stream.frames or round((container.duration or 0) / av.time_base * fps)
    return OpenVideo(_Film(name, fps, device, reconnect).read(container, stream), fps, length or None)


def _open(name: str, device: str | None) -> tuple[InputContainer, VideoStream]:
    address = "://" in name
    try:
        container = av.open(name, format=device, timeout=STREAM_TIMEOUT if address else None)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{name}: cannot be opened as a video ({error})") from error
    covers = av.stream.Disposition.attached_pic  # cover pictures of sound files
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams or container.format.name == "tty":  # it renders any text file
        container.close()
        raise ValueError(f"{name}: the file has no video stream")
    stream = streams[0]
    stream.thread_type = "SLICE" if address or device else "AUTO"  # frame threads are faster but delay frames
    return container, stream


class _Film:
    """The frames of a file or stream, over one or more connections."""

    def __init__(self, name: str, fps: float, device: str | None, reconnect: float) -> None:
        self.name, self.device, self.reconnect = name, device, reconnect
        self._clock, self._count = _Clock(fps), 0
        self._shape: tuple[int, ...] = ()
        self._arrived = 0.0  # of the last frame, by the system's clock

    def read(self, container: InputContainer, stream: VideoStream) -> Iterator[TimedFrame]:
        """All frames; see ``OpenVideo``."""
        try:
            yield from self._read(container, stream)
        finally:
            # Frames whose side data was read keep the decoder alive. A forked process, such as a DataLoader's worker,
            # would wait forever for the decoder's threads when it frees them.
            gc.collect()

    def _read(self, container: InputContainer, stream: VideoStream) -> Iterator[TimedFrame]:
        live = container.size <= 0  # a source with a size would begin again from its first frame
        problem = yield from self._decode(container, stream)
        while self.reconnect and live and self._count:
            count, deadline, rest = self._count, time.monotonic() + self.reconnect, FIRST_REST
            problem = problem or "the stream ended"
            print(f"{self.name}: {problem}; trying for {self.reconnect:g} seconds to open it again", file=sys.stderr)
            while self._count == count and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(rest, left))
                rest = min(2 * rest, LONGEST_REST)
                try:
                    again = _open(self.name, self.device)
                except ValueError:
                    continue
                problem = yield from self._decode(*again)
            if self._count == count:
                problem = f"{problem}, and did not come back within {self.reconnect:g} seconds"
                break
        if self._count == 0:
            raise ValueError(f"{self.name}: no frame can be decoded" + (f"; {problem}" if problem else ""))
        if problem:
            raise BrokenVideo(f"{self.name}: {problem}; {self._count} frames could be decoded")

    def _decode(self, container: InputContainer, stream: VideoStream) -> Generator[TimedFrame, None, str]:
        """The frames of one connection; returns what is wrong with it, or an empty string."""
        damaged = 0
        before = self._count
        last: int | None = None  # time of the last packet
        torn: int | None = None  # time of the last frame decoded from incomplete data
        missing = 0
        with container:
            try:
                for packet in container.demux(stream):
                    last = last if packet.pts is None else packet.pts
                    try:
                        frames = packet.decode()
                        damaged += packet.is_corrupt
                    except av.InvalidDataError:
                        damaged += 1
                        continue
                    for frame in frames:
                        torn = frame.pts if frame.is_corrupt else torn
                        yield self._timed(frame, resumed=0 < before == self._count)
            except av.FFmpegError as error:
                return f"reading failed ({error})"
            size = container.size
            if size > 0:
                missing = sum(entry.pos + entry.size > size for entry in stream.index_entries)
        if missing:
            return f"the file is cut off, {missing} of its frames are not there"
        problem = (
            find_truncation(Path(self.name), container.format.name) if size > 0 and Path(self.name).is_file() else None
        )
        if problem:
            return problem
        if damaged:
            return f"{damaged} packets of data were damaged"
        return "a part of the last frame's data is not there" if size > 0 and last is not None and torn == last else ""

    def _timed(self, frame: av.VideoFrame, resumed: bool) -> TimedFrame:
        """A frame upright and with its time; ``resumed``: the first one after a drop."""
        image, arrived = _upright(frame), time.monotonic()
        self._shape = self._shape or image.shape
        if image.shape != self._shape:
            raise BrokenVideo(
                f"{self.name}: frame {self._count} has {image.shape[1]}x{image.shape[0]} pixels, expected "
                f"{self._shape[1]}x{self._shape[0]} like the frames before it"
            )
        if resumed:
            self._clock.resume(arrived - self._arrived)
        self._count, self._arrived = self._count + 1, arrived
        return TimedFrame(image, self._clock.read(frame.time))


class _Clock:
    """Seconds since a video's first frame, never decreasing, from its frames' timestamps."""

    def __init__(self, fps: float) -> None:
        self._step, self._first, self._now, self._seconds = 1 / fps, math.nan, 0.0, 0.0
        self._gap: float | None = None  # seconds to the next frame by the system's clock, after a drop

    def resume(self, gap: float) -> None:
        """Let the next frame come so many seconds after the last one, whatever its timestamp."""
        self._gap = gap

    def read(self, time: float | None) -> float:
        """Seconds of the next frame by its timestamp ``time``, None if it has none."""
        self._now = self._now + self._step if time is None else time
        if math.isnan(self._first):
            self._first = self._now
        elif self._gap is not None:
            self._first = self._now - self._seconds - max(self._gap, self._step)
            self._gap = None
        elif not -LONGEST_STEP_BACK <= self._now - self._first - self._seconds <= LONGEST_PAUSE:
            self._first = self._now - self._seconds - self._step
        self._seconds = max(self._seconds, self._now - self._first)
        return self._seconds


def _upright(frame: av.VideoFrame) -> Frame:
    """The (H, W, 3) RGB pixels of a frame, turned and mirrored as its display matrix asks."""
    standard = Colorspace.ITU709 if frame.colorspace == UNSPECIFIED and frame.height >= HD_HEIGHT else None
    image = np.asarray(frame.to_ndarray(format="rgb24", src_colorspace=standard), dtype=np.uint8)
    matrix = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    if matrix is None:
        return image
    # A pixel (x, y) is shown at (a x + c y, b x + d y), up to a translation.
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


class VideoWriter:
    """Writes frames to an H.264 file (mp4, yuv420p), which plays everywhere.

    A context manager. The file appears under its name when the block ends without an exception; after an exception
    nothing is left of it. The format needs even sides: an odd one gets its last row or column twice.

    Args:
        path: of the film; the name should end in .mp4.
        fps: frames per second.

    Raises:
        ValueError: fps is not positive; no frame was written before the block ended.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        if not fps > 0:
            raise ValueError(f"fps: found {fps}, expected a positive number of frames per second")
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
            ValueError: the frame has another shape, type or size than the first one.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"found a frame of shape {frame.shape} and type {frame.dtype}, expected (H, W, 3) uint8")
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
            raise ValueError(f"found a frame of shape {frame.shape}, expected {self._shape} like the film's first")
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
        with suppress(av.FFmpegError):  # an earlier error says what is wrong
            self._container.close()

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the encoder's last frames and the index; after an exception nothing."""
        if kind is not None:
            return
        if self._stream is None:
            raise ValueError(f"{self.path}: no frame was written to the film")
        with _writing(self.path):
            self._container.mux(self._stream.encode())
            self._container.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors into one that names the film."""
    try:
        yield
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
