"""Results of one video, written frame by frame: files of tracks in three formats, and lines of JSON."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO

import numpy as np

from instanceformer.data.annotations import Category
from instanceformer.evaluation.results import RLE, Track, decode_mask, encode_mask, write_results
from instanceformer.files import check_writable, replacing
from instanceformer.inference.render import largest_first
from instanceformer.inference.tracks import FrameInstances

ResultsFormat = Literal["youtube_vis", "mots", "coco_vid"]
STANDARD_OUTPUT = Path("-")


class TracksWriter:
    """Writes the tracks of one video to a file in one of three formats.

    - ``youtube_vis``: the challenge's, see ``write_results``, with an entry for each frame that was written.
    - ``mots``: the text of the MOTS challenge, a line ``frame id category_id height width counts`` for each mask. The
      id is category_id * 1000 + track; 10000 and so on if a track has more than three digits. Masks do not overlap:
      small instances lie in front of large ones.
    - ``coco_vid``: COCO's JSON with ``videos``, ``images``, which are frames, and an annotation for each mask, with
      ``instance_id`` and ``attributes.track_id``, which CVAT reads, and ``score``.

    A track has the category and score of the last frame that shows it.

    A context manager. The file appears under its name when the block ends without an exception; after an exception
    nothing is left of it. Until then the masks are kept in a temporary database on disk, so that memory does not grow.

    Args:
        path: of the file.
        categories: in class order.
        video_id: of all tracks.
        format: of the file.
    """

    def __init__(
        self,
        path: str | Path,
        categories: Sequence[Category],
        video_id: int = 1,
        format: ResultsFormat = "youtube_vis",
    ) -> None:
        self.path, self.categories, self.video_id, self.format = Path(path), categories, video_id, format
        self.frames = 0

    def __enter__(self) -> Self:
        check_writable(self.path)
        self._database = sqlite3.connect("")  # a temporary file
        self._database.execute("PRAGMA journal_mode = MEMORY")
        self._database.execute(
            "CREATE TABLE frames (frame INTEGER PRIMARY KEY, number INTEGER, name TEXT, height INTEGER, width INTEGER)"
        )
        self._database.execute("CREATE TABLE tracks (id INTEGER PRIMARY KEY, label INTEGER, score REAL)")
        self._database.execute(
            "CREATE TABLE masks (track INTEGER, frame INTEGER, height INTEGER, width INTEGER, counts TEXT, "
            "PRIMARY KEY (track, frame)) WITHOUT ROWID"
        )
        return self

    def write(self, instances: FrameInstances, number: int | None = None, name: str = "") -> None:
        """Append a frame; a track's category and score are those of the last frame that shows it.

        Args:
            instances: of the frame.
            number: of the frame in its video, from 0; None: how many were written before.
            name: of the frame's image; empty: made of the number as CVAT names the frames of films.
        """
        number = self.frames if number is None else number
        frame = (self.frames, number, name or f"frame_{number:06}.png", *instances.masks.shape[1:])
        tracks = list(zip(*(x.tolist() for x in (instances.ids, instances.labels, instances.scores)), strict=True))
        codes = [encode_mask(mask) for mask in instances.masks.numpy()]
        rows = [
            (track, self.frames, *code["size"], code["counts"])
            for (track, _, _), code in zip(tracks, codes, strict=True)
            if code is not None
        ]
        with self._keeping(), self._database:  # a whole frame or nothing, whatever interrupts
            self._database.execute("INSERT INTO frames VALUES (?, ?, ?, ?, ?)", frame)
            self._database.executemany("INSERT OR REPLACE INTO tracks VALUES (?, ?, ?)", tracks)
            self._database.executemany("INSERT INTO masks VALUES (?, ?, ?, ?, ?)", rows)
            self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._keeping():
                    if self.format == "youtube_vis":
                        write_results(self.path, self._tracks())
                    else:
                        lines = self._mots() if self.format == "mots" else self._coco_vid()
                        with replacing(self.path) as temporary, temporary.open("w") as file:
                            file.writelines(lines)
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

    def _mots(self) -> Iterator[str]:
        """The lines of a file in the MOTS challenge's text format."""
        (last,) = self._database.execute("SELECT max(id) FROM tracks").fetchone()
        scale = 10 ** max(3, len(str(last)))
        rows = self._database.execute(
            "SELECT number, id, label, masks.height, masks.width, counts FROM masks JOIN frames USING (frame) "
            "JOIN tracks ON track = id ORDER BY number, id"
        )
        for number, group in groupby(rows, key=lambda row: row[0]):
            objects = list(group)
            masks = np.stack([decode_mask(RLE(size=[h, w], counts=counts)) for *_, h, w, counts in objects])
            owner = np.full(masks.shape[1:], -1)
            for index in largest_first(masks):
                owner[masks[index]] = index
            for index, (_, track, label, height, width, _) in enumerate(objects):
                category = self.categories[label].id
                if code := encode_mask(owner == index):
                    yield f"{number} {category * scale + track} {category} {height} {width} {code['counts']}\n"

    def _coco_vid(self) -> Iterator[str]:
        """The text of a JSON file, piece by piece."""
        from pycocotools import mask as mask_utils  # here: only this format needs it

        head = {
            "categories": [vars(category) for category in self.categories],
            "videos": [{"id": self.video_id, "name": self.path.stem}],
        }
        yield json.dumps(head)[:-1] + ',\n"images": ['
        for frame, number, name, height, width in self._database.execute("SELECT * FROM frames ORDER BY frame"):
            image = {"id": frame + 1, "video_id": self.video_id, "frame_id": number, "file_name": name}
            yield (",\n" if frame else "\n") + json.dumps({**image, "height": height, "width": width})
        yield '],\n"annotations": ['
        rows = self._database.execute(
            "SELECT frame, track, label, score, height, width, counts FROM masks JOIN tracks ON track = id "
            "ORDER BY frame, track"
        )
        for place, (frame, track, label, score, height, width, counts) in enumerate(rows):
            code = RLE(size=[height, width], counts=counts)
            annotation = {
                "id": place + 1,
                "image_id": frame + 1,
                "video_id": self.video_id,
                "category_id": self.categories[label].id,
                "instance_id": track,
                "attributes": {"track_id": track},
                "score": score,
                "bbox": mask_utils.toBbox(code).tolist(),
                "area": int(mask_utils.area(code)),
                "iscrowd": 0,
                "segmentation": code,
            }
            yield (",\n" if place else "\n") + json.dumps(annotation)
        yield "]}\n"


