"""Writes a video's instances as its frames arrive: a film, a results file, label images."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from instanceformer.data.annotations import Category
from instanceformer.evaluation.results import RLE, Track, encode_mask, write_results
from instanceformer.files import check_writable, locking, remove_leftovers, replacing
from instanceformer.inference.render import draw_instances, instance_color, largest_first
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.tracks import FrameInstances
from instanceformer.video.frames import BrokenVideo, Frame, OpenVideo, TimedFrame

PALETTE = [0, 0, 0] + [channel for number in range(1, 256) for channel in instance_color(number)]

Writer = TypeVar("Writer", bound=AbstractContextManager[object])


@dataclass(frozen=True)
class SegmentOutputs:
    """Where the instances of a video go; at least one path must be given.

    Attributes:
        output: film to write: the video with masks, boxes, ids, classes and scores drawn on it, without sound; its name
            ends in .mp4. Frames are shown at the same times as in the video.
        results: file to write: tracks in the challenge's format, of video 1, with an entry for each frame that was
            looked at. A track has the category and score of the last frame that shows it.
        masks: folder for a PNG of ids for each frame, named by the frame's number in the video, from 0.
        overwrite: replace the outputs of an earlier run once those of this run are complete.

    Raises:
        ValueError: no path is given, or one cannot be used.
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
        if self.masks is not None and self.masks.exists() and not _holds_only_masks(self.masks):
            raise ValueError(
                f"masks: {self.masks} is there already and not a folder of masks alone, expected a new or empty folder"
            )
        refuse_same(self.paths)

    @property
    def paths(self) -> dict[str, Path]:
        """The given paths, by the names of their options."""
        paths = {"output": self.output, "results": self.results, "masks": self.masks}
        return {name: path for name, path in paths.items() if path is not None}

    @property
    def files(self) -> list[Path]:
        """Those of the paths that are files."""
        return [path for path in (self.output, self.results) if path is not None]

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
    on_frame: Callable[[Frame, FrameInstances], None] | None = None,
    progress: bool = False,
) -> int:
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
        on_frame: called with each frame and its instances before the next is segmented.
        progress: show a bar on standard error.

    Returns:
        Number of frames looked at.

    Raises:
        BrokenVideo: only a part of the video could be read; the outputs are complete for that part.
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
    count, beginning = 0, 0.0
    with ExitStack() as stack:

        def enter(writer: Writer) -> Writer:
            """Enter a writer so that it finishes its file after the first frame, even if another output fails."""
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
            from instanceformer.video.films import VideoWriter  # PyAV is needed for films only

            film = enter(VideoWriter(outputs.output, video.fps / stride))
        if outputs.results is not None:
            results = enter(TracksWriter(outputs.results, segmenter.categories))
        total = None if length is None else len(range(start, length, stride))
        hidden = not progress or sys.stderr is None
        bar = stack.enter_context(tqdm(total=total, unit="frame", disable=hidden))
        try:
            for instances in segmenter.segment(images()):
                frame = waiting.popleft()
                beginning = beginning if count else frame.seconds
                drawn = frame.image if film is None else draw_instances(frame.image, instances, names, boxes=True)
                if results is not None:
                    results.write(instances)
                if film is not None:
                    film.write(drawn, frame.seconds - beginning)
                if masks is not None:
                    masks.write(start + count * stride, instances)
                count += 1
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
            stopped.add_note("what was seen until then is written")
            raise stopped
    return count


