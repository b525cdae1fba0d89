"""Writes a video's instances as its frames arrive: a film, a results file, label images, lines of JSON."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from instanceformer.files import locking, remove_leftovers
from instanceformer.inference.label_images import MasksWriter, holds_only_masks
from instanceformer.inference.render import draw_instances
from instanceformer.inference.results_files import STANDARD_OUTPUT, JsonLinesWriter, ResultsFormat, TracksWriter
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.tracks import FrameInstances
from instanceformer.video.frames import BrokenVideo, Frame, OpenVideo, TimedFrame

Writer = TypeVar("Writer", bound=AbstractContextManager[object])


@dataclass(frozen=True)
class SegmentOutputs:
    """Where the instances of a video go; at least one path must be given, unless ``view`` is set.

    Attributes:
        output: film to write: the video with masks, boxes, ids, classes and scores drawn on it, without sound; its name
            ends in .mp4. Frames are shown at the same times as in the video.
        results: file to write: the tracks of the frames that were looked at, as video 1. A track has the category and
            score of the last frame that shows it.
        masks: folder for a PNG of ids for each frame, named by the frame's number in the video, from 0.
        jsonl: file for a line of JSON a frame, written as soon as the frame is done; ``-`` is the standard output,
            which then carries nothing else.
        format: of ``results``: the JSON of YouTube-VIS, the text of MOTS, or COCO's JSON of videos.
        overwrite: replace the outputs of an earlier run once those of this run are complete.
        view: whether they are shown as they come, so that none need be written.

    Raises:
        ValueError: no path is given, or one cannot be used.
    """

    output: Path | None = None
    results: Path | None = None
    masks: Path | None = None
    jsonl: Path | None = None
    format: ResultsFormat = "youtube_vis"
    overwrite: bool = False
    view: bool = False

    def __post_init__(self) -> None:
        if not self.paths and self.jsonl is None and not self.view:
            raise ValueError("found nothing to write, expected one or more of output, results, masks and jsonl")
        if self.output is not None and self.output.suffix.lower() != ".mp4":
            raise ValueError(f"output: found {self.output}, expected a name that ends in .mp4")
        for path in self.paths.values():
            if not path.absolute().parent.is_dir():
                raise ValueError(f"{path}: found no folder {path.parent}, expected one that exists")
        for path in self.files:
            if path.exists() and not path.is_file():
                raise ValueError(f"{path}: found a folder or device, expected the name of a file")
        if self.masks is not None and self.masks.exists() and not holds_only_masks(self.masks):
            raise ValueError(
                f"masks: {self.masks} is there already and not a folder of masks alone, expected a new or empty folder"
            )
        refuse_same(self.paths)

    @property
    def paths(self) -> dict[str, Path]:
        """The given paths, by the names of their options."""
        paths = {"output": self.output, "results": self.results, "masks": self.masks, "jsonl": self.jsonl}
        return {name: path for name, path in paths.items() if path not in (None, STANDARD_OUTPUT)}

    @property
    def files(self) -> list[Path]:
        """Those of the paths that are files."""
        return [path for name, path in self.paths.items() if name != "masks"]

    def are_there(self) -> bool:
        """Whether all of them exist, as they do after a run with ``whole`` that has finished the video."""
        return bool(self.paths) and all(path.exists() for path in self.paths.values())

    def refuse_existing(self) -> None:
        """Refuse to replace anything unless ``overwrite`` is set.

        Raises:
            FileExistsError: a file, or a folder that is not empty, is there.
        """
        for name, path in self.paths.items():
            if not self.overwrite and path.exists() and (path.is_file() or any(path.iterdir())):
                raise FileExistsError(
                    f"{name}: {path} exists; give another name, or --overwrite to replace what an earlier run wrote"
                )


@dataclass(frozen=True)
class Segmented:
    """What became of a video.

    Attributes:
        frames: how many were looked at.
        tracks: how many were shown in at least one of them.
        seconds: that it took.
    """

    frames: int
    tracks: int
    seconds: float

    def __str__(self) -> str:
        counts = (f"{n} {name}{'' if n == 1 else 's'}" for n, name in ((self.frames, "frame"), (self.tracks, "track")))
        rate = self.frames / max(self.seconds, 1e-3)
        return f"{', '.join(counts)}; {self.seconds:.1f} seconds, {rate:.1f} frames a second"


def refuse_same(paths: Mapping[str, str | Path | None]) -> None:
    """Refuse to write a file that is read, or two outputs under one name.

    Args:
        paths: inputs and outputs, by the names of the options.

    Raises:
        ValueError: two of them are the same file.
    """
    names: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        file = Path(str(path).removeprefix("file://")).resolve()
        if file in names:
            raise ValueError(f"{name}: found {path}, which is the {names[file]} too, expected another name")
        names[file] = name


def segment_video(
    video: OpenVideo,
    segmenter: VideoInstanceSegmenter,
    outputs: SegmentOutputs,
    *,
    start: int = 0,
    end: int | None = None,
    stride: int = 1,
    whole: bool = False,
    on_frame: Callable[[Frame, FrameInstances], None] | None = None,
    progress: bool = False,
) -> Segmented:
    """Segment a video and write its instances to all outputs.

    Files appear under their names when they are complete; earlier ones stay until then. If the video ends early (the
    source breaks off, an output cannot be written, Ctrl-C), the other outputs are completed with the frames seen until
    then, and the error is raised after that.

    Args:
        video: to segment.
        segmenter: to use; it is reset.
        outputs: to write.
        start: number of the first frame to look at, from 0.
        end: number of the frame before which to stop; None: at the video's end.
        stride: look at every ``stride``-th frame only.
        whole: write nothing if the video ends early; lines of JSON stay.
        on_frame: called with each frame and its instances before the next is segmented.
        progress: show a bar on standard error.

    Returns:
        How many frames and tracks there were, and how long it took.

    Raises:
        BrokenVideo: only a part of the video could be read; unless ``whole``, the outputs are complete for that part.
        ValueError: no frame could be read, or start, end or stride are out of range; nothing is written.
        OSError: an output cannot be written, or exists and is not to be replaced.
        BlockingIOError: another process is writing an output.
    """
    if start < 0 or stride < 1 or (end is not None and end <= start):
        raise ValueError(f"found start {start}, end {end}, stride {stride}; expected 0 <= start < end and stride >= 1")
    names = [category.name for category in segmenter.categories]
    waiting: deque[TimedFrame] = deque()  # at most a chunk of frames, whose instances are still to come

    def images() -> Iterator[Frame]:
        for frame in islice(video.frames, start, end, stride):
            waiting.append(frame)
            yield frame.image

    length = end if video.length is None else min(video.length, end or video.length)
    stopped: BaseException | None = None
    count, beginning, shown = 0, 0.0, set[int]()
    begun = time.monotonic()
    with ExitStack() as stack:

        def enter(writer: Writer) -> Writer:
            """Enter a writer so that it finishes its file after the first frame, even if another output fails."""
            writer.__enter__()
            stack.push(lambda *reason: writer.__exit__(*(reason if whole or count == 0 else (None, None, None))))
            return writer

        for path in outputs.paths.values():
            stack.enter_context(locking(path.absolute()))
        for path in outputs.files:
            remove_leftovers(path.parent, escape(path.name))
        outputs.refuse_existing()
        lines = results = film = masks = None
        if outputs.masks is not None:
            masks = enter(MasksWriter(outputs.masks, whole))
        if outputs.output is not None:
            from instanceformer.video.films import VideoWriter  # PyAV is needed for films only

            film = enter(VideoWriter(outputs.output, video.fps / stride))
        if outputs.results is not None:
            results = enter(TracksWriter(outputs.results, segmenter.categories, format=outputs.format))
        if outputs.jsonl is not None:
            lines = enter(JsonLinesWriter(outputs.jsonl, segmenter.categories))
        total = None if length is None else len(range(start, length, stride))
        hidden = not progress or sys.stderr is None
        bar = stack.enter_context(tqdm(total=total, unit="frame", disable=hidden, leave=not whole))
        try:
            for instances in segmenter.segment(images()):
                frame = waiting.popleft()
                beginning = beginning if count else frame.seconds
                number = start + count * stride
                if lines is not None:
                    lines.write(instances, number, frame.seconds)
                drawn = frame.image if film is None else draw_instances(frame.image, instances, names, boxes=True)
                if results is not None:
                    results.write(instances, number, frame.name)
                if film is not None:
                    film.write(drawn, frame.seconds - beginning)
                if masks is not None:
                    masks.write(number, instances)
                count += 1
                shown.update(instances.ids.tolist())
                bar.update()
                if on_frame is not None:
                    on_frame(frame.image, instances)
        except (Exception, KeyboardInterrupt) as reason:
            stopped = reason
        if count == 0:
            if stopped is not None and not isinstance(stopped, BrokenVideo):
                raise stopped
            raise ValueError(f"found no frame from frame {start} on" + (f"; {stopped}" if stopped else "")) from stopped
        if stopped is not None:
            if not whole and outputs.paths:
                stopped.add_note("what was seen until then is written")
            raise stopped
    return Segmented(count, len(shown), time.monotonic() - begun)
