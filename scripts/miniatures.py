"""Miniatures of the datasets, each laid out and written as its archive has it.

    python scripts/miniatures.py FOLDER [--size 64 96]

makes ``coco``, ``ytvis19``, ``ytvis21``, ``ytvis22``, ``ovis``, ``davis-mini``, ``demo`` and ``mine`` in FOLDER: a few
frames of noise with rectangles that move, under the official categories. Each has a video of another size, one without
any instance, a crowd, an instance that enters late and one that is hidden for a while. What the archives
have besides (dates, licenses, links) is there as well, and so is what sets them apart: run lengths as lists or as text,
polygons, OVIS's ``length`` of 1, its areas of boxes and its labels of occlusion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from instanceformer.data.annotations import Category
from instanceformer.data.catalog import CATALOG
from instanceformer.data.synthetic import SyntheticOptions, synthesize

FRAMES = 5
LEVELS = ("no_occlusion", "slight_occlusion", "severe_occlusion")
DAVIS = tuple(
    Category(id_, name) for id_, name in enumerate(("bird", "camel", "car", "cow", "dog", "goat", "person"), start=1)
)
MINE = tuple(Category(id_, f"kind {id_}") for id_ in range(1, 13))

Track = list[np.ndarray]
"""(H, W) bool masks of one instance, one for each frame."""


@dataclass(frozen=True)
class Clip:
    """A video that was made up.

    Attributes:
        height: in pixels.
        width: in pixels.
        tracks: instances; the last of more than one is a crowd.
    """

    height: int
    width: int
    tracks: list[Track]

    def paint(self, t: int, rng: np.random.Generator) -> Image.Image:
        """Frame t: noise, and a brightness for each instance."""
        pixels = rng.integers(0, 80, (self.height, self.width, 3), dtype=np.uint8)
        for i, track in enumerate(self.tracks):
            pixels[track[t]] = (250, 60 * i % 250, 250 - 60 * i % 250)
        return Image.fromarray(pixels)


def make_clips(size: tuple[int, int], frames: int = FRAMES) -> Iterator[Clip]:
    """Three videos of one size, the last without any instance, and one of another size."""
    for height, width, count in ((*size, 3), (size[1], size[0], 2), (*size, 2), (*size, 0)):
        tracks = [
            [_rectangle(height, width, i, t, shown=not (i == 1 and t < 2) and (i, t) != (0, 1)) for t in range(frames)]
            for i in range(count)
        ]
        yield Clip(height, width, tracks)


def _rectangle(height: int, width: int, i: int, t: int, shown: bool) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    if shown:
        top, left = height * (1 + i) // 6, width * (1 + i) // 6 + t * width // 24
        mask[top : top + height // 3, left : left + width // 4] = True
    return mask


def count_list(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths as a list of numbers, column by column, from zeros on."""
    runs = [(value, len(list(run))) for value, run in groupby(mask.ravel(order="F").tolist())]
    return {"counts": [0] * bool(runs[0][0]) + [length for _, length in runs], "size": list(mask.shape)}


def count_text(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths as pycocotools writes them."""
    code = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": code["counts"].decode(), "size": list(mask.shape)}


def box(mask: np.ndarray) -> list[float]:
    """[x, y, width, height]."""
    ys, xs = np.nonzero(mask)
    return [float(xs.min()), float(ys.min()), float(np.ptp(xs) + 1), float(np.ptp(ys) + 1)]


def write_json(path: Path, content: object) -> None:
    """Write a file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_videos(
    annotations: Path,
    images: Path,
    categories: tuple[Category, ...],
    clips: list[Clip],
    *,
    frame_name: str = "{t:05d}.jpg",
    encode: Callable[[np.ndarray], dict[str, Any]] = count_list,
    annotated: bool = True,
    ovis: bool = False,
) -> None:
    """Write a split in the format of YouTube-VIS.

    Args:
        annotations: file to write.
        images: folder of the videos' folders.
        categories: all of them.
        clips: the videos.
        frame_name: of a frame, by its number t.
        encode: run lengths of a mask.
        annotated: whether the instances are written.
        ovis: whether areas are those of boxes, and each frame has its level of occlusion.
    """
    rng = np.random.default_rng(len(clips))
    content: dict[str, Any] = {
        "info": {"description": "a miniature", "year": 2019},
        "licenses": [{"id": 1, "name": "none", "url": ""}],
        "categories": [{"supercategory": "object", "id": c.id, "name": c.name} for c in categories],
        "videos": [],
    }
    objects: list[dict[str, Any]] = []
    for video_id, clip in enumerate(clips, start=1):
        length = max((len(track) for track in clip.tracks), default=FRAMES)
        names = [f"{video_id:08x}/{frame_name.format(t=t)}" for t in range(length)]
        for t, name in enumerate(names):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            clip.paint(t, rng).save(images / name, quality=90)
        size = {"height": clip.height, "width": clip.width}
        about = {"date_captured": "2019-04-11", "license": 1, "flickr_url": "", "coco_url": ""}
        content["videos"].append({"id": video_id, **size, "length": length, "file_names": names, **about})
        for i, track in enumerate(clip.tracks):
            boxes = [box(mask) if mask.any() else None for mask in track]
            areas = [b[2] * b[3] if ovis and b else float(m.sum()) or None for m, b in zip(track, boxes, strict=True)]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "video_id": video_id,
                    "category_id": categories[(video_id + i) % len(categories)].id,
                    "iscrowd": int(i > 1),
                    **size,
                    "length": 1,
                    "segmentations": [encode(mask) if mask.any() else None for mask in track],
                    "bboxes": boxes,
                    "areas": areas,
                }
            )
            if ovis:
                objects[-1]["occlusion"] = [LEVELS[(i + t) % 3] if b else None for t, b in enumerate(boxes)]
    if annotated:
        content["annotations"] = objects
    write_json(annotations, content)


