"""Films and streams, by way of FFmpeg."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from instanceformer.video.cut_off import cut_off
from instanceformer.video.frames import BrokenVideo, Frame, OpenVideo, TimedFrame

STREAM_TIMEOUT = 30.0  # seconds without data after which a stream counts as broken off
FIRST_REST, LONGEST_REST = 0.5, 30.0  # seconds between two tries to open a stream again; each is twice the one before
LONGEST_PAUSE = 600.0  # seconds from one frame to the next; more than that is a clock that was set,
LONGEST_STEP_BACK = 1.0  # and so is more than this back; less is held until the clock is there again
UNSPECIFIED = 2  # FFmpeg's number of the colour space of a film that does not say
HD_HEIGHT = 720  # pixels from which a film that does not say so is taken to have the colours of high definition


def open_film(name: str, fps: float, device: str | None = None, reconnect: float = 0.0) -> OpenVideo:
    """A file or stream; see ``open_video``.

    Args:
        name: its absolute path or address.
        fps: where it does not say.
        device: FFmpeg's name of the kind of camera that it is.
        reconnect: seconds for which to try to open it again when it drops.
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
    covers = av.stream.Disposition.attached_pic  # a picture in a sound file
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams or container.format.name == "tty":  # which makes pictures of any text
        container.close()
        raise ValueError(f"{name}: the file has no video stream")
    stream = streams[0]
    stream.thread_type = "SLICE" if address or device else "AUTO"  # threads by frame are faster, but hold back frames
    return container, stream


class _Film:
    """The frames of a file or stream, over as many connections as that takes."""

    def __init__(self, name: str, fps: float, device: str | None, reconnect: float) -> None:
        self.name, self.device, self.reconnect = name, device, reconnect
        self._clock, self._count = _Clock(fps), 0
        self._shape: tuple[int, ...] = ()
        self._arrived = 0.0  # when the last frame did, by the system's clock

    def read(self, container: InputContainer, stream: VideoStream) -> Iterator[TimedFrame]:
        """All frames; see ``OpenVideo``."""
        try:
            yield from self._read(container, stream)
        finally:
            gc.collect()  # of frames whose side data was looked at: they keep the decoder, for whose threads a process
            # that is forked off, as a DataLoader does, would wait for ever when it came to free them

    def _read(self, container: InputContainer, stream: VideoStream) -> Iterator[TimedFrame]:
        live = container.size <= 0  # what has a size ends with it, and would begin again from its first frame
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
        """The frames of one connection, and what is wrong with it."""
        damaged = 0
        before = self._count
        last: int | None = None  # time of the last packet
        torn: int | None = None  # of the last frame that was made of a part of its data
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
        problem = cut_off(Path(self.name), container.format.name) if size > 0 and Path(self.name).is_file() else None
        if problem:
            return problem
        if damaged:
            return f"{damaged} packets of data were damaged"
        return "a part of the last frame's data is not there" if size > 0 and last is not None and torn == last else ""

    def _timed(self, frame: av.VideoFrame, resumed: bool) -> TimedFrame:
        """A frame as it is to be shown; ``resumed``: the first after a drop."""
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
    """Seconds since a video's first frame, which never go back, from the times that its frames carry."""

    def __init__(self, fps: float) -> None:
        self._step, self._first, self._now, self._seconds = 1 / fps, math.nan, 0.0, 0.0
        self._gap: float | None = None  # seconds from the last frame to the next, where another clock measured them

    def resume(self, gap: float) -> None:
        """Go on so many seconds after the last frame, whatever time the next frame carries."""
        self._gap = gap

    def read(self, time: float | None) -> float:
        """The seconds of the next frame, whose time is ``time``; None where it carries none."""
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
