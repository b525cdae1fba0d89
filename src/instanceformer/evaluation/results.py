"""Predicted tracks and the challenge's result file, ``results.json``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from instanceformer.data.run_lengths import compress_masks


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
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return RLE(size=[int(side) for side in code["size"]], counts=code["counts"].decode("ascii"))


def decode_mask(rle: RLE) -> npt.NDArray[np.bool_]:
    """The (H, W) bool mask of a compressed one."""
    return cast("npt.NDArray[np.bool_]", coco_mask.decode(rle).astype(bool))


def compress_track(segmentations: Sequence[object], height: int, width: int) -> list[RLE | None]:
    """The masks of one track in any form that annotation files have; see ``compress_masks``, also for its errors.

    Args:
        segmentations: for each frame the mask or null.
        height: of the video, in pixels.
        width: of the video, in pixels.

    Returns:
        For each frame the compressed mask, sound and with at least one pixel; None where the track is absent.
    """
    return [
        None if counts is None else RLE(size=[height, width], counts=counts.decode("ascii"))
        for counts in compress_masks(segmentations, height, width)
    ]


def write_results(path: str | Path, tracks: Iterable[Track]) -> None:
    """Write the challenge's result file: a list of {video_id, category_id, score, segmentations}.

    The file appears under its name only when it is complete.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write("[")
            for index, track in enumerate(tracks):
                file.write((",\n" if index else "") + json.dumps(vars(track)))
            file.write("]\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: str | Path) -> list[Track]:
    """Read a result file, keeping its order (equal scores are ranked by it).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a result file, or if a mask is damaged or differs in size from the first of its track;
            the message names the file, the entry and the field.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}); expected a list of predicted tracks") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: found a JSON {type(entries).__name__}, expected a list of predicted tracks")
    tracks = []
    for index, entry in enumerate(entries):
        try:
            tracks.append(_parse_track(entry))
        except ValueError as error:
            raise ValueError(f"{path}: entry {index}: {error}") from error
    return tracks


def _parse_track(entry: Any) -> Track:
    if not isinstance(entry, dict):
        raise ValueError(
            f"found {str(entry)[:80]}, expected an object with video_id, category_id, score, segmentations"
        )
    types: dict[str, tuple[type, ...]] = {
        "video_id": (int,),
        "category_id": (int,),
        "score": (int, float),
        "segmentations": (list,),
    }
    for field, expected in types.items():
        if field not in entry:
            raise ValueError(f"{field} is missing, found only {', '.join(entry) or 'an empty object'}")
        if not isinstance(entry[field], expected) or isinstance(entry[field], bool):
            raise ValueError(
                f"{field} is {str(entry[field])[:80]}, expected {' or '.join(t.__name__ for t in expected)}"
            )
    for frame, segmentation in enumerate(entry["segmentations"]):
        match segmentation:
            case None | {"size": [int(), int()], "counts": str()}:
                pass
            case _:
                raise ValueError(
                    f"frame {frame} is {str(segmentation)[:80]}, expected null or compressed run lengths "
                    '{"size": [height, width], "counts": "..."}'
                )
    visible = [segmentation for segmentation in entry["segmentations"] if segmentation is not None]
    if visible:
        compress_masks(entry["segmentations"], *visible[0]["size"])  # refuses damaged counts and a change of size
    return Track(**{field: entry[field] for field in types})
