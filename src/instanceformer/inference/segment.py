"""A video in, films and files out: what ``instanceformer segment`` does."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from instanceformer.files import locking, remove_leftovers
from instanceformer.inference.outputs import MasksWriter, ResultsWriter, is_masks_folder
from instanceformer.inference.render import draw_instances
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.video.frames import BrokenVideo, Frame, OpenVideo, TimedFrame

Writer = TypeVar("Writer", bound=AbstractContextManager[object])


@dataclass(frozen=True)
class SegmentOutputs:
    """Where the instances of a video go; at least one is wanted.

    Attributes:
        output: film to write, the video with masks, boxes, ids, classes and scores drawn on it, without sound; its name
            ends in .mp4. Frames are shown when the video shows them.
        results: file to write, tracks in the challenge's format, of video 1, with an entry for each frame that was
            looked at. A track has the category and score that its last frame shows.
        masks: folder for a PNG of ids of each frame, named by the frame's number in the video, from 0.
        overwrite: replace what an earlier run wrote, when this one has something to put in its place.
    """

    output: Path | None = None
    results: Path | None = None
    masks: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("found nothing to write, expected one or more of output, results and masks")
        if self.output is not None and self.output.suffix.lower() != ".mp4":
            raise ValueError(f"output: found {self.output}, expected a name that ends in .mp4")
        for path in self.paths.values():
            if not path.absolute().parent.is_dir():
                raise ValueError(f"{path}: found no folder {path.parent}, expected one that exists")
        for path in self.files:
            if path.exists() and not path.is_file():
                raise ValueError(f"{path}: found a folder or device, expected the name of a file")
        if self.masks is not None and self.masks.exists() and not is_masks_folder(self.masks):
            raise ValueError(
                f"masks: {self.masks} is there already and not a folder of masks alone, expected a new or empty folder"
            )
        refuse_same(self.paths)

    @property
    def paths(self) -> dict[str, Path]:
        """What is to be written, by the names of the options."""
        paths = {"output": self.output, "results": self.results, "masks": self.masks}
        return {name: path for name, path in paths.items() if path is not None}

    @property
    def files(self) -> list[Path]:
        """Those of the paths that are files."""
        return [path for path in (self.output, self.results) if path is not None]

    def refuse_existing(self) -> None:
        """Refuse to replace anything unless that is asked for.

        Raises:
            FileExistsError: a file, or a folder that is not empty, is there.
        """
        for name, path in self.paths.items():
            if not self.overwrite and path.exists() and (path.is_file() or any(path.iterdir())):
                raise FileExistsError(
                    f"{name}: {path} exists; give another name, or --overwrite to replace what an earlier run wrote"
                )


def refuse_same(paths: Mapping[str, str | Path | None]) -> None:
    """Refuse to write what is read, or two things under one name.

    Args:
        paths: what is read and written, by the names of the options.

    Raises:
        ValueError: two of them are one file.
    """
    names: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        place = Path(str(path).removeprefix("file://")).resolve()
        if place in names:
            raise ValueError(f"{name}: found {path}, which is the {names[place]} too, expected another name")
        names[place] = name


def segment_video(
    video: OpenVideo,
    segmenter: VideoInstanceSegmenter,
    outputs: SegmentOutputs,
    *,
    start: int = 0,
    end: int | None = None,
    stride: int = 1,
    progress: bool = False,
) -> int:
    """Segment a video and write what comes of it.

    Files appear under their names when they are complete, and what was there before stays until then. Whatever ends the
    video early, a source that breaks off, an output that cannot be written or Ctrl-C, the others are completed with
    what was seen until then, and the error is raised after that.

    Args:
        video: to segment.
        segmenter: to do it; it is reset.
        outputs: what to write.
        start: number of the first frame to look at, from 0.
        end: number of the first frame not to look at any more; None goes on to the video's end.
        stride: every how many frames to look at one.
        progress: show a bar on standard error.

    Returns:
        Number of frames looked at.

    Raises:
        BrokenVideo: the video could be read in part only; the outputs are complete as far as that part goes.
        ValueError: no frame could be read, or start, end or stride are out of range; nothing is written.
        OSError: an output cannot be written, or is there already and not to be replaced.
        BlockingIOError: another process is writing an output.
    """
    if start < 0 or stride < 1 or (end is not None and end <= start):
        raise ValueError(f"found start {start}, end {end}, stride {stride}; expected 0 <= start < end and stride >= 1")
    names = [category.name for category in segmenter.categories]
    waiting: deque[TimedFrame] = deque()  # frames whose instances are not there yet: at most a chunk

    def images() -> Iterator[Frame]:
        for frame in islice(video.frames, start, end, stride):
            waiting.append(frame)
            yield frame.image

    length = end if video.length is None else min(video.length, end or video.length)
    stopped: BaseException | None = None
    count, beginning = 0, 0.0
    with ExitStack() as stack:

        def enter(writer: Writer) -> Writer:
            """The writer, to be left on its own: what others come to does not keep it from finishing its file."""
            writer.__enter__()
            stack.push(lambda *reason: writer.__exit__(*(reason if count == 0 else (None, None, None))))
            return writer

        for path in outputs.paths.values():
            stack.enter_context(locking(path.absolute()))
        for path in outputs.files:
            remove_leftovers(path.parent, escape(path.name))
        outputs.refuse_existing()
        results = film = masks = None
        if outputs.masks is not None:
            masks = enter(MasksWriter(outputs.masks))
        if outputs.output is not None:
            from instanceformer.video.writing import VideoWriter  # needs FFmpeg

            film = enter(VideoWriter(outputs.output, video.fps / stride))
        if outputs.results is not None:
            results = enter(ResultsWriter(outputs.results, segmenter.categories))
        total = None if length is None else len(range(start, length, stride))
        hidden = not progress or sys.stderr is None
        bar = stack.enter_context(tqdm(total=total, unit="frame", disable=hidden))
        try:
            for instances in segmenter.segment(images()):
                frame = waiting.popleft()
                beginning = beginning if count else frame.seconds
                drawn = None if film is None else draw_instances(frame.image, instances, names, boxes=True)
                if results is not None:
                    results.write(instances)
                if film is not None and drawn is not None:
                    film.write(drawn, frame.seconds - beginning)
                if masks is not None:
                    masks.write(start + count * stride, instances)
                count += 1
                bar.update()
        except (Exception, KeyboardInterrupt) as reason:
            stopped = reason
        if count == 0:
            if stopped is not None and not isinstance(stopped, BrokenVideo):
                raise stopped
            raise ValueError(f"found no frame from frame {start} on" + (f"; {stopped}" if stopped else "")) from stopped
        if stopped is not None:
            stopped.add_note("what was seen until then is written")
            raise stopped
    return count
