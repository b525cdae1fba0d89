"""Predicted tracks, the challenge's result file ``results.json``, and its parts while a run is in progress."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt

from instanceformer.data.formats.records import expect_file, whole_number
from instanceformer.data.formats.run_lengths import compress_masks, show
from instanceformer.files import replacing

RECORD = "run.json"
"""File in the folder of a run's parts that records what the run depends on."""


class RLE(TypedDict):
    """A mask as compressed, column-major run lengths in COCO's format.

    Attributes:
        size: [height, width] in pixels.
        counts: compressed run lengths, as text.
    """

    size: list[int]
    counts: str


@dataclass  # not frozen because Lightning's predict copies results field by field
class Track:
    """One predicted instance of one video.

    Attributes:
        video_id: the video's id in its annotation file.
        category_id: the category's id in the annotation file (not the network's class index).
        score: confidence; any finite number, since only the ranking matters.
        segmentations: a mask for each frame of the video, at the video's original size, or None where the instance is
            not visible.

    Raises:
        ValueError: the score is not finite.
    """

    video_id: int
    category_id: int
    score: float
    segmentations: list[RLE | None]

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ValueError(f"the score of a track of video {self.video_id} is {self.score}, expected a finite number")

    @property
    def counts(self) -> tuple[bytes | None, ...]:
        """The compressed run lengths of the mask in each frame, in the form pycocotools expects, or None."""
        return tuple(rle and rle["counts"].encode() for rle in self.segmentations)


def encode_mask(mask: npt.NDArray[np.bool_]) -> RLE | None:
    """Compress an (H, W) bool mask; None if it is empty."""
    if not mask.any():
        return None
    from pycocotools import mask as coco_mask

    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return RLE(size=[int(side) for side in code["size"]], counts=code["counts"].decode("ascii"))


def decode_mask(rle: RLE) -> npt.NDArray[np.bool_]:
    """Decompress a mask to (H, W) bool."""
    from pycocotools import mask as coco_mask

    return cast("npt.NDArray[np.bool_]", coco_mask.decode(rle).astype(bool))


def write_results(path: str | Path, tracks: Iterable[Track]) -> int:
    """Write the challenge's result file: a list of {video_id, category_id, score, segmentations}.

    The file appears under its name only once it is complete.

    Returns:
        The number of tracks.
    """
    count = 0
    with replacing(Path(path)) as temporary, temporary.open("w") as file:
        file.write("[")
        for track in tracks:
            file.write((",\n" if count else "") + json.dumps(vars(track)))
            count += 1
        file.write("]\n")
    return count


def zip_results(path: Path) -> Path:
    """Zip a result file as the challenge servers expect it: as ``results.json``, the only file in the archive.

    Identical files give identical archives.

    Returns:
        Path of the archive, which is next to the result file.
    """
    entry = ZipInfo("results.json")  # has a constant date
    entry.compress_type = ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    entry.file_size = path.stat().st_size  # files over 2 GiB need a different format
    with ZipFile(path.with_suffix(".zip"), "w") as archive, archive.open(entry, "w") as packed, path.open("rb") as file:
        shutil.copyfileobj(file, packed)
    return path.with_suffix(".zip")


def read_results(path: str | Path) -> list[Track]:
    """Read and check a result file, keeping its order, by which equal scores are ranked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, or a mask is damaged or differs in size from the first one of its track; the
            message names the file, the entry and the field.
    """
    tracks = []
    for index, track in enumerate(iterate_results(path)):
        first = next((rle for rle in track.segmentations if rle is not None), None)
        try:
            if first is not None:
                compress_masks(track.segmentations, *first["size"])  # rejects damaged counts and changes of size
        except ValueError as error:
            raise ValueError(f"{path}: entry {index}: {error}") from error
        tracks.append(track)
    return tracks


