"""One video: its frames, drawn and written, and the annotations of what is visible in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as run_length

from instanceformer.data.synthetic.instances import make_distractor, make_instances
from instanceformer.data.synthetic.motion import frame_times
from instanceformer.data.synthetic.options import SPLITS, SyntheticOptions
from instanceformer.data.synthetic.painting import draw, make_background
from instanceformer.data.writing import track_fields

JPEG_QUALITY = 92


@dataclass(frozen=True)
class Video:
    """A written video: its entry, its annotations without ids, which instances have look-alikes, (T,) frame flags."""

    entry: dict[str, Any]
    annotations: list[dict[str, Any]]
    look_alikes: list[bool]
    shown: NDArray[np.bool_]
    hidden: NDArray[np.bool_]


def make_video(directory: Path, options: SyntheticOptions, split: str, index: int) -> Video:
    """Draw one video and write its frames; it depends on nothing but the options, the split and the index.

    Args:
        directory: The dataset's; the frames go to ``JPEGImages/<split>_<index>`` in it, which must not exist yet.
        options: What the videos show.
        split: Name of the split, train or valid.
        index: Number of the video in its split.
    """
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    instances, groups = make_instances(rng, options)
    backdrop, shift = make_background(rng, options)
    blobs = [make_distractor(rng, options, shift) for _ in range(options.distractors)]
    gain = 1 + options.brightness_change * np.sin(
        rng.uniform(0, 2 * np.pi) + frame_times(options) * rng.uniform(0.1, 0.3)
    )

    name = f"{split}_{index:04d}"
    folder = directory / "JPEGImages" / name
    folder.mkdir(parents=True)
    size = {"height": options.height, "width": options.width, "length": options.length}
    annotations: list[dict[str, Any]] = [
        {
            "category_id": options.shapes.index(sprite.shape) + 1,
            "iscrowd": 0,
            **size,
            "segmentations": [],
            "occlusion": [],
        }
        for sprite in instances
    ]
    shown, hidden = np.zeros((2, options.length), dtype=np.bool_)
    for t in range(options.length):
        canvas = backdrop(t)
        for blob in blobs:
            draw(canvas, blob, t, options.texture)
        owner = np.full((options.width, options.height), -1, dtype=np.int16).T  # column by column, as run lengths go
        alone = np.zeros(len(instances), dtype=np.int64)  # area in the frame, as if no other instance were there
        for k, sprite in enumerate(instances):  # from back to front
            rows, columns, inside = draw(canvas, sprite, t, options.texture)
            owner[rows, columns][inside] = k
            alone[k] = inside.sum()
        pixels = np.rint(np.clip(canvas * (255 * float(gain[t])), 0, 255)).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{t:05d}.jpg", quality=JPEG_QUALITY)

        masks = run_length.encode((np.arange(len(instances))[:, None, None] == owner.T).view(np.uint8).T)
        areas = run_length.area(masks)
        shown[t], hidden[t] = (areas > 0).any(), (2 * areas < alone).any()
        for k, annotation in enumerate(annotations):
            visible = areas[k] > 0
            annotation["segmentations"].append(masks[k]["counts"] if visible else None)
            annotation["occlusion"].append(_occlusion_level(int(areas[k]), int(alone[k])) if visible else None)
    for annotation in annotations:
        annotation.update(track_fields(annotation["segmentations"], options.height, options.width))

    seen = [k for k, annotation in enumerate(annotations) if any(annotation["areas"])]
    files = [f"{name}/{t:05d}.jpg" for t in range(options.length)]
    return Video(
        entry={**size, "file_names": files},
        annotations=[annotations[k] for k in seen],
        look_alikes=[sum(groups[k] == groups[other] for other in seen) > 1 for k in seen],
        shown=shown,
        hidden=hidden,
    )


def _occlusion_level(visible: int, alone: int) -> str:
    """OVIS's name, out of three, for how much of an instance others hide; here, severe is more than half."""
    if visible == alone:
        return "no_occlusion"
    return "severe_occlusion" if 2 * visible < alone else "slight_occlusion"
