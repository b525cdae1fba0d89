"""Compressed run lengths as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MAX_DIGITS = 6  # of a run: 30 bits with the sign, of the 32 that pycocotools has


@dataclass(frozen=True)
class Runs:
    """The runs of M masks, each read column by column.

    Attributes:
        lengths: (2, P) int64; the runs of zeros, and of the ones after each, mask after mask. A mask that ends with
            zeros has an empty run of ones at its end.
        first: (M,) the place in ``lengths`` where each mask begins.
        areas: (M,) the number of ones of each mask; -1 where the counts do not describe a mask of the size asked for,
            and then its lengths mean nothing.
    """

    lengths: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]


def decode_runs(masks: Sequence[bytes], pixels: int | npt.NDArray[np.int64]) -> Runs:
    """Decode and check compressed counts.

    A run is written in 5-bit digits, the least first, each as the character 48 + digit, + 32 on all but the last; the
    top bit of the last is the sign. From the fourth run on, it is the difference from the run two before.

    Args:
        masks: one or more.
        pixels: height x width, which the runs of a mask must fill; of all masks, or (M,) of each.
    """
    if b"" in masks:
        masks = [counts or b"!" for counts in masks]  # without a character there is no run; "!" is no digit
    text = np.frombuffer(b"".join(masks), dtype=np.uint8) - np.uint8(48)  # what is below wraps around, and is no digit
    ends = np.array([*map(len, masks)]).cumsum()
    sound = text[ends - 1] < 32
    if text.max() > 63:
        sound &= np.maximum.reduceat(text, _begins(ends)) < 64
    continues = (text & 32).astype(np.bool_)
    continues[ends - 1] = False  # every mask ends its last run, so that a damaged one does not disturb the next
    values = (((text[~continues] & 31) ^ 16) - 16).view(np.int8)  # the last digits with their signs

    lower = continues.nonzero()[0]  # places of the other digits, of which there are few
    run_ends = ends - lower.searchsorted(ends)
    num_runs = np.diff(run_ends, prepend=0)
    has_odd = num_runs % 2 == 1
    row_ends = ((num_runs + 1) // 2).cumsum()
    first = _begins(row_ends)
    lengths = np.insert(values, run_ends[has_odd], 0).reshape(-1, 2).T.astype(np.int64, order="C")
    if len(lower):
        index = np.arange(len(lower))
        begins = np.diff(lower, prepend=-2) != 1
        place = index - np.maximum.accumulate(np.where(begins, index, 0))  # of a digit in its run
        run = lower - index  # all the others before it end a run each
        mask = run_ends.searchsorted(run, side="right")
        sound[mask[place >= _MAX_DIGITS - 1]] = False
        row, is_ones = np.divmod(run + (2 * first - _begins(run_ends))[mask], 2)
        shift = 5 * np.minimum(place, _MAX_DIGITS)
        ends_run = np.append(begins[1:], True)
        lengths[is_ones[ends_run], row[ends_run]] <<= shift[ends_run] + 5
        np.add.at(lengths, (is_ones, row), (text[lower] & 31).astype(np.int64) << shift)

    leading = lengths[0, first]  # the first run and the third are no differences
    lengths[0, first] = 0
    lengths[:, first[1:]] -= np.add.reduceat(lengths, first, axis=1)[:, :-1]  # so that the sums begin anew
    lengths.cumsum(axis=1, out=lengths)
    lengths[0, first] = leading
    lengths[1, row_ends[has_odd] - 1] = 0
    if lengths.min() < 0:
        sound &= np.minimum.reduceat(lengths, first, axis=1).min(axis=0) >= 0
    zeros, ones = np.add.reduceat(lengths, first, axis=1)
    return Runs(lengths, first, np.where(sound & (zeros + ones == pixels), ones, -1))


def _begins(ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of the parts begins whose ends are given."""
    return np.concatenate(([0], ends[:-1]))
