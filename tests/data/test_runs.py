import numpy as np
import pytest
from pycocotools import mask as coco_mask

from instanceformer.data.runs import decode_runs

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


def encode(mask: np.ndarray) -> bytes:
    return bytes(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])


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