class JsonLinesWriter:
    """Writes a line of JSON for each frame as soon as it is there, for programs that listen; see ``json_line``.

    A context manager, which leaves what was written.

    Args:
        path: of a new file, opened with the first frame, or ``-`` for the standard output.
        categories: in class order.
    """

    def __init__(self, path: Path, categories: Sequence[Category]) -> None:
        self.path, self.categories = path, categories
        self._file: TextIO | None = sys.stdout if path == STANDARD_OUTPUT else None

    def __enter__(self) -> Self:
        if self._file is None:
            check_writable(self.path)
        return self

    def write(self, instances: FrameInstances, number: int, seconds: float) -> None:
        """Write the line of a frame and flush it."""
        if self._file is None:
            self._file = self.path.open("w")
        print(json_line(instances, self.categories, number, seconds), file=self._file, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._file not in (None, sys.stdout):
            self._file.close()


def json_line(instances: FrameInstances, categories: Sequence[Category], number: int, seconds: float) -> str:
    """A frame as one line of JSON.

    Args:
        instances: of the frame.
        categories: in class order.
        number: of the frame in its video, from 0.
        seconds: since the video's first frame.

    Returns:
        An object with ``frame``, ``seconds``, ``height`` and ``width`` in pixels, ``hidden``, the ids of live tracks
        that are not visible, and ``instances``, each with ``id``, ``category_id``, ``name``, ``score`` in [0, 1],
        ``box`` [x1, y1, x2, y2] in pixels, and ``segmentation``, COCO's compressed run lengths, as pycocotools reads
        them.
    """
    height, width = instances.masks.shape[1:]
    objects = [
        {
            "id": int(instances.ids[i]),
            "category_id": categories[int(instances.labels[i])].id,
            "name": categories[int(instances.labels[i])].name,
            "score": round(float(instances.scores[i]), 4),
            "box": [round(x, 1) for x in instances.boxes[i].tolist()],
            "segmentation": encode_mask(instances.masks[i].numpy()),
        }
        for i in range(len(instances))
    ]
    frame = {"frame": number, "seconds": round(seconds, 3), "height": height, "width": width}
    return json.dumps({**frame, "instances": objects, "hidden": instances.hidden.tolist()})
