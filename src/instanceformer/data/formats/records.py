"""Reading and checking the fields of annotation files: JSON lists of objects."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard

from instanceformer.data.annotations import Category, Video
from instanceformer.data.formats.run_lengths import MaskError, MaskSizeError, show, without_fragments

MAX_PIXELS = 2**29 - 1
"""Most pixels of a frame: a run of a mask must fit into pycocotools' compressed counts."""

BATCH = 64
"""Annotations whose masks are decoded at once."""

ID_BITS = 63
"""Bits of an id without its sign: ids become integers of NumPy, and parts of file names."""

ProblemKind = Literal[
    "malformed",
    "unknown id",
    "duplicate id",
    "mask of wrong size",
    "damaged mask",
    "polygon of fewer than three points",
]


@dataclass(frozen=True)
class Problem:
    """A fault of one object of an annotation file, which is then left out.

    Attributes:
        kind: category of the fault.
        location: JSON path, such as ``annotations[3].segmentations[1].counts``.
        message: what was expected and what was found.
    """

    kind: ProblemKind
    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


class AnnotationError(ValueError):
    """A problem with one object, which ``Records.tolerate`` raises or collects."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def expect_file(path: Path, what: str) -> None:
    """Refuse a path without a file.

    Raises:
        FileNotFoundError: there is none; the message names the path, and what was expected.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {found}; expected {what}")


