from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from instanceformer.data.formats.run_lengths import compress_masks, decode_runs, mask_areas

# The 3x4 rectangle at row 1 and column 2 of 5x7 pixels: 2 columns and a pixel, then 3 on and 2 off, four times.
RUNS = [11, 3, 2, 3, 2, 3, 2, 3, 6]


def encode(mask: np.ndarray) -> bytes:
    return bytes(mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])


def rectangle() -> bytes:
    mask = np.zeros((5, 7), dtype=bool)
    mask[1:4, 2:6] = True
    return encode(mask)


def digits(value: int) -> bytes:
    """One number of the compressed text, in as few digits as hold it."""
    text = b""
    while True:
        digit, value = value & 31, value >> 5
        if value == (-1 if digit & 16 else 0):
            return text + bytes([48 + digit])
        text += bytes([48 + digit + 32])


def test_every_form_of_a_mask_becomes_the_same_counts() -> None:
    text = rectangle().decode()
    forms: list[Any] = [
        {"size": [5, 7], "counts": text},
        {"size": [5.0, 7.0], "counts": text},
        {"size": [5, 7], "counts": RUNS},
        [[2, 1, 6, 1, 6, 4, 2, 4]],
        [[2, 1, 4, 1, 4, 4, 2, 4], [4, 1, 6, 1, 6, 4, 4, 4]],
    ]
    assert compress_masks(forms, 5, 7) == [rectangle()] * len(forms)


def test_a_mask_without_pixels_is_none() -> None:
    counts: list[Any] = ["", [], [35], encode(np.zeros((5, 7))).decode()]
    empty = [None, [], {}, *({"size": [5, 7], "counts": value} for value in counts)]
    assert compress_masks(empty, 5, 7) == [None] * len(empty)
    assert compress_masks([], 5, 7) == []


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("abc", r'\[1\]: expected a run-length mask, a list of polygons or null, found "abc"'),
        (0, r"\[1\]: expected a run-length mask, a list of polygons or null, found 0"),
        ([[1, 2, 3]], r"\[1\]: expected polygons .*, found \[1, 2, 3\]"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"\[1\]: expected polygons"),
        ({"counts": RUNS}, r"\[1\]\.size: expected \[5, 7\], .*, found nothing"),
        ({"size": [7, 5], "counts": RUNS}, r"\[1\]\.size: expected \[5, 7\], .*, found \[7, 5\]"),
        ({"size": [5, 7]}, r"\[1\]\.counts: expected a compressed string .*, found nothing"),
        ({"size": [5, 7], "counts": rectangle()}, r"\[1\]\.counts: expected a compressed string .*, found \"b'"),
        ({"size": [5, 7], "counts": "é1"}, r"\[1\]\.counts: expected a compressed string of ASCII .*, found "),
        ({"size": [5, 7], "counts": [-1, 36]}, r"\[1\]\.counts: expected .*, found \[-1, 36\]"),
        ({"size": [5, 7], "counts": [30, 3]}, r"\[1\]\.counts: expected 5 \* 7 = 35, found runs of 33 pixels in all"),
        ({"size": [5, 7], "counts": "S2"}, r"\[1\]\.counts: expected .* 5x7 pixels, found a damaged string, \"S2\""),
    ],
)
def test_errors_name_place_expected_and_found(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match="^segmentations" + message):
        compress_masks([None, segmentation], 5, 7)


