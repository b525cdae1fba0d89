"""Opening videos of every kind: files, folders of images, streams, cameras, arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from instanceformer.video.frames import Frame, OpenVideo, TimedFrame, open_animation, open_folder

Source = str | Path | int | Iterable[Frame]  # see open_video

CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}  # FFmpeg's input device and its name


def open_video(source: Source, fps: float = 25.0, reconnect: float = 0.0) -> OpenVideo:
    """Open a video.

    Frames of a video file are turned by quarters and mirrored as its display matrix asks; pixels count as square.
    Packets that cannot be decoded are skipped, and BrokenVideo reports them after the rest has been read; it also
    reports a file that is cut off, if the lengths that its container declares reveal it.

    Args:
        source: a video file in any container and codec that FFmpeg reads; an animated GIF, PNG or WebP; a folder of
            images, one for each frame, sorted by name with numbers in numerical order, turned as their EXIF
            orientation says; the address of a stream, such as rtsp://...; the index of a camera, also as text; or
            frames (H, W, 3) uint8 RGB.
        fps: frames per second of images, arrays, and files without timestamps.
        reconnect: seconds for which to try, with growing pauses, to reopen a camera or live stream that dropped; frame
            times include them. 0: the end of a stream is the end of the video.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: fps is not positive, reconnect is negative, the source is no video, or the images of a folder differ
            in size.
    """
    from instanceformer.video.films import open_film  # PyAV is needed for films only

    if not fps > 0:
        raise ValueError(f"fps: found {fps}, expected a positive number of frames per second")
    if not reconnect >= 0:
        raise ValueError(f"reconnect: found {reconnect}, expected 0 or more seconds")
    if isinstance(source, str) and source.isdecimal() and not Path(source).exists():
        source = int(source)
    if isinstance(source, int):
        if sys.platform not in CAMERAS:
            raise ValueError(f"camera {source}: cameras are known by number on {' and '.join(CAMERAS)} only")
        device, name = CAMERAS[sys.platform]
        return open_film(name.format(source), fps, device, reconnect)
    if isinstance(source, str) and "://" in source:
        return open_film(source, fps, reconnect=reconnect)
    if not isinstance(source, str | Path):
        return OpenVideo((TimedFrame(image, index / fps) for index, image in enumerate(source)), fps, None)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video file or folder of images")
    if path.is_dir():
        return open_folder(path, fps)
    # FFmpeg would take the part of a relative path before a colon for a protocol
    return open_animation(path) or open_film(str(path.absolute()), fps)
