"""Predicted tracks, the challenge's result file, ``results.json``, and the parts of one that a run is still writing."""

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
"""In the folder of a run's parts, what the run depends on."""


class RLE(TypedDict):
    """A mask as COCO's compressed run lengths (column-major).

    Attributes:
        size: [height, width] in pixels.
        counts: the compressed run lengths, as text.
    """

    size: list[int]
    counts: str


@dataclass  # not frozen: Lightning's predict copies what it collects field by field
class Track:
    """One predicted instance of one video.

    Attributes:
        video_id: the video's id in its annotation file.
        category_id: the category's id in the annotation file (not the network's class index).
        score: confidence; any finite number; only the order counts.
        segmentations: one mask per frame of the video, at the video's original size; None where the instance is absent.

    Raises:
        ValueError: if the score is not finite.
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
        """The compressed run lengths of each frame's mask, as pycocotools takes them; None where there is none."""
        return tuple(rle and rle["counts"].encode() for rle in self.segmentations)


def encode_mask(mask: npt.NDArray[np.bool_]) -> RLE | None:
    """Compress an (H, W) bool mask; None if it is empty."""
    if not mask.any():
        return None
    from pycocotools import mask as coco_mask

    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return RLE(size=[int(side) for side in code["size"]], counts=code["counts"].decode("ascii"))


def decode_mask(rle: RLE) -> npt.NDArray[np.bool_]:
    """The (H, W) bool mask of a compressed one."""
    from pycocotools import mask as coco_mask

    return cast("npt.NDArray[np.bool_]", coco_mask.decode(rle).astype(bool))


def write_results(path: str | Path, tracks: Iterable[Track]) -> int:
    """Write the challenge's result file: a list of {video_id, category_id, score, segmentations}.

    The file appears under its name only when it is complete.

    Returns:
        Number of tracks.
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
    """Pack a result file as the challenge servers take it: alone in a zip, as ``results.json``.

    Equal files give equal zips.

    Returns:
        Path of the zip, beside the file.
    """
    entry = ZipInfo("results.json")  # its date is a constant
    entry.compress_type = ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    entry.file_size = path.stat().st_size  # beyond 2 GiB the format is another
    with ZipFile(path.with_suffix(".zip"), "w") as archive, archive.open(entry, "w") as packed, path.open("rb") as file:
        shutil.copyfileobj(file, packed)
    return path.with_suffix(".zip")


def read_results(path: str | Path) -> list[Track]:
    """Read a result file, keeping its order (equal scores are ranked by it).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a result file, or if a mask is damaged or differs in size from the first of its track;
            the message names the file, the entry and the field.
    """
    tracks = []
    for index, track in enumerate(iterate_results(path)):
        first = next((rle for rle in track.segmentations if rle is not None), None)
        try:
            if first is not None:
                compress_masks(track.segmentations, *first["size"])  # refuses damaged counts and a change of size
        except ValueError as error:
            raise ValueError(f"{path}: entry {index}: {error}") from error
        tracks.append(track)
    return tracks


def iterate_results(path: str | Path) -> Iterator[Track]:
    """Read a result file track by track, so that only its text is in memory; masks are not decoded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: at the entry that is no track; the message names the file, the entry and the field.
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
    """The entries of the list in a JSON file."""
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
    """Parse the JSON list from position ``begin`` to the end of a text, entry by entry."""
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
    """Whether it is ``{"size": [int, int], "counts": str}``."""
    if type(segmentation) is not dict or type(segmentation.get("counts")) is not str:
        return False
    size = segmentation.get("size")
    return type(size) is list and len(size) == 2 and type(size[0]) is type(size[1]) is int


class ResultParts:
    """The results of a run that may be killed: a file for each finished video, merged into one when all are there.

    The files of a run are in a folder in ``results.parts``, beside the result file, which a digest of ``run`` names, so
    that no run takes over or removes the parts of a different one. Processes that share the file system may share it.

    Args:
        path: of the result file, which ends in ``.json``.
        run: by name all that the tracks depend on.
        video_ids: of the videos whose results are expected.
    """

    def __init__(self, path: Path, run: Mapping[str, object], video_ids: Iterable[int]) -> None:
        self.run = {name: str(value) for name, value in run.items()}
        self.video_ids = frozenset(video_ids)
        digest = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()[:16]
        self.path, self.folder = path, path.with_suffix(".parts") / digest

    def finished(self) -> frozenset[int]:
        """Ids of the videos whose parts are there."""
        return frozenset(int(part.stem.removeprefix("video_")) for part in self.folder.glob("video_*.json"))

    def start(self) -> str:
        """Make the folder, or clear it of what a killed run left unfinished; by one process before any writes.

        Returns:
            Lines about the parts that are there, of this and of other runs; empty without any.
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
        """Keep all tracks of a video, so that it is finished; ``others`` are kept with them and not merged."""
        write_results(self._part(video_id, "others"), others)
        write_results(self._part(video_id), tracks)

    def read(self, video_id: int) -> list[Track]:
        """The tracks of a finished video."""
        return list(iterate_results(self._part(video_id)))

    def read_others(self, video_id: int) -> list[Track]:
        """What was kept with the tracks of a finished video."""
        return list(iterate_results(self._part(video_id, "others")))

    def merge(self) -> str:
        """Write the result file and its zip, by ascending video id, and remove the folder.

        Returns:
            How much was written, in words.

        Raises:
            RuntimeError: the part of a video is missing; nothing is written or removed.
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
        merged.replace(self.path)
        archive.replace(self._archive(self.path.parent))
        shutil.rmtree(self.folder)
        with suppress(OSError):  # another run's parts may be there
            self.folder.parent.rmdir()
        return f"{count} tracks of {len(self.video_ids)} videos written to {self.path} and {archive.name}"

    def _part(self, video_id: int, kind: str = "video") -> Path:
        return self.folder / f"{kind}_{video_id}.json"

    def _archive(self, folder: Path) -> Path:
        return folder / self.path.with_suffix(".zip").name

    def _unlike(self, record: Path) -> list[str]:
        """Names of what differs between this run and another's record."""
        try:
            theirs = json.loads(record.read_text())
            return sorted(name for name in self.run if self.run[name] != theirs.get(name))
        except (ValueError, AttributeError):
            return ["what cannot be read any more"]