def load_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message names the file.
    """
    expect_file(path, "a JSON file")
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        del data  # of the hundreds of megabytes of a large file, one copy is enough
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); is the file complete?") from error
    return content


class Records:
    """Reads and checks the fields of one file's objects; ``location`` is an object's JSON path, such as ``videos[3]``.

    Polygons of fewer than three points are left out of masks that have others; ``warn_of_fragments`` reports them.

    Args:
        name: of the file, for messages.
        problems: takes the problems of single objects, which are then left out; None: the first is raised.
    """

    def __init__(self, name: str, problems: list[Problem] | None = None) -> None:
        self.name, self.problems = name, problems
        self._ids: dict[str, dict[int, str]] = {}  # by list of the file the location of each id
        self._fragments: list[str] = []  # locations of masks with polygons that are left out

    @contextmanager
    def tolerate(self) -> Iterator[None]:
        """Collect a problem of the object that is read inside, or raise it as a ValueError that names the file."""
        try:
            yield
        except AnnotationError as error:
            if self.problems is None:
                raise ValueError(f"{self.name}: {error}") from error
            self.problems.append(error.problem)

    def objects(self, root: object, key: str, optional: bool = False) -> list[tuple[str, dict[str, Any]]]:
        """The objects of one of the file's lists, each with its location.

        Args:
            root: the file's content.
            key: of the list.
            optional: the list may be missing, null or empty.

        Raises:
            ValueError: there is no such list of objects; the message names the file.
        """
        if not isinstance(root, dict):
            raise ValueError(
                f"{self.name}: expected an object with categories, videos and annotations, found {show(root)} (is it a "
                "result file?)"
            )
        entries = root.get(key)
        if optional and entries in (None, []):
            return []
        if not isinstance(entries, list) or not entries:
            raise ValueError(
                f"{self.name}: {key}: expected a list of objects with at least one entry, found {show(entries)}"
            )
        records = []
        for index, record in enumerate(entries):
            with self.tolerate():
                if not isinstance(record, dict):
                    self.fail(f"{key}[{index}]", "an object", show(record))
                records.append((f"{key}[{index}]", record))
        return records

    def categories(self, root: object) -> tuple[Category, ...]:
        """The categories in ascending order of id."""
        categories = []
        for location, record in self.objects(root, "categories"):
            with self.tolerate():
                name = self.text(record, "name", location)
                categories.append(Category(self.new_id(record, location), name))
        return tuple(sorted(categories, key=lambda category: category.id))

    def new_id(self, record: dict[str, Any], location: str) -> int:
        """The object's id, which no other object of its list has. Read it last: other objects may refer to it."""
        id_ = self.integer(record, "id", location)
        locations = self._ids.setdefault(location.partition("[")[0], {})
        if id_ in locations:
            self.fail(f"{location}.id", "an id of its own", f"{id_}, the id of {locations[id_]} too", "duplicate id")
        locations[id_] = location
        return id_

    def known_id(self, record: dict[str, Any], key: str, location: str, kind: str) -> int:
        """An id that ``new_id`` has read before in the file's list ``kind``."""
        id_ = self.integer(record, key, location)
        if id_ not in self._ids.get(kind, {}):
            self.fail(f"{location}.{key}", f"the id of one of the file's {kind}", str(id_), "unknown id")
        return id_

    def location_of(self, kind: str, id_: int) -> str:
        """Location of the object of the list ``kind`` that has this id."""
        return self._ids[kind][id_]

    def size(self, record: dict[str, Any], location: str) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.integer(record, "height", location), self.integer(record, "width", location)
        if height <= 0 or width <= 0 or height * width > MAX_PIXELS:
            found = f"height {height} and width {width}"
            self.fail(location, f"positive sizes in pixels, {MAX_PIXELS} pixels at most", found)
        return height, width

    def masks(self, track: list[bytes | None] | MaskError, location: str) -> tuple[bytes | None, ...]:
        """The masks of a track, from the result of ``compress_tracks``."""
        if isinstance(track, MaskError):
            kind: ProblemKind = "mask of wrong size" if isinstance(track, MaskSizeError) else "damaged mask"
            raise AnnotationError(Problem(kind, f"{location}.{track.location}", track.message))
        return tuple(track)

    def whole(self, segmentation: object, location: str) -> object:
        """A mask as the file has it, without polygons of fewer than three points."""
        whole = without_fragments(segmentation)
        if whole is not segmentation:
            self._fragments.append(location)
        return whole

    def warn_of_fragments(self) -> None:
        """Report the polygons that were left out, as problems or in one warning."""
        if self.problems is not None:
            message = "expected three points or more, found fewer; left out, the mask has other polygons"
            self.problems += [
                Problem("polygon of fewer than three points", location, message) for location in self._fragments
            ]
        elif self._fragments:
            warnings.warn(
                f"{self.name}: {self._fragments[0]}: expected polygons of three points or more, found one with fewer; "
                f"such polygons are left out of {len(self._fragments)} mask(s), which have others",
                stacklevel=2,
            )

    def segmentation(self, record: dict[str, Any], location: str) -> object:
        """The mask of a COCO annotation, see ``whole``."""
        return self.whole(record.get("segmentation"), f"{location}.segmentation")

    def mask(self, track: list[bytes | None] | MaskError, location: str) -> bytes | None:
        """That mask, from the result of ``compress_tracks``."""
        if isinstance(track, MaskError):
            track.location = track.location.replace("segmentations[0]", "segmentation")
        return self.masks(track, location)[0]

    def integer(self, record: dict[str, Any], key: str, location: str) -> int:
        """A whole number of at most 64 bits, which may be written as a float."""
        value = whole_number(record.get(key))
        if value is None:
            self.fail(f"{location}.{key}", "a whole number of at most 64 bits", show(record.get(key)))
        return value

    def text(self, record: dict[str, Any], key: str, location: str) -> str:
        """A string."""
        value = record.get(key)
        if not isinstance(value, str):
            self.fail(f"{location}.{key}", "a string", show(value))
        return value

    def flag(self, record: dict[str, Any], key: str, location: str) -> bool:
        """0 or 1, or a boolean; false if it is missing."""
        value = record.get(key, 0)
        if value not in (0, 1):
            self.fail(f"{location}.{key}", "0 or 1", show(value))
        return bool(value)

    def per_frame(self, record: dict[str, Any], key: str, location: str, length: int) -> list[Any] | None:
        """A list with one entry for each of ``length`` frames; None if the field is missing."""
        values = record.get(key)
        if values is None:
            return None
        if not isinstance(values, list):
            self.fail(f"{location}.{key}", "a list with one entry for each frame", show(values))
        if len(values) != length:
            self.fail(f"{location}.{key}", f"{length} entries, one for each of the video's frames", f"{len(values)}")
        return values

    def fail(self, location: str, expected: str, found: str, kind: ProblemKind = "malformed") -> NoReturn:
        """Report a problem."""
        raise AnnotationError(Problem(kind, location, f"expected {expected}, found {found}"))


def whole_number(value: object) -> int | None:
    """A JSON value as an integer; None if it is no whole number or needs more than 64 bits."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**ID_BITS) <= value < 2**ID_BITS:
        return None
    return value


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can be
        return False


def with_unique_ids(videos: Sequence[Video]) -> tuple[Video, ...]:
    """Make ids of instances unique in the dataset; many formats count them from the beginning in each video.

    Ids stay if no two videos share one. Otherwise the id of the video is put before each: with 12 the largest, instance
    3 of video 7 becomes 703. If such ids would exceed ID_BITS, instances are numbered from 1.

    Args:
        videos: with ids of instances that are not negative and unique in their video.
    """
    ids = [instance.id for video in videos for instance in video.instances]
    if len(set(ids)) == len(ids):
        return tuple(videos)
    base = 10 ** len(str(max(ids)))
    fits = all(abs(video.id) * base + max(ids) < 2**ID_BITS for video in videos)
    numbers = count(1)
    return tuple(
        replace(
            video,
            instances=tuple(
                replace(each, id=video.id * base + each.id if fits else next(numbers)) for each in video.instances
            ),
        )
        for video in videos
    )
