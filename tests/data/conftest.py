from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from torchvision.io import write_jpeg


def encode(mask: np.ndarray) -> dict[str, Any]:
    code = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


@dataclass
class TinyDataset:
    """A dataset on disk: white rectangles; all else in frame t of video v has the gray level 2 * (20 * v + t)."""

    annotations: Path
    images: Path
    content: dict[str, Any]
    masks: dict[int, np.ndarray]  # by instance id, (T, H, W)

    def write(self) -> Path:
        """Write `content` again after a test has changed it."""
        self.annotations.write_text(json.dumps(self.content))
        return self.annotations


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Callable[..., TinyDataset]:
    """Write a dataset. `absent`: (video index, instance index, frame) where an instance is not visible."""

    def write(
        lengths: Sequence[int] = (6, 4),
        instances: int = 2,
        height: int = 24,
        width: int = 40,
        absent: Sequence[tuple[int, int, int]] = (),
        name: str = "tiny",
    ) -> TinyDataset:
        root = tmp_path / name
        content: dict[str, Any] = {
            "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
            "videos": [],
            "annotations": [],
        }
        masks: dict[int, np.ndarray] = {}
        for v, length in enumerate(lengths):
            (root / "images" / f"v{v}").mkdir(parents=True)
            shown = np.zeros((instances, length, height, width), dtype=bool)
            for i in range(instances):
                for t in range(length):
                    if (v, i, t) not in absent:
                        shown[i, t, 2 + 8 * i : 8 + 8 * i, 3 + t : 15 + t + i] = True
                annotation_id = len(content["annotations"]) + 1
                masks[annotation_id] = shown[i]
                content["annotations"].append(
                    {
                        "id": annotation_id,
                        "video_id": v + 1,
                        "category_id": (3, 7)[i % 2],
                        "iscrowd": 0,
                        "segmentations": [encode(mask) if mask.any() else None for mask in shown[i]],
                    }
                )
            for t in range(length):
                gray = np.where(shown[:, t].any(0), 255, 2 * (20 * v + t)).astype(np.uint8)
                path = root / "images" / f"v{v}" / f"{t:05d}.jpg"
                write_jpeg(torch.from_numpy(gray).expand(3, -1, -1).contiguous(), str(path), quality=100)
            content["videos"].append(
                {
                    "id": v + 1,
                    "height": height,
                    "width": width,
                    "length": length,
                    "file_names": [f"v{v}/{t:05d}.jpg" for t in range(length)],
                }
            )
        dataset = TinyDataset(root / "annotations.json", root / "images", content, masks)
        dataset.write()
        return dataset

    return write
