"""Made-up ground truth and predictions, and how they are evaluated."""

import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from instanceformer.evaluation.results import Track, encode_mask
from instanceformer.evaluation.video_ap import VideoAveragePrecision

SHARED = Path(os.environ.get("INSTANCEFORMER_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
needs_fixtures = pytest.mark.skipif(
    not (SHARED / "evaluation").is_dir(), reason=f"no official results to compare with in {SHARED / 'evaluation'}"
)

BLOCK = 32  # pixels: masks are made of blocks, so that the plain rules need look at one pixel of each
HEIGHT, WIDTH, FRAMES = 10 * BLOCK, 12 * BLOCK, 3  # small is up to 16 blocks, large from 64
LENGTHS = {9: 2, 0: FRAMES, 5: 2, 3: FRAMES}  # of the videos, in the order of the file


def random_mask(rng: np.random.Generator, blocks: int = 0) -> np.ndarray:
    """A rectangle with a few blocks changed; or, of 16 or 64 blocks, a square."""
    mask = np.zeros((HEIGHT // BLOCK, WIDTH // BLOCK), dtype=bool)
    height, width = (int(blocks**0.5),) * 2 if blocks else rng.integers(2, 11, size=2)
    top, left = rng.integers(0, 3, size=2)
    mask[top : top + height, left : left + width] = True
    if not blocks:
        mask ^= rng.random(mask.shape) < 0.03
    return mask.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def random_track(rng: np.random.Generator, frames: int) -> list:
    """Masks with absent frames; a third of the tracks have areas of exactly 128 x 128 or 256 x 256."""
    blocks = int(rng.choice([0, 0, 0, 0, 16, 64]))
    return [encode_mask(random_mask(rng, blocks)) if rng.random() < 0.8 else None for _ in range(frames)]


def random_case(seed: int) -> tuple[dict, list[Track]]:
    """Ground truth and predictions with absent frames, crowds, ties, all sizes, and videos without either.

    That of odd seeds has labels of occlusion.
    """
    rng = np.random.default_rng(seed)
    content = {
        "videos": [{"id": i, "height": HEIGHT, "width": WIDTH, "length": frames} for i, frames in LENGTHS.items()],
        "categories": [{"id": i, "name": str(i)} for i in (1, 4, 6)],
        "annotations": [],
    }
    levels = ["no_occlusion", "slight_occlusion", "severe_occlusion", None]
    for video in (5, 0, 3):
        for _ in range(4):
            masks = random_track(rng, LENGTHS[video])
            category = int(rng.choice([1, 4]))
            if content["annotations"] and rng.random() < 0.2:  # a twin, with the same IoUs
                twin = content["annotations"][-1]
                category = twin["category_id"]
                masks = twin["segmentations"] if twin["video_id"] == video else masks
            factor = rng.choice([0.3, 1.0])
            areas = [None if mask is None else float(coco_mask.area(mask) * factor) for mask in masks]
            labels = rng.choice(levels, p=[0.3, 0.4, 0.2, 0.1], size=LENGTHS[video]).tolist()
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "video_id": video,
                    "category_id": category,
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentations": masks,
                    "areas": areas,
                }
                | ({"occlusion": labels} if seed % 2 else {})
            )
    tracks = []
    for video in (0, 3, 9):
        truth = [a["segmentations"] for a in content["annotations"] if a["video_id"] == video]
        for _ in range(14):
            segmentations = random_track(rng, LENGTHS[video])
            if truth and rng.random() < 0.7:  # near to some instance, sometimes it exactly
                segmentations[1:] = truth[rng.integers(len(truth))][1:]
            tracks.append(Track(video, int(rng.choice([1, 4, 6])), float(rng.choice([0.2, 0.5, 0.9])), segmentations))
    return content, tracks


def evaluate(content, tracks, **options):
    metric = VideoAveragePrecision(content, **options)
    for video_id in dict.fromkeys(track.video_id for track in tracks):
        metric.update(video_id, [track for track in tracks if track.video_id == video_id])
    return metric.evaluate()


DAMAGES = {
    "cut": lambda counts: counts[:-1],
    "unfinished": lambda counts: counts[:-1] + "o",
    "more runs": lambda counts: counts + "1",
    "more digits": lambda counts: "S" + "P" * 20 + "1",
    "not ASCII": lambda counts: counts[:-1] + "é",
}


def damaged_mask(damage: str) -> dict:
    rle = encode_mask(random_mask(np.random.default_rng(5)))
    return rle | {"counts": DAMAGES[damage](rle["counts"])}
