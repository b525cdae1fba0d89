"""Folders of runs on synthetic videos, with results made from the ground truth, some of them spoiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.conftest import TINY

from instanceformer import InstanceFormer, checkpoints
from instanceformer.data.synthetic import SyntheticOptions, synthesize
from instanceformer.files import hash_file

FRAMES, MIDDLE = 12, 6
CURVES = """step,lr-AdamW/backbone,train/loss,train/mask_dice,train/gradient_norm,val/AP,val/AP50
0,0.001,9.5,0.9,40.0,,
0,,,,,0.1,0.2
1,0.0001,8.5,0.7,0.5,,
1,,,,,0.2,0.4
"""


def make_data(folder: Path) -> Path:
    """Three videos of 12 frames of 64x96; the annotation file."""
    options = SyntheticOptions(train_videos=1, valid_videos=3, length=FRAMES, height=64, width=96, workers=1)
    synthesize(folder, options, overwrite=True)
    return folder / "valid.json"


def read_instances(annotations: Path) -> list[dict[str, Any]]:
    return json.loads(annotations.read_text())["annotations"]


def perfect(annotations: Path) -> list[dict[str, Any]]:
    """The instances as tracks of falling scores."""
    return [
        {
            "video_id": each["video_id"],
            "category_id": each["category_id"],
            "score": 0.9 - i / 1000,
            "segmentations": each["segmentations"],
        }
        for i, each in enumerate(read_instances(annotations))
    ]


def spoiled(annotations: Path) -> list[dict[str, Any]]:
    """From the middle on, the first two tracks of video 1 change places, and the first of video 2 has no masks."""
    tracks = perfect(annotations)
    first, second = [track for track in tracks if track["video_id"] == 1][:2]
    a, b = first["segmentations"], second["segmentations"]
    first["segmentations"], second["segmentations"] = a[:MIDDLE] + b[MIDDLE:], b[:MIDDLE] + a[MIDDLE:]
    lost = next(track for track in tracks if track["video_id"] == 2)
    lost["segmentations"] = lost["segmentations"][:MIDDLE] + [None] * (FRAMES - MIDDLE)
    return tracks


def make_run(folder: Path, annotations: Path, tracks: Callable[[Path], list[dict[str, Any]]]) -> Path:
    """The folder of a run that was tested, with an untrained network."""
    torch.manual_seed(0)
    network = InstanceFormer(4, **TINY).eval()
    content = checkpoints.Checkpoint(
        vars(network.options), network.state_dict(), (), frame_size=checkpoints.FrameSize(64, 768)
    )
    checkpoints.write(content, folder / "last.ckpt")
    (folder / "results.json").write_text(json.dumps(tracks(annotations)))
    run = {"annotations": hash_file(annotations), "weights": hash_file(folder / "last.ckpt")}
    files = {"annotations": str(annotations), "images": str(annotations.parent / "JPEGImages")}
    measured = {"metrics": {"test/AP": 0.5, "test/AP_best_quarter": 0.25}, "run": run, "files": files}
    (folder / "results.metrics.json").write_text(json.dumps(measured))
    (folder / "config.yaml").write_text("seed_everything: 3\n")
    (folder / "metrics.csv").write_text(CURVES)
    return folder
