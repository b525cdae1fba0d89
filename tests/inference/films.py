"""Tiny films of every kind, for tests."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from instanceformer.video.frames import BrokenVideo, Frame
from instanceformer.video.reading import open_video


def moving_square(count: int = 6, height: int = 48, width: int = 64) -> list[Frame]:
    """A bright square that moves to the right over a smooth ground, in colors that 4:2:0 keeps."""
    frames = []
    for t in range(count):
        frame = np.full((height, width, 3), (40, 80, 160), dtype=np.uint8)
        frame[8:24, 4 + 2 * t : 20 + 2 * t] = (220, 180, 60)
        frames.append(frame)
    return frames


def write_film(
    path: Path,
    frames: Sequence[Frame],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    seconds: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Ten frames a second, or at the times given; the index of an mp4 at its beginning."""
    container_options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        for t, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = (
                round(1000 * (t / 10 if seconds is None else seconds[t])),
                Fraction(1, 1000),
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_live(path: Path, frames: Sequence[Frame], container: str, codec: str, **options: str) -> Path:
    """Ten frames a second, written as to a pipe: nothing is put right at the end."""
    content = bytearray()

    class Pipe:
        def write(self, data: bytes) -> int:
            content.extend(data)
            return len(data)

    with av.open(Pipe(), "w", format=container, options=options) as film:
        stream: Any = film.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())
    path.write_bytes(content)
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Set the display matrix (a, b, c, d) of an mp4's track, as a phone held upright does."""
    content = bytearray(path.read_bytes())
    begin = content.find(b"tkhd") + 44  # version 0: times, ids and volume come first
    a, b, c, d = (65536 * x for x in matrix)
    content[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def write_sound(path: Path, codec: str = "pcm_s16le") -> Path:
    """A tenth of a second of silence."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """Leave the first part of a file only."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def read(source: Any, **options: Any) -> list[Frame]:
    return [frame.image for frame in open_video(source, **options).frames]


def read_until_broken(source: Any) -> tuple[int, str]:
    """How many frames come, and what the error after them says."""
    count = 0
    try:
        for _ in open_video(source).frames:
            count += 1
    except BrokenVideo as error:
        return count, str(error)
    pytest.fail("expected BrokenVideo")


def difference(frames: Sequence[Frame], originals: Sequence[Frame]) -> float:
    """The greatest mean distance of a frame from its original, in gray levels."""
    return max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, originals, strict=True))


def serve(*contents: bytes, stall: threading.Event | None = None) -> str:
    """The address of a server that sends one content to each that comes, and then closes or waits for ``stall``."""
    server = socket.create_server(("127.0.0.1", 0))

    def send() -> None:
        with server:
            for content in contents:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(content)
                    if stall is not None:
                        stall.wait(20)

    threading.Thread(target=send, daemon=True).start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"
