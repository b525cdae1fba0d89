"""Masks as run lengths: every form in which COCO-style files hold them, brought to compressed counts and checked.

A mask is read column by column as runs of equal pixels, zeros first. The compressed counts are pycocotools' text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

_MAX_DIGITS = 6  # of a run: 30 bits with the sign, of the 32 that pycocotools has


class MaskError(ValueError):
    """A mask that is of no known form or damaged.

    Attributes:
        where: its place in the track, ``segmentations[frame]`` and on.
        message: what was expected and what was found.
    """

    def __init__(self, where: str, expected: str, found: str) -> None:
        self.where, self.message = where, f"expected {expected}, found {found}"
        super().__init__(f"{where}: {self.message}")


class MaskSizeError(MaskError):
    """A mask of another size than its video's."""


def compress_masks(segmentations: Sequence[object], height: int, width: int) -> list[bytes | None]:
    """Bring the masks of one track to compressed counts.

    Args:
        segmentations: for each frame null, an empty list or object, a run-length mask ``{size, counts}`` whose counts
            are compressed text or a list of run lengths, or a list of polygons (flat lists x, y, x, y, ... in pixels).
        height: of the video, in pixels.
        width: of the video, in pixels.

    Returns:
        For each frame the compressed counts; None where there is no mask, or one without counts or pixels.

    Raises:
        MaskSizeError: one is of another size.
        MaskError: one is of no such form, or damaged: its runs do not fill height x width. The message begins with its
            place, ``segmentations[frame]``.
    """
    masks: list[bytes | None] = []
    texts: dict[int, bytes] = {}
    for frame, segmentation in enumerate(segmentations):
        counts = _compress(segmentation, height, width, f"segmentations[{frame}]")
        if isinstance(counts, str):  # as the file has it, to be looked into
            texts[frame] = counts.encode()
        masks.append(None if isinstance(counts, str) else counts)
    areas = mask_areas(list(texts.values()), height * width)
    for (frame, text), area in zip(texts.items(), areas, strict=True):
        if area < 0:
            expected = f"run lengths of a mask of {height}x{width} pixels"
            raise MaskError(f"segmentations[{frame}].counts", expected, f"a damaged string, {show(text.decode())}")
        if area > 0:
            masks[frame] = text
    return masks


def mask_areas(masks: Sequence[bytes], pixels: int) -> list[int]:
    """The area of each mask, given its compressed counts; -1 where they do not describe a mask of ``pixels`` pixels.

    pycocotools does not notice runs that do not fill the mask: its decode returns arbitrary pixels, and its iou does
    not return. A run is written in 5-bit digits, the least first, each as the character 48 + digit, + 32 on all but the
    last; the top bit of the last is the sign. From the fourth run on, it is the difference from the run two before.
    """
    if not masks:
        return []
    masks = [counts or b"!" for counts in masks]  # without a character there is nothing to sum over; "!" is no digit
    text = np.frombuffer(b"".join(masks), dtype=np.uint8).astype(np.int64) - 48
    ends = np.cumsum([len(counts) for counts in masks])
    starts = np.concatenate(([0], ends[:-1]))
    valid = text[ends - 1] & 32 == 0
    valid &= (np.minimum.reduceat(text, starts) >= 0) & (np.maximum.reduceat(text, starts) < 64)

    text[ends - 1] &= 31  # every mask ends its last run, so that a damaged one does not disturb the next
    is_last = text & 32 == 0
    run_ends = np.flatnonzero(is_last) + 1
    digits = np.diff(run_ends, prepend=0)
    place = np.arange(len(text)) - np.repeat(run_ends - digits, digits)
    values = np.add.reduceat((text & 31) << (5 * np.minimum(place, _MAX_DIGITS)), run_ends - digits)
    values -= np.where(text[is_last] & 16, 1 << (5 * np.minimum(digits, _MAX_DIGITS)), 0)

    num_runs = np.diff(np.searchsorted(run_ends, ends), prepend=-1)  # of each mask
    first_run = np.cumsum(num_runs) - num_runs
    index = np.arange(len(values)) - np.repeat(first_run, num_runs)  # of a run in its mask
    valid &= np.maximum.reduceat(digits, first_run) <= _MAX_DIGITS
    is_odd = index % 2 == 1
    runs = values.copy()
    for chain in (is_odd, ~is_odd & (index > 0)):  # the runs of which each is added to the one before
        sums = np.cumsum(np.where(chain, values, 0))
        runs[chain] = (sums - np.repeat(sums[first_run], num_runs))[chain]
    valid &= (np.minimum.reduceat(runs, first_run) >= 0) & (np.add.reduceat(runs, first_run) == pixels)
    areas = np.add.reduceat(np.where(is_odd, runs, 0), first_run)
    return [int(area) for area in np.where(valid, areas, -1)]


def show(value: object) -> str:
    """A value found in a JSON file, in at most 60 characters."""
    try:
        text = "nothing" if value is None else json.dumps(value, default=str)
    except RecursionError:
        text = "lists in lists without end"
    return text if len(text) <= 60 else text[:57] + "..."


def _compress(segmentation: object, height: int, width: int, where: str) -> bytes | str | None:
    """Compressed counts of one mask, as a string where the file has them; None where there is no mask."""
    if not segmentation and isinstance(segmentation, (list, dict, type(None))):
        return None
    if isinstance(segmentation, list):
        return _fill_polygons(segmentation, height, width, where)
    if not isinstance(segmentation, dict):
        raise MaskError(where, "a run-length mask, a list of polygons or null", show(segmentation))
    counts = segmentation.get("counts")
    if counts in ("", []):
        return None
    size = segmentation.get("size")
    if size != [height, width]:
        expected = f"[{height}, {width}], one [height, width] for a whole video"
        raise MaskSizeError(f"{where}.size", expected, show(size))
    if isinstance(counts, str) and counts.isascii():
        return counts
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise MaskError(f"{where}.counts", "a compressed string of ASCII or a list of run lengths", show(counts))
    if sum(counts) != height * width:
        expected = f"{height} * {width} = {height * width}"
        raise MaskError(f"{where}.counts", expected, f"runs of {sum(counts)} pixels in all")
    return _counts(mask_utils.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def _fill_polygons(polygons: list[Any], height: int, width: int, where: str) -> bytes | None:
    """Compressed counts of the union of polygons; None where they have no pixel."""
    margin = max(height, width)  # pycocotools walks along every edge: one to a far away place would take for ever
    for polygon in polygons:
        if (
            not isinstance(polygon, list)
            or len(polygon) < 6
            or len(polygon) % 2
            or not all(type(number) in (int, float) and -margin <= number <= 2 * margin for number in polygon)
        ):
            expected = "polygons [x1, y1, x2, y2, ...] of three points or more in or near the frame"
            raise MaskError(where, expected, show(polygon))
    return _counts(mask_utils.merge(mask_utils.frPyObjects(polygons, height, width)))


def _counts(code: dict[str, Any]) -> bytes | None:
    """The counts of a mask that pycocotools made; None where it has no pixel."""
    return bytes(code["counts"]) if mask_utils.area(code) else None
