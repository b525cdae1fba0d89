"""Seconds and peak memory of the metric, JSON files to numbers, on a made-up dataset of the size of YouTube-VIS 21's.

    python scripts/benchmark_evaluation.py [--videos 420] [--frames 30] [--repeats 3]

Beside it, in turns: the plain way of the official evaluator, which merges the masks of every frame of every pair of
tracks and lets COCOeval match, and `json.loads` of the two files. The official evaluator itself was once measured at
3.9 s and 314 MiB on data of this size. Peaks are of fresh processes that do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from instanceformer.evaluation.evaluate import evaluate_files
from timing import Machine, peak_memory

HEIGHT, WIDTH, CATEGORIES = 360, 640, 40


class Blob:
    """A wobbling ellipse that wanders through a video."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.center = rng.uniform((120, 80), (520, 280))
        self.velocity = rng.normal(0, 3, 2)
        self.axes = rng.uniform(40, 130), rng.uniform(30, 100)
        self.waves = rng.uniform(0, 2 * np.pi, 4)
        self.jitter = np.zeros(2)

    def jittered(self, rng: np.random.Generator) -> Blob:
        """A prediction of it: of the same size and motion, somewhere else by a few pixels, with another outline."""
        other = Blob(rng)
        other.center, other.velocity, other.axes = self.center, self.velocity, self.axes
        other.jitter = rng.normal(0, 12, 2)
        return other

    def encode(self, frame: int) -> dict[str, Any] | None:
        """The mask of a frame as compressed run lengths: in each column one run, from a wavy top to a wavy bottom."""
        x0, y0 = self.center + self.jitter + self.velocity * frame
        columns = np.arange(max(0, round(x0 - self.axes[0])), min(WIDTH, round(x0 + self.axes[0])))
        across = (columns - x0) / self.axes[0]
        half = self.axes[1] * np.sqrt(np.maximum(0, 1 - across**2))
        wave = [4 * np.sin(k * 4 * across + phase + frame / 9) for k, phase in enumerate(self.waves, start=1)]
        tops = np.clip(np.rint(y0 - half + wave[0] + wave[1]), 0, HEIGHT - 1).astype(np.int64)
        bottoms = np.clip(np.rint(y0 + half + wave[2] + wave[3]), 0, HEIGHT).astype(np.int64)
        seen = bottoms > tops
        if not seen.any():
            return None
        ends = np.stack([columns * HEIGHT + tops, columns * HEIGHT + bottoms], axis=1)[seen].ravel()
        runs = np.diff(ends, prepend=0, append=HEIGHT * WIDTH)
        code = coco_mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": runs.tolist()}, HEIGHT, WIDTH)
        return {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}


