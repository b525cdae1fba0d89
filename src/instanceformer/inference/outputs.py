"""Identities written as the frames come: a result file, label images."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from instanceformer.data.annotations import Category
from instanceformer.evaluation.results import RLE, Track, encode_mask, write_results
from instanceformer.files import check_writable, replacing
from instanceformer.inference.instances import FrameInstances
from instanceformer.inference.render import instance_color

PALETTE = [0, 0, 0] + [channel for number in range(1, 256) for channel in instance_color(number)]


class ResultsWriter:
    """Writes the tracks of one video in the challenge's format, see ``write_results``.

    A context manager. The file appears under its name when the block ends without an exception; after an exception
    nothing is left of it. Until then the masks wait in a temporary database on disk, so that memory does not grow; at
    the end one track at a time is in memory.

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
        self._database = sqlite3.connect("")  # a temporary file that nobody else sees
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
        with self._keeping(), self._database:  # all of a frame or nothing, whatever interrupts
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
        """The database's errors as one that says whose they are."""
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


def is_masks_folder(path: Path) -> bool:
    """Whether there is a folder that holds nothing but what MasksWriter writes."""
    return path.is_dir() and all(re.fullmatch(r"\d{6,}\.png", entry.name) for entry in path.iterdir())


class MasksWriter:
    """Writes a folder of label images, see ``write_label_image``, each named by its frame's number.

    A context manager. In a new or empty folder the images appear as they are written, and stay whatever happens. Those
    of an earlier run stay until the block ends; then, if it ends without an exception, the new ones take their place.

    Args:
        folder: for the images, made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._failed = False

    def __enter__(self) -> Self:
        self._replaces = self.folder.is_dir() and any(self.folder.iterdir())
        self._place = self._beside("new") if self._replaces else self.folder
        if self._replaces:
            for leftover in self.folder.parent.glob(f".{escape(self.folder.name)}.*.tmp"):  # of killed processes
                shutil.rmtree(leftover)
        check_writable(self._place / "0" if self._place.is_dir() else self._place)
        return self

    def _beside(self, what: str) -> Path:
        return self.folder.with_name(f".{self.folder.name}.{os.getpid()}.{what}.tmp")

    def write(self, number: int, instances: FrameInstances) -> None:
        """Write a frame's image."""
        self._failed = True  # until it is there
        self._place.mkdir(exist_ok=True)
        write_label_image(self._place / f"{number:06}.png", instances)
        self._failed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._replaces:
            return
        try:
            if kind is None and not self._failed:
                self.folder.rename(self._beside("old"))
                self._place.rename(self.folder)
                shutil.rmtree(self._beside("old"))
        finally:
            shutil.rmtree(self._place, ignore_errors=True)


def write_label_image(path: Path, instances: FrameInstances) -> None:
    """Write a PNG whose values are ids, 0 where there is no instance; small instances lie in front of large ones.

    The values are 8 bits with a palette of the colours in which instances are drawn, or 16 bits in grey where an id is
    above 255; ids above 65535 start again from 1. The file appears under its name only when it is complete.

    Args:
        path: of the file, in a folder that exists.
        instances: of a frame.
    """
    masks = instances.masks.numpy()
    labels = np.zeros(masks.shape[1:], dtype=np.uint16)
    for index in np.argsort(-np.count_nonzero(masks, axis=(1, 2)), kind="stable"):
        labels[masks[index]] = (int(instances.ids[index]) - 1) % 65535 + 1
    image = Image.fromarray(labels if labels.max() > 255 else labels.astype(np.uint8))
    if image.mode == "L":
        image.putpalette(PALETTE)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