def iterate_results(path: str | Path) -> Iterator[Track]:
    """Read a result file track by track, so that only its text is held in memory. Masks are not decoded or checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a JSON list, or an entry is not a track (raised on reaching it); the message names
            the file, the entry and the field.
    """
    for index, entry in enumerate(_iterate_entries(path)):
        try:
            track = _parse_track(entry)
        except RecursionError as error:
            raise ValueError(f"{path}: entry {index}: found lists in lists without end, expected a track") from error
        except ValueError as error:
            raise ValueError(f"{path}: entry {index}: {error}") from error
        yield track


def _iterate_entries(path: str | Path) -> Iterator[Any]:
    """Yield the entries of the list in a JSON file."""
    expected = "expected a list of predicted tracks"
    expect_file(Path(path), "a results file, a JSON list of predicted tracks")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        begin = _skip_blanks(text, 0)
        is_list = text.startswith("[", begin)
        if is_list:
            yield from _iterate_list(text, begin)
        else:
            found = type(json.loads(text)).__name__
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); {expected}") from error
    if not is_list:
        raise ValueError(f"{path}: found a JSON {found}, {expected}")


def _iterate_list(text: str, begin: int) -> Iterator[Any]:
    """Parse, entry by entry, the JSON list that starts at position ``begin`` and must end with the text."""
    decoder = json.JSONDecoder()
    at = _skip_blanks(text, begin + 1)
    more = not text.startswith("]", at)
    while more:
        entry, at = decoder.raw_decode(text, at)
        yield entry
        at = _skip_blanks(text, at)
        more = text.startswith(",", at)
        if more:
            at = _skip_blanks(text, at + 1)
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if _skip_blanks(text, at + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


def _parse_track(entry: Any) -> Track:
    if not isinstance(entry, dict):
        raise ValueError(
            f"found {str(entry)[:80]}, expected an object with video_id, category_id, score, segmentations"
        )
    for field in ("video_id", "category_id", "score", "segmentations"):
        if field not in entry:
            raise ValueError(f"{field} is missing, found only {', '.join(entry) or 'an empty object'}")
    video_id, category_id = _id(entry, "video_id"), _id(entry, "category_id")
    for field, expected in {"score": (int, float), "segmentations": (list,)}.items():
        if not isinstance(entry[field], expected) or isinstance(entry[field], bool):
            raise ValueError(f"{field} is {show(entry[field])}, expected {' or '.join(t.__name__ for t in expected)}")
    if abs(entry["score"]) > sys.float_info.max:
        raise ValueError(f"score is {show(entry['score'])}, expected a finite number")
    for frame, segmentation in enumerate(entry["segmentations"]):
        if segmentation is not None and not _is_compressed(segmentation):
            raise ValueError(
                f"frame {frame} is {str(segmentation)[:80]}, expected null or compressed run lengths "
                '{"size": [height, width], "counts": "..."}'
            )
    return Track(video_id, category_id, entry["score"], entry["segmentations"])


def _id(entry: dict[str, Any], field: str) -> int:
    id_ = whole_number(entry[field])
    if id_ is None:
        raise ValueError(f"{field} is {show(entry[field])}, expected a whole number of at most 64 bits")
    return id_


def _is_compressed(segmentation: Any) -> bool:
    """Whether a segmentation has the form ``{"size": [int, int], "counts": str}``."""
    if type(segmentation) is not dict or type(segmentation.get("counts")) is not str:
        return False
    size = segmentation.get("size")
    return type(size) is list and len(size) == 2 and type(size[0]) is type(size[1]) is int


def metrics_path(results: Path) -> Path:
    """The file beside a result file that says what ``test`` measured, such as ``results.metrics.json``."""
    return results.with_suffix(".metrics.json")


class ResultParts:
    """Results of a run that may be interrupted: one file per finished video, merged once all videos are finished.

    The files are in a subfolder of ``results.parts``, next to the result file. The subfolder's name is a digest of
    ``run``, so that no run takes over or removes the parts of a different one. Several processes may share it if they
    share the file system.

    Args:
        path: path of the result file; ends in ``.json``.
        run: everything the tracks depend on, by name.
        video_ids: ids of the videos whose results are expected.
    """

    def __init__(self, path: Path, run: Mapping[str, object], video_ids: Iterable[int]) -> None:
        self.run = {name: str(value) for name, value in run.items()}
        self.video_ids = frozenset(video_ids)
        digest = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()[:16]
        self.path, self.folder = path, path.with_suffix(".parts") / digest

    def finished(self) -> frozenset[int]:
        """Ids of the videos that already have results."""
        return frozenset(int(part.stem.removeprefix("video_")) for part in self.folder.glob("video_*.json"))

    def start(self) -> str:
        """Create the folder, or remove incomplete files that an interrupted run left in it.

        Exactly one process must call this, before any process writes.

        Returns:
            Lines of text about existing parts of this run and about other runs; empty if there are none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (*self.folder.glob(".*.tmp"), self.folder / self.path.name, self._archive(self.folder)):
            left.unlink(missing_ok=True)
        with replacing(self.folder / RECORD) as temporary:
            temporary.write_text(json.dumps(self.run, indent=2))
        lines = []
        if finished := self.finished():
            lines.append(f"{len(finished)} of {len(self.video_ids)} videos taken over from {self.folder}")
        for record in sorted(self.folder.parent.glob(f"*/{RECORD}")):
            if record.parent != self.folder:
                unlike = ", ".join(self._unlike(record))
                lines.append(f"{record.parent}: an unfinished run that differs in {unlike}; left as it is")
        return "\n".join(lines)

    def write(self, video_id: int, tracks: Iterable[Track], others: Iterable[Track] = ()) -> None:
        """Store all tracks of a video, which is then finished. ``others`` are stored with them but never merged."""
        write_results(self._part(video_id, "others"), others)
        write_results(self._part(video_id), tracks)

    def read(self, video_id: int) -> list[Track]:
        """The tracks of a finished video."""
        return list(iterate_results(self._part(video_id)))

    def read_others(self, video_id: int) -> list[Track]:
        """The ``others`` stored with the tracks of a finished video."""
        return list(iterate_results(self._part(video_id, "others")))

    def merge(self, metrics: Mapping[str, object] | None = None) -> str:
        """Write the result file, ordered by video id, its zip archive and what was measured, and remove the folder.

        Args:
            metrics: content of ``metrics_path``; None removes what an earlier run left there.

        Returns:
            A message that says what was written.

        Raises:
            RuntimeError: the results of a video are missing; nothing is written or removed.
        """
        missing = sorted(self.video_ids - self.finished())
        if missing:
            raise RuntimeError(
                f"{self.folder}: found no results of {len(missing)} of {len(self.video_ids)} videos, ids "
                f"{', '.join(map(str, missing[:10]))}{', ...' if len(missing) > 10 else ''}; did another run use the "
                "folder? Start the same command again to compute them, or set --results.path to a name of its own"
            )
        merged = self.folder / self.path.name
        count = write_results(merged, (track for video_id in sorted(self.video_ids) for track in self.read(video_id)))
        archive = zip_results(merged)
        if metrics is None:
            metrics_path(self.path).unlink(missing_ok=True)
        else:
            with replacing(metrics_path(self.path)) as temporary:
                temporary.write_text(json.dumps(metrics, indent=1) + "\n")
        merged.replace(self.path)
        archive.replace(self._archive(self.path.parent))
        shutil.rmtree(self.folder)
        with suppress(OSError):  # not empty if another run has parts there
            self.folder.parent.rmdir()
        return f"{count} tracks of {len(self.video_ids)} videos written to {self.path} and {archive.name}"

    def _part(self, video_id: int, kind: str = "video") -> Path:
        return self.folder / f"{kind}_{video_id}.json"

    def _archive(self, folder: Path) -> Path:
        return folder / self.path.with_suffix(".zip").name

    def _unlike(self, record: Path) -> list[str]:
        """Names of the entries in which this run and another run's record differ."""
        try:
            theirs = json.loads(record.read_text())
            return sorted(name for name in self.run if self.run[name] != theirs.get(name))
        except (ValueError, AttributeError):
            return ["what cannot be read any more"]
