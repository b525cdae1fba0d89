"""Predicted tracks and the challenge's result file, ``results.json``."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt

from instanceformer.data.formats.records import expect_file, whole_number
from instanceformer.data.formats.run_lengths import compress_masks, show
from instanceformer.files import replacing


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
        score: confidence; any finite number, of which only the order counts.
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
        visible = [segmentation for segmentation in track.segmentations if segmentation is not None]
        try:
            if visible:
                compress_masks(track.segmentations, *visible[0]["size"])  # refuses damaged counts and a change of size
        except ValueError as error:
            raise ValueError(f"{path}: entry {index}: {error}") from error
        tracks.append(track)
    return tracks


def iterate_results(path: str | Path) -> Iterator[Track]:
    """Read a result file track by track, of which only the text is in memory; what masks hold is not looked into.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: where it is no result file any more; the message names the file, the entry and the field.
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
    """Parse the JSON list that begins at a place of a text and ends with it, entry by entry."""
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
