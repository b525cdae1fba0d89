"""Reading and checking the fields of annotation files, which are JSON lists of objects."""

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
"""Maximum number of pixels in a frame; a mask's longest run must fit into pycocotools' compressed counts."""

BATCH = 64
"""Number of annotations whose masks are decoded together."""

ID_BITS = 63
"""Maximum bits of an id, without the sign: ids become NumPy integers and parts of file names."""

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
    """A problem with one object in an annotation file. The object is left out, or only its stray polygons are.

    Attributes:
        kind: kind of problem.
        location: JSON path, such as ``annotations[3].segmentations[1].counts``.
        message: what was expected and what was found.
    """

    kind: ProblemKind
    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


class AnnotationError(ValueError):
    """A problem with one object; ``Records.tolerate`` collects it or raises it as a ValueError."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def expect_file(path: Path, what: str) -> None:
    """Check that a path is a file.

    Args:
        path: the path.
        what: what was expected there, for the message.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {found}; expected {what}")


def load_json(path: Path) -> object:
    """Parse a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON; the message names the file.
    """
    expect_file(path, "a JSON file")
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        del data  # hundreds of megabytes for a large file; one copy is enough
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); is the file complete?") from error
    return content


class Records:
    """Reads and checks the fields of a file's objects. ``location`` is an object's JSON path, such as ``videos[3]``.

    Methods that read a field raise AnnotationError if it is missing or invalid; call them within ``tolerate``. Polygons
    with fewer than three points are removed from masks that have others; ``warn_of_fragments`` reports them.

    Args:
        name: name of the file, for messages.
        problems: list that collects the problems of single objects, which are then left out; None: the first problem is
            raised.
    """

    def __init__(self, name: str, problems: list[Problem] | None = None) -> None:
        self.name, self.problems = name, problems
        self._ids: dict[str, dict[int, str]] = {}  # location of each id, by list in the file
        self._fragments: list[str] = []  # locations of masks from which polygons were removed

    @contextmanager
    def tolerate(self) -> Iterator[None]:
        """Collect a problem with the object read in this context, or raise it as a ValueError that names the file."""
        try:
            yield
        except AnnotationError as error:
            if self.problems is None:
                raise ValueError(f"{self.name}: {error}") from error
            self.problems.append(error.problem)

    def objects(self, root: object, key: str, optional: bool = False) -> list[tuple[str, dict[str, Any]]]:
        """The objects in one of the file's lists, each with its location.

        Args:
            root: content of the file.
            key: key of the list.
            optional: allow the list to be missing, null or empty.

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
        """Read the categories, in ascending order of id."""
        categories = []
        for location, record in self.objects(root, "categories"):
            with self.tolerate():
                name = self.text(record, "name", location)
                categories.append(Category(self.new_id(record, location), name))
        return tuple(sorted(categories, key=lambda category: category.id))

    def new_id(self, record: dict[str, Any], location: str) -> int:
        """Read and register an object's id, unique in its list. Call it last, once the rest is known to be valid."""
        id_ = self.integer(record, "id", location)
        locations = self._ids.setdefault(location.partition("[")[0], {})
        if id_ in locations:
            self.fail(f"{location}.id", "an id of its own", f"{id_}, the id of {locations[id_]} too", "duplicate id")
        locations[id_] = location
        return id_

    def known_id(self, record: dict[str, Any], key: str, location: str, kind: str) -> int:
        """Read a reference to an object in the list ``kind``, whose id ``new_id`` has registered."""
        id_ = self.integer(record, key, location)
        if id_ not in self._ids.get(kind, {}):
            self.fail(f"{location}.{key}", f"the id of one of the file's {kind}", str(id_), "unknown id")
        return id_

    def location_of(self, kind: str, id_: int) -> str:
        """Location of the object with this id in the list ``kind``."""
        return self._ids[kind][id_]

    def size(self, record: dict[str, Any], location: str) -> tuple[int, int]:
        """Read height and width, in pixels."""
        height, width = self.integer(record, "height", location), self.integer(record, "width", location)
        if height <= 0 or width <= 0 or height * width > MAX_PIXELS:
            found = f"height {height} and width {width}"
            self.fail(location, f"positive sizes in pixels, {MAX_PIXELS} pixels at most", found)
        return height, width

    def masks(self, track: list[bytes | None] | MaskError, location: str) -> tuple[bytes | None, ...]:
        """The masks of a track, given its entry in the result of ``compress_tracks``; a MaskError becomes a problem."""
        if isinstance(track, MaskError):
            kind: ProblemKind = "mask of wrong size" if isinstance(track, MaskSizeError) else "damaged mask"
            raise AnnotationError(Problem(kind, f"{location}.{track.location}", track.message))
        return tuple(track)

    def whole(self, segmentation: object, location: str) -> object:
        """A mask as it is in the file, without stray polygons of fewer than three points."""
        whole = without_fragments(segmentation)
        if whole is not segmentation:
            self._fragments.append(location)
        return whole

    def warn_of_fragments(self) -> None:
        """Report the polygons that were removed, as problems or in a single warning."""
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
        """Read the mask of a COCO annotation; see ``whole``."""
        return self.whole(record.get("segmentation"), f"{location}.segmentation")

    def mask(self, track: list[bytes | None] | MaskError, location: str) -> bytes | None:
        """The mask of a COCO annotation, given its entry in the result of ``compress_tracks``."""
        if isinstance(track, MaskError):
            track.location = track.location.replace("segmentations[0]", "segmentation")
        return self.masks(track, location)[0]

    def integer(self, record: dict[str, Any], key: str, location: str) -> int:
        """Read a whole number of at most 64 bits, which may be written as a float."""
        value = whole_number(record.get(key))
        if value is None:
            self.fail(f"{location}.{key}", "a whole number of at most 64 bits", show(record.get(key)))
        return value

    def text(self, record: dict[str, Any], key: str, location: str) -> str:
        """Read a string."""
        value = record.get(key)
        if not isinstance(value, str):
            self.fail(f"{location}.{key}", "a string", show(value))
        return value

    def flag(self, record: dict[str, Any], key: str, location: str) -> bool:
        """Read 0, 1 or a boolean; false if missing."""
        value = record.get(key, 0)
        if value not in (0, 1):
            self.fail(f"{location}.{key}", "0 or 1", show(value))
        return bool(value)

    def per_frame(self, record: dict[str, Any], key: str, location: str, length: int) -> list[Any] | None:
        """Read a list with one entry for each of ``length`` frames; None if missing or null."""
        values = record.get(key)
        if values is None:
            return None
        if not isinstance(values, list):
            self.fail(f"{location}.{key}", "a list with one entry for each frame", show(values))
        if len(values) != length:
            self.fail(f"{location}.{key}", f"{length} entries, one for each of the video's frames", f"{len(values)}")
        return values

    def fail(self, location: str, expected: str, found: str, kind: ProblemKind = "malformed") -> NoReturn:
        """Raise a problem as an AnnotationError."""
        raise AnnotationError(Problem(kind, location, f"expected {expected}, found {found}"))


def whole_number(value: object) -> int | None:
    """A JSON value as an integer; None if it is not a whole number or does not fit into 64 bits."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**ID_BITS) <= value < 2**ID_BITS:
        return None
    return value


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def with_unique_ids(videos: Sequence[Video]) -> tuple[Video, ...]:
    """Make instance ids unique within the dataset; in many formats, numbering starts over in each video.

    If no two videos share an id, ids are kept. Otherwise each id is prefixed with the id of its video: if the largest
    instance id is 12, instance 3 of video 7 becomes 703. If such ids would exceed ID_BITS, instances are numbered from
    1 instead.

    Args:
        videos: videos whose instance ids are non-negative and unique within the video.
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