def make_files(folder: Path, videos: int, frames: int) -> None:
    """Write gt.json and results.json: in each video 2 to 4 instances and 10 predicted tracks near to them."""
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {
        "videos": [{"id": v, "height": HEIGHT, "width": WIDTH, "length": frames} for v in range(videos)],
        "categories": [{"id": c, "name": f"category {c}"} for c in range(CATEGORIES)],
        "annotations": [],
    }
    results: list[dict[str, Any]] = []
    for video in range(videos):
        truth = [(Blob(rng), int(rng.integers(CATEGORIES))) for _ in range(rng.integers(2, 5))]
        for blob, category in truth:
            masks = [blob.encode(t) if rng.random() > 0.05 else None for t in range(frames)]
            areas = [None if mask is None else int(coco_mask.area(mask)) for mask in masks]
            boxes = [None if mask is None else coco_mask.toBbox(mask).tolist() for mask in masks]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "video_id": video,
                    "category_id": category,
                    "iscrowd": 0,
                    "segmentations": masks,
                    "areas": areas,
                    "bboxes": boxes,
                }
            )
        for _ in range(10):
            near, category = truth[rng.integers(len(truth))]
            results.append(
                {
                    "video_id": video,
                    "category_id": category if rng.random() < 0.7 else int(rng.integers(CATEGORIES)),
                    "score": float(rng.random()),
                    "segmentations": [near.jittered(rng).encode(t) for t in range(frames)],
                }
            )
    (folder / "gt.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))


def evaluate_plainly(ground_truth: Path, results: Path) -> float:
    """AP by merging masks frame by frame and by COCOeval; for files as ``make_files`` writes them only."""
    truth, tracks = (json.loads(path.read_text()) for path in (ground_truth, results))
    true, predicted = defaultdict(list), defaultdict(list)
    for annotation in truth["annotations"]:
        true[annotation["video_id"], annotation["category_id"]].append(annotation | {"ignore": 0})
    for index, track in enumerate(tracks):
        track |= {"id": index + 1, "areas": [mask and coco_mask.area(mask) for mask in track["segmentations"]]}
        predicted[track["video_id"], track["category_id"]].append(track)
    for annotation in [track for cell in [*true.values(), *predicted.values()] for track in cell]:
        visible = [area for area in annotation["areas"] if area]
        annotation["area"] = np.mean(visible) if visible else 0
    video_ids, category_ids = ([entry["id"] for entry in truth[key]] for key in ("videos", "categories"))
    evaluator = COCOeval(iouType="segm")
    evaluator.params.imgIds, evaluator.params.catIds, evaluator.params.maxDets = video_ids, category_ids, [1, 10, 100]
    evaluator.params.areaRng = [[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]]
    evaluator._paramsEval, evaluator._gts, evaluator._dts = evaluator.params, true, predicted
    evaluator.ious = {
        (v, c): np.array(
            [
                [merge_frames(track, other) for other in true[v, c]]
                for track in sorted(predicted[v, c], key=lambda t: -t["score"])
            ]
        )
        for v in video_ids
        for c in category_ids
    }
    evaluator.evalImgs = [
        evaluator.evaluateImg(video_id, category_id, area_range, 100)
        for category_id in category_ids
        for area_range in evaluator.params.areaRng
        for video_id in video_ids
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean())


def merge_frames(track: dict[str, Any], other: dict[str, Any]) -> float:
    """IoU of two tracks: intersections and unions frame by frame."""
    intersection = union = 0
    for masks in zip(track["segmentations"], other["segmentations"], strict=True):
        present = [mask for mask in masks if mask is not None]
        if len(present) == 2:
            intersection += int(coco_mask.area(coco_mask.merge(present, True)))
        if present:
            union += int(coco_mask.area(coco_mask.merge(present, False)))
    return intersection / union if union else 0.0


def measure(folder: Path, what: str) -> dict[str, float]:
    """Seconds of `what` in this process, the AP it finds, and its peak memory in MiB."""
    files = folder / "gt.json", folder / "results.json"
    ap, start = 0.0, time.perf_counter()
    if what == "json":
        held = [json.loads(path.read_text()) for path in files]
        assert all(held)
    elif what == "plain":
        ap = evaluate_plainly(*files)
    else:
        ap = evaluate_files(*files).summary["AP"]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "AP": ap, "peak": peak_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=420)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), options.videos, options.frames)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        print(
            f"{options.videos} videos of {options.frames} frames of {HEIGHT}x{WIDTH}, {size:.0f} MiB of JSON; "
            f"{Machine.this('numpy')}"
        )
        titles = {"evaluation": "this package", "plain": "plain way", "json": "json.loads"}
        runs: dict[str, list[dict[str, float]]] = {what: [] for what in titles}
        for _ in range(options.repeats):
            for what in titles:
                command = [sys.executable, __file__, "--measure", folder, what]
                runs[what].append(json.loads(subprocess.check_output(command)))
    for what, title in titles.items():
        timed = [run["seconds"] for run in runs[what]]
        peak = max(run["peak"] for run in runs[what])
        print(
            f"{title:12} {statistics.median(timed):5.2f} s ({min(timed):.2f} to {max(timed):.2f}), peak {peak:.0f} MiB"
        )
    assert abs(runs["evaluation"][0]["AP"] - runs["plain"][0]["AP"]) < 1e-9
    ratio = statistics.median(
        ours["seconds"] / plain["seconds"] for ours, plain in zip(runs["evaluation"], runs["plain"], strict=True)
    )
    print(f"this package takes {ratio:.2f} times as long as the plain way, for the same AP")


if __name__ == "__main__":
    main()