def test_areas_of_masks_of_any_shape() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((60, 24, 40)) < rng.random((60, 1, 1))
    masks[7], masks[8], masks[9] = True, np.eye(24, 40, dtype=bool), False
    assert mask_areas([encode(mask) for mask in masks], 24 * 40) == masks.sum((1, 2)).tolist()
    large = np.zeros((2000, 3000), dtype=bool)
    large[:, 1000:] = True
    assert mask_areas([encode(large)], large.size) == [4_000_000]
    assert mask_areas([], 35) == []


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        rectangle()[:-1],  # cut: too few pixels
        rectangle()[:-1] + b"o",  # cut within a number
        rectangle() + b"1",  # a pixel too many
        rectangle()[:-1] + b"!",  # no digit: below and above
        rectangle()[:-1] + b"p",
        rectangle() + b"\0",
        b"S" + b"P" * 20 + b"1",  # numbers of more digits than any run has: 35 and zeros, then 1 far above
        b"S" + b"Q" * 5000,
        b"".join(map(digits, [20, -5, 20])),  # a negative run, though the sum is right
        b"".join(map(digits, [10, 5, 10, -8, 3])),  # 10 5 10 -3 13
        b"".join(map(digits, [35 + 2**32])),  # right in 32 bits
    ],
    ids=range(12),
)
def test_damaged_counts_have_no_area_and_do_not_disturb_their_neighbors(damaged: bytes) -> None:
    good = rectangle()
    assert mask_areas([damaged], 35) == [-1]
    assert mask_areas([good, damaged, good, damaged, damaged, good], 35) == [12, -1, 12, -1, -1, 12]


def test_the_tests_own_writer_of_numbers_agrees_with_pycocotools() -> None:
    differences = [run - (RUNS[i - 2] if i > 2 else 0) for i, run in enumerate(RUNS)]
    assert b"".join(map(digits, differences)) == rectangle()


HEIGHT, WIDTH = 40, 70


def random_masks(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Noise, blobs, empty and full masks, and such that begin or end with ones."""
    masks = []
    for index in range(count):
        mask = rng.random((HEIGHT, WIDTH)) < rng.choice([0.001, 0.1, 0.5, 0.9])
        top, left = rng.integers(0, 30, size=2)
        mask = [mask, mask & False, mask | True, np.zeros_like(mask)][index % 4]
        if index % 4 == 3:
            mask[top:, left : left + 20] = True
        masks.append(mask)
    return masks


def test_the_runs_are_those_of_the_masks():
    masks = random_masks(np.random.default_rng(0), 60)
    runs = decode_runs([encode(mask) for mask in masks], HEIGHT * WIDTH)
    assert runs.areas.tolist() == [mask.sum() for mask in masks]
    lengths = np.split(runs.lengths, runs.first[1:], axis=1)
    for mask, of_mask in zip(masks, lengths, strict=True):
        values = np.tile([False, True], of_mask.shape[1])
        np.testing.assert_array_equal(values.repeat(of_mask.T.ravel()), mask.ravel(order="F"))


def slow_area(counts: bytes) -> int:
    """The area of a mask digit by digit, as `decode_runs` describes the format; -1 if it is damaged."""
    runs: list[int] = []
    value = place = 0
    for character in counts:
        digit = character - 48
        if not 0 <= digit < 64 or place > 25:
            return -1
        value += (digit & 31) << place
        place += 5
        if digit < 32:
            value -= (1 << place) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = place = 0
    return sum(runs[1::2]) if not place and runs and min(runs) >= 0 and sum(runs) == HEIGHT * WIDTH else -1


@pytest.mark.parametrize("seed", range(5))
def test_damaged_masks_are_found_and_do_not_disturb_the_others(seed):
    rng = np.random.default_rng(seed)
    masks = [bytearray(encode(mask)) for mask in random_masks(rng, 200)]
    for counts in masks[::2]:
        for _ in range(rng.integers(0, 3)):
            counts[rng.integers(len(counts))] = rng.integers(256) if rng.random() < 0.3 else rng.integers(48, 112)
        if rng.random() < 0.3:
            del counts[rng.integers(len(counts)) :]
        if rng.random() < 0.2:
            counts += b"o" * int(rng.integers(1, 9))
    found = decode_runs([bytes(counts) for counts in masks], HEIGHT * WIDTH).areas.tolist()
    assert found == [slow_area(counts) for counts in masks]
    assert found.count(-1) > 40
