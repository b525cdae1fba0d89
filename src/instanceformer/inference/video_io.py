"""Reading and writing videos."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image

from instanceformer.data.images import upright, upright_size
from instanceformer.files import natural_order, replacing

Frame = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Source = str | Path | int | Iterable[Frame]  # see open_video

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
STREAM_TIMEOUT = 30.0  # seconds without data after which a stream counts as broken off
LONGEST_PAUSE = 600.0  # seconds from one frame to the next; more than that is a clock that was set,
LONGEST_STEP_BACK = 1.0  # and so is more than this back; less is held until the clock is there again
UNSPECIFIED = 2  # FFmpeg's number of the colour space of a film that does not say
HD_HEIGHT = 720  # pixels from which a film that does not say so is taken to have the colours of high definition
TICKS = 90_000  # of a film's clock in a second: the usual frame rates are whole numbers of them
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of damaged images
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}  # FFmpeg's input device and its name


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


def open_video(source: Source, fps: float = 25.0) -> OpenVideo:
    """Open a video.

    A video file is shown as its display matrix asks, turned by quarters and mirrored; its pixels are taken for square.
    Packets that cannot be decoded are passed over, and reported by BrokenVideo when the rest has been read.

    Args:
        source: a video file in any container and codec that FFmpeg reads; a folder of images, one a frame, in the order
            of their names with numbers as numbers, turned as their EXIF orientation says; the address of a stream,
            such as rtsp://...; the index of a camera, also as text; or frames (H, W, 3) uint8 RGB.
        fps: frames per second of images, frames, and files that do not say when a frame is to be shown.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: fps is not positive, or what is there is no video; the images of a folder differ in size.
    """
    if not fps > 0:
        raise ValueError(f"fps: found {fps}, expected a positive number of frames per second")
    if isinstance(source, str) and source.isdecimal() and not Path(source).exists():
        source = int(source)
    if isinstance(source, int):
        if sys.platform not in CAMERAS:
            raise ValueError(f"camera {source}: cameras are known by number on {' and '.join(CAMERAS)} only")
        device, name = CAMERAS[sys.platform]
        return _open_stream(name.format(source), fps, device)
    if isinstance(source, str) and "://" in source:
        return _open_stream(source, fps)
    if not isinstance(source, str | Path):
        return OpenVideo((TimedFrame(image, index / fps) for index, image in enumerate(source)), fps, None)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video file or folder of images")
    if path.is_dir():
        return _open_folder(path, fps)
    return _open_stream(str(path.absolute()), fps)  # FFmpeg would take what precedes a colon for a protocol


def _open_stream(name: str, fps: float, device: str | None = None) -> OpenVideo:
    address = "://" in name
    try:
        container = av.open(name, format=device, timeout=STREAM_TIMEOUT if address else None)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{name}: cannot be opened as a video ({error})") from error
    covers = av.stream.Disposition.attached_pic  # a picture in a sound file
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams or container.format.name == "tty":  # which makes pictures of any text
        container.close()
        raise ValueError(f"{name}: the file has no video stream")
    stream = streams[0]
    stream.thread_type = "SLICE" if address or device else "AUTO"  # threads by frame are faster, but hold back frames
    fps = float(stream.average_rate or fps)
    length = stream.frames or round((container.duration or 0) / av.time_base * fps)
    return OpenVideo(_decode(container, stream, name, fps), fps, length or None)


def _decode(container: InputContainer, stream: VideoStream, name: str, fps: float) -> Iterator[TimedFrame]:
    count = damaged = missing = 0
    clock, end = _Clock(fps), 0.0  # the end of the last packet, in seconds as the file counts them
    shape: tuple[int, ...] = ()
    problem = ""
    with container:
        try:
            for packet in container.demux(stream):
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                try:
                    frames = packet.decode()
                    damaged += packet.is_corrupt
                except av.InvalidDataError:
                    damaged += 1
                    continue
                for frame in frames:
                    image, seconds = _upright(frame), clock.read(frame.time)
                    shape = shape or image.shape
                    if image.shape != shape:
                        raise BrokenVideo(
                            f"{name}: frame {count} has {image.shape[1]}x{image.shape[0]} pixels, expected "
                            f"{shape[1]}x{shape[0]} like the frames before it"
                        )
                    count += 1
                    yield TimedFrame(image, seconds)
        except av.FFmpegError as error:
            problem = f"reading failed ({error})"
        if container.size > 0:
            missing = sum(entry.pos + entry.size > container.size for entry in stream.index_entries)
        declared = _declared_duration(stream) if "matroska" in container.format.name else 0.0
    if not problem and missing:
        problem = f"the file is cut off, {missing} of its frames are not there"
    elif not problem and count and end < declared - 1:
        problem = f"the file is cut off, {declared:g} seconds of video are declared, {end:g} are there"
    elif not problem and damaged:
        problem = f"{damaged} packets of data were damaged"
    if count == 0:
        raise ValueError(f"{name}: no frame can be decoded" + (f"; {problem}" if problem else ""))
    if problem:
        raise BrokenVideo(f"{name}: {problem}; {count} frames could be decoded")


class _Clock:
    """Seconds since a video's first frame, which never go back, from the times that its frames carry."""

    def __init__(self, fps: float) -> None:
        self._step, self._first, self._now, self._seconds = 1 / fps, math.nan, 0.0, 0.0

    def read(self, time: float | None) -> float:
        """The seconds of the next frame, whose time is ``time``; None where it carries none."""
        self._now = self._now + self._step if time is None else time
        if math.isnan(self._first):
            self._first = self._now
        elif not -LONGEST_STEP_BACK <= self._now - self._first - self._seconds <= LONGEST_PAUSE:
            self._first = self._now - self._seconds - self._step
        self._seconds = max(self._seconds, self._now - self._first)
        return self._seconds


def _upright(frame: av.VideoFrame) -> Frame:
    """The (H, W, 3) picture of a frame as it is to be shown."""
    standard = Colorspace.ITU709 if frame.colorspace == UNSPECIFIED and frame.height >= HD_HEIGHT else None
    image = np.asarray(frame.to_ndarray(format="rgb24", src_colorspace=standard), dtype=np.uint8)
    matrix = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    if matrix is None:
        return image
    # A pixel (x, y) is shown at (a x + c y, b x + d y), but for where the picture begins.
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _declared_duration(stream: VideoStream) -> float:
    """The second at which Matroska says that a stream ends; 0 where nothing is said."""
    parts = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    return 3600 * int(parts[1]) + 60 * int(parts[2]) + float(parts[3]) if parts else 0.0


def _open_folder(folder: Path, fps: float) -> OpenVideo:
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=lambda path: natural_order(path.name))
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


def _to_rgb(image: Image.Image) -> Frame:
    shown = upright(image)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # Pillow would cut off at 255
        return np.repeat((np.asarray(shown) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, expected 8 or 16 bits")
    return np.array(shown.convert("RGB"))


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