def write_coco(root: Path, size: tuple[int, int]) -> None:
    """COCO 2017: polygons, a crowd's run lengths as a list, images of several sizes, one without any instance."""
    categories = CATALOG["coco"].categories
    for split, count in (("train2017", 12), ("val2017", 4)):
        rng = np.random.default_rng(count)
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for image_id in range(1, count + 1):
            height, width = size if image_id % 3 else (size[1], size[0])
            name = f"{image_id:012d}.jpg"
            tracks = [[_rectangle(height, width, i, 0, shown=True)] for i in range(image_id % 4)]
            clip = Clip(height, width, tracks)
            (root / split).mkdir(parents=True, exist_ok=True)
            clip.paint(0, rng).save(root / split / name, quality=90)
            images.append({"id": image_id, "file_name": name, "height": height, "width": width, "license": 1})
            for i, (mask,) in enumerate(tracks):
                x, y, w, h = box(mask)
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": image_id,
                        "category_id": categories[0 if i == 0 else (7 * image_id + i) % len(categories)].id,
                        "iscrowd": int(i == 2),
                        "segmentation": count_list(mask) if i == 2 else [polygon],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                    }
                )
        named = [{"supercategory": "thing", "id": c.id, "name": c.name} for c in categories]
        content = {"info": {}, "licenses": [], "images": images, "annotations": objects, "categories": named}
        write_json(root / "annotations" / f"instances_{split}.json", content)


def write_miniatures(root: Path, size: tuple[int, int] = (64, 96)) -> None:
    """Write all of them into folders of ``root``; frames are (height, width) pixels large, some (width, height)."""
    clips = list(make_clips(size))
    write_coco(root / "coco", size)
    for name, file in (("ytvis19", "{}.json"), ("ytvis21", "{}/instances.json"), ("ytvis22", "{}.json")):
        for split in ("train", "valid"):
            write_videos(
                root / name / file.format(split),
                root / name / split / "JPEGImages",
                CATALOG[name].categories,
                clips if split == "train" else clips[:2],
                annotated=split == "train",
            )
    ovis, categories = root / "ovis", CATALOG["ovis"].categories
    for split in ("train", "valid"):
        write_videos(
            ovis / f"annotations_{split}.json",
            ovis / split,
            categories,
            clips if split == "train" else clips[:2],
            frame_name="img_{t:07d}.jpg",
            encode=count_text,
            annotated=split == "train",
            ovis=True,
        )
    divide(ovis / "annotations_train.json", kept=ovis / "kept.json", held_out=ovis / "held_out.json")
    for name, kinds in (("davis-mini", DAVIS), ("mine", MINE)):
        write_videos(root / name / "all.json", root / name / "JPEGImages", kinds, clips * 2, encode=count_text)
        divide(root / name / "all.json", kept=root / name / "train.json", held_out=root / name / "valid.json")
    synthesize(
        root / "demo",
        SyntheticOptions(train_videos=4, valid_videos=2, length=10, height=size[0], width=size[1], workers=1),
        overwrite=True,
    )


def divide(annotations: Path, kept: Path, held_out: Path) -> None:
    """Divide an annotation file into one of its odd videos and one of the others."""
    content = json.loads(annotations.read_text())
    for path, rest in ((kept, 1), (held_out, 0)):
        videos = [video for video in content["videos"] if video["id"] % 2 == rest]
        ids = {video["id"] for video in videos}
        objects = [a for a in content["annotations"] if a["video_id"] in ids]
        write_json(path, {**content, "videos": videos, "annotations": objects})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the datasets' folders")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"), help="of a frame")
    options = parser.parse_args()
    write_miniatures(options.folder, tuple(options.size))


if __name__ == "__main__":
    main()
