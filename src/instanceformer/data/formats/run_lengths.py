"""Masks as run lengths: converts every form used in COCO-style files to compressed counts, and checks it.

Run lengths describe a mask column by column as runs of equal pixels, starting with zeros. Compressed counts are the
text format of pycocotools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH = 2**18
"""Characters of compressed counts to decode together; large enough to make call overhead negligible."""
_MAX_DIGITS = 6  # per run: 30 bits including the sign, of pycocotools' 32


class MaskError(ValueError):
    """A mask is in no known form, or is damaged.

    Attributes:
        location: JSON path within the track: ``segmentations[frame]`` or below it.
        message: what was expected and what was found.
    """

    def __init__(self, location: str, expected: str, found: str) -> None:
        self.location, self.message = location, f"expected {expected}, found {found}"
        super().__init__(f"{location}: {self.message}")


class MaskSizeError(MaskError):
    """A mask does not have the size of its video."""


def compress_masks(segmentations: Sequence[object], height: int, width: int) -> list[bytes | None]:
    """Convert the masks of one track to compressed counts.

    Args:
        segmentations: one entry per frame: null; an empty list or object; a run-length mask ``{size, counts}`` whose
            counts are compressed text or a list of run lengths; or a list of polygons (flat lists x, y, x, y, ... in
            pixels).
        height: height of the video in pixels.
        width: width of the video in pixels.

    Returns:
        The compressed counts of each frame; None if there is no mask or it is empty.

    Raises:
        MaskSizeError: a mask does not have the size of the video.
        MaskError: a mask is in none of these forms, or is damaged: its runs do not fill height x width. The message
            starts with ``segmentations[frame]``.
    """
    (masks,) = compress_tracks([(segmentations, height, width)])
    if isinstance(masks, MaskError):
        raise masks
    return masks


def compress_tracks(tracks: Sequence[tuple[Sequence[object], int, int]]) -> list[list[bytes | None] | MaskError]:
    """``compress_masks`` for many tracks together, which is faster.

    Args:
        tracks: (segmentations, height, width) of each track.

    Returns:
        The masks of each track, or a MaskError in place of them if one is invalid.
    """
    compressed: list[list[bytes | None] | MaskError] = []
    texts: list[tuple[int, int, bytes]] = []  # track, frame and counts of masks that come compressed
    for track, (segmentations, height, width) in enumerate(tracks):
        masks: list[bytes | None] = []
        compressed.append(masks)
        try:
            for frame, segmentation in enumerate(segmentations):
                counts = _compress(segmentation, height, width, f"segmentations[{frame}]")
                if isinstance(counts, str):
                    texts.append((track, frame, counts.encode()))
                masks.append(None if isinstance(counts, str) else counts)
        except MaskError as error:
            compressed[track] = error
    pixels = [tracks[track][1] * tracks[track][2] for track, _, _ in texts]
    areas = mask_areas([text for _, _, text in texts], np.array(pixels))
    for (track, frame, text), area in zip(texts, areas, strict=True):
        masks_or_error = compressed[track]
        if isinstance(masks_or_error, MaskError):
            continue
        if area < 0:
            _, height, width = tracks[track]
            expected = f"run lengths of a mask of {height}x{width} pixels"
            compressed[track] = MaskError(
                f"segmentations[{frame}].counts", expected, f"a damaged string, {show(text.decode())}"
            )
        elif area > 0:
            masks_or_error[frame] = text
    return compressed


def mask_areas(masks: Sequence[bytes], pixels: int | npt.NDArray[np.int64]) -> list[int]:
    """The area in pixels of each mask of compressed counts; -1 if the counts do not fill exactly ``pixels`` pixels.

    pycocotools does not check this: for such counts its ``decode`` returns arbitrary pixels and its ``iou`` hangs.
    """
    areas: list[int] = []
    all_pixels = np.broadcast_to(pixels, len(masks))
    start = size = 0
    for index, mask in enumerate(masks, 1):
        size += len(mask)
        if size > BATCH or index == len(masks):
            areas += decode_runs(masks[start:index], all_pixels[start:index]).areas.tolist()
            start, size = index, 0
    return areas


def without_fragments(segmentation: object) -> object:
    """Remove polygons of fewer than three points from a list that has others; return anything else unchanged.

    Labeling tools leave stray points and lines behind when a polygon is split or moved. They cover no pixels.
    """
    if not isinstance(segmentation, list):
        return segmentation
    whole = [polygon for polygon in segmentation if not _is_fragment(polygon)]
    return whole if 0 < len(whole) < len(segmentation) else segmentation


def _is_fragment(polygon: object) -> bool:
    return isinstance(polygon, list) and len(polygon) in (0, 2, 4) and {*map(type, polygon)} <= {int, float}


def show(value: object) -> str:
    """Format a JSON value for a message, in at most 60 characters."""
    text = "nothing" if value is None else json.dumps(_beginning(value), default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _beginning(value: object, depth: int = 3) -> object:
    """Truncate lists and objects to their first entries, recursively."""
    if isinstance(value, list):
        return [_beginning(entry, depth - 1) for entry in value[:30]] if depth else "..."
    if isinstance(value, dict):
        return {key: _beginning(entry, depth - 1) for key, entry in islice(value.items(), 10)} if depth else "..."
    return value


def _compress(segmentation: object, height: int, width: int, location: str) -> bytes | str | None:
    """Compressed counts of one mask; an unchecked str if the file has them compressed, None if there is no mask."""
    if not segmentation and isinstance(segmentation, (list, dict, type(None))):
        return None
    if isinstance(segmentation, list):
        return _fill_polygons(segmentation, height, width, location)
    if not isinstance(segmentation, dict):
        raise MaskError(location, "a run-length mask, a list of polygons or null", show(segmentation))
    counts = segmentation.get("counts")
    if counts in ("", []):
        return None
    size = segmentation.get("size")
    if size != [height, width]:
        expected = f"[{height}, {width}], one [height, width] for a whole video"
        raise MaskSizeError(f"{location}.size", expected, show(size))
    if isinstance(counts, str) and counts.isascii():
        return counts
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise MaskError(f"{location}.counts", "a compressed string of ASCII or a list of run lengths", show(counts))
    if sum(counts) != height * width:
        expected = f"{height} * {width} = {height * width}"
        raise MaskError(f"{location}.counts", expected, f"runs of {sum(counts)} pixels in all")
    return _counts({"size": [height, width], "counts": counts}, height, width)


def _fill_polygons(polygons: list[Any], height: int, width: int, location: str) -> bytes | None:
    """Compressed counts of the union of polygons; None if they cover no pixels."""
    margin = max(height, width)  # pycocotools walks along every edge, which takes forever if it is long
    for polygon in polygons:
        if (
            not isinstance(polygon, list)
            or len(polygon) < 6
            or len(polygon) % 2
            or not {*map(type, polygon)} <= {int, float}
            or not (min(polygon) >= -margin and max(polygon) <= 2 * margin and math.isfinite(sum(polygon)))
        ):
            expected = "polygons [x1, y1, x2, y2, ...] of three points or more in or near the frame"
            raise MaskError(location, expected, show(polygon))
    return _counts(polygons, height, width)


def compress_array(mask: npt.NDArray[np.bool_]) -> bytes | None:
    """Compressed counts of a (height, width) bool mask; None if it is empty."""
    from pycocotools import mask as mask_utils

    return bytes(mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]) if mask.any() else None


def _counts(mask: dict[str, Any] | list[Any], height: int, width: int) -> bytes | None:
    """Compressed counts of an uncompressed run-length mask or a list of polygons; None if they cover no pixels."""
    from pycocotools import mask as mask_utils  # here, so that reading compressed counts does not load it

    code = mask_utils.frPyObjects(mask, height, width)
    if isinstance(mask, list):
        code = code[0] if len(code) == 1 else mask_utils.merge(code)
    return bytes(code["counts"]) if mask_utils.area(code) else None


@dataclass(frozen=True)
class Runs:
    """The runs of M masks, each read column by column.

    Attributes:
        lengths: (2, P) int64, lengths of the runs of zeros (row 0), each with that of the following run of ones (row
            1), for one mask after another. For a mask that ends with zeros, the last run of ones has length 0.
        first: (M,) int64, index in ``lengths`` of each mask's first pair of runs.
        areas: (M,) int64, area of each mask in pixels; -1 if the counts do not fill the given number of pixels, and
            then the mask's lengths are meaningless.
    """

    lengths: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]


def decode_runs(masks: Sequence[bytes], pixels: int | npt.NDArray[np.int64]) -> Runs:
    """Decode and check compressed counts.

    Each run is written as 5-bit digits, least significant first. A digit is the character 48 + digit, plus 32 for all
    but the last digit, whose top bit is the sign. From the fourth run on, the number is the difference from the run two
    places earlier.

    pycocotools neither checks counts nor returns runs. Compared with a Python loop over digits, this takes 0.7 ms
    instead of 13 ms for 300 masks of 360 x 640 pixels, and makes ``evaluate_files`` as a whole 7 times as fast (0.19 s
    instead of 1.42 s for the 60 videos of ``scripts/benchmark_evaluation.py``). In training clips it decodes masks 1.4
    times as fast as pycocotools.

    Args:
        masks: compressed counts of M masks; at least one.
        pixels: height x width, which the runs of each mask must fill: one number for all masks, or (M,).
    """
    if b"" in masks:
        masks = [counts or b"!" for counts in masks]  # each needs a character; "!" is not a digit
    text = np.frombuffer(b"".join(masks), dtype=np.uint8) - np.uint8(48)  # below 48 wraps around to an invalid digit
    ends = np.array([*map(len, masks)]).cumsum()
    sound = text[ends - 1] < 32
    if text.max() > 63:
        sound &= np.maximum.reduceat(text, _begins(ends)) < 64
    continues = (text & 32).astype(np.bool_)
    continues[ends - 1] = False  # end the last run here, so that damage does not spread to the next mask
    values = (((text[~continues] & 31) ^ 16) - 16).view(np.int8)  # the last digit of each run, with its sign

    lower = continues.nonzero()[0]  # positions of the other digits, which are few
    run_ends = ends - lower.searchsorted(ends)
    num_runs = np.diff(run_ends, prepend=0)
    has_odd = num_runs % 2 == 1
    row_ends = ((num_runs + 1) // 2).cumsum()
    first = _begins(row_ends)
    lengths = np.insert(values, run_ends[has_odd], 0).reshape(-1, 2).T.astype(np.int64, order="C")
    if len(lower):
        index = np.arange(len(lower))
        begins = np.diff(lower, prepend=-2) != 1
        place = index - np.maximum.accumulate(np.where(begins, index, 0))  # of a digit in its run, lowest first
        run = lower - index  # each character before it that is not a lower digit ends a run
        mask = run_ends.searchsorted(run, side="right")
        sound[mask[place >= _MAX_DIGITS - 1]] = False
        row, is_ones = np.divmod(run + (2 * first - _begins(run_ends))[mask], 2)
        shift = 5 * np.minimum(place, _MAX_DIGITS)
        ends_run = np.append(begins[1:], True)
        lengths[is_ones[ends_run], row[ends_run]] <<= shift[ends_run] + 5
        np.add.at(lengths, (is_ones, row), (text[lower] & 31).astype(np.int64) << shift)

    leading = lengths[0, first]  # the third run is not a difference from the first
    lengths[0, first] = 0
    lengths[:, first[1:]] -= np.add.reduceat(lengths, first, axis=1)[:, :-1]  # so that the sums restart with each mask
    lengths.cumsum(axis=1, out=lengths)
    lengths[0, first] = leading
    lengths[1, row_ends[has_odd] - 1] = 0
    if lengths.min() < 0:
        sound &= np.minimum.reduceat(lengths, first, axis=1).min(axis=0) >= 0
    zeros, ones = np.add.reduceat(lengths, first, axis=1)
    return Runs(lengths, first, np.where(sound & (zeros + ones == pixels), ones, -1))


def _begins(ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Start indices of consecutive parts, given their ends."""
    return np.concatenate(([0], ends[:-1]))