class TracksWriter:
    """Writes the tracks of one video in the challenge's format, see ``write_results``.

    A context manager. The file appears under its name when the block ends without an exception; after an exception
    nothing is left of it. Until then the masks are kept in a temporary database on disk, so that memory does not grow.

    Args:
        path: of the file.
        categories: in class order.
        video_id: of all tracks.
    """

    def __init__(self, path: str | Path, categories: Sequence[Category], video_id: int = 1) -> None:
        self.path, self.categories, self.video_id = Path(path), categories, video_id
        self.frames = 0

    def __enter__(self) -> Self:
        check_writable(self.path)
        self._database = sqlite3.connect("")  # a temporary file
        self._database.execute("PRAGMA journal_mode = MEMORY")
        self._database.execute("CREATE TABLE tracks (id INTEGER PRIMARY KEY, label INTEGER, score REAL)")
        self._database.execute(
            "CREATE TABLE masks (track INTEGER, frame INTEGER, height INTEGER, width INTEGER, counts TEXT, "
            "PRIMARY KEY (track, frame)) WITHOUT ROWID"
        )
        return self

    def write(self, instances: FrameInstances) -> None:
        """Append a frame; a track's category and score are those of the last frame that shows it."""
        tracks = list(zip(*(x.tolist() for x in (instances.ids, instances.labels, instances.scores)), strict=True))
        codes = [encode_mask(mask) for mask in instances.masks.numpy()]
        rows = [
            (track, self.frames, *code["size"], code["counts"])
            for (track, _, _), code in zip(tracks, codes, strict=True)
            if code is not None
        ]
        with self._keeping(), self._database:  # a whole frame or nothing, whatever interrupts
            self._database.executemany("INSERT OR REPLACE INTO tracks VALUES (?, ?, ?)", tracks)
            self._database.executemany("INSERT INTO masks VALUES (?, ?, ?, ?, ?)", rows)
            self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._keeping():
                    write_results(self.path, self._tracks())
        finally:
            self._database.close()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Turn an error of the database into one that names the results file."""
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(
                f"{self.path}: its masks cannot be kept until the end ({error}); make room where temporary files are "
                "kept, or set SQLITE_TMPDIR to a folder on another disk"
            ) from error

    def _tracks(self) -> Iterator[Track]:
        """All tracks, best first."""
        for track, label, score in self._database.execute(
            "SELECT id, label, score FROM tracks ORDER BY score DESC, id"
        ):
            segmentations: list[RLE | None] = [None] * self.frames
            masks = "SELECT frame, height, width, counts FROM masks WHERE track = ? ORDER BY frame"
            for frame, height, width, counts in self._database.execute(masks, (track,)):
                segmentations[frame] = RLE(size=[height, width], counts=counts)
            yield Track(self.video_id, self.categories[label].id, score, segmentations)


def _holds_only_masks(path: Path) -> bool:
    """Whether a path is a folder with no files but those that MasksWriter writes."""
    return path.is_dir() and all(re.fullmatch(r"\d{6,}\.png", entry.name) for entry in path.iterdir())


class MasksWriter:
    """Writes a folder of label images, see ``write_label_image``, each named by its frame's number.

    A context manager. In a new or empty folder the images appear as they are written, and stay after an exception.
    Images of an earlier run are replaced when the block ends without an exception.

    Args:
        folder: for the images, created with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._failed = False

    def __enter__(self) -> Self:
        self._replaces = self.folder.is_dir() and any(self.folder.iterdir())
        self._target = self._beside("new") if self._replaces else self.folder
        if self._replaces:
            for leftover in self.folder.parent.glob(f".{escape(self.folder.name)}.*.tmp"):  # of killed processes
                shutil.rmtree(leftover)
        check_writable(self._target / "0" if self._target.is_dir() else self._target)
        return self

    def _beside(self, kind: str) -> Path:
        return self.folder.with_name(f".{self.folder.name}.{os.getpid()}.{kind}.tmp")

    def write(self, number: int, instances: FrameInstances) -> None:
        """Write a frame's image."""
        self._failed = True  # until the image is complete
        self._target.mkdir(exist_ok=True)
        write_label_image(self._target / f"{number:06}.png", instances)
        self._failed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._replaces:
            return
        try:
            if kind is None and not self._failed:
                self.folder.rename(self._beside("old"))
                self._target.rename(self.folder)
                shutil.rmtree(self._beside("old"))
        finally:
            shutil.rmtree(self._target, ignore_errors=True)


def write_label_image(path: Path, instances: FrameInstances) -> None:
    """Write a PNG whose values are ids, 0 where there is no instance; small instances lie in front of large ones.

    The values have 8 bits and a palette of the colors in which instances are drawn, or 16 bits in gray if an id is
    above 255; ids above 65535 start again from 1. The file appears under its name only when it is complete.

    Args:
        path: of the file, in a folder that exists.
        instances: of a frame.
    """
    masks = instances.masks.numpy()
    labels = np.zeros(masks.shape[1:], dtype=np.uint16)
    for index in largest_first(masks):
        labels[masks[index]] = (int(instances.ids[index]) - 1) % 65535 + 1
    image = Image.fromarray(labels if labels.max() > 255 else labels.astype(np.uint8))
    if image.mode == "L":
        image.putpalette(PALETTE)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
