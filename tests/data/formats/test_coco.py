from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instanceformer.data.annotations import Category
from instanceformer.data.formats.youtube_vis import read_annotations

SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]


def coco() -> dict[str, Any]:
    """Two images: a polygon and a crowd of uncompressed runs in the first, nothing in the second."""
    crowd = {"size": [24, 40], "counts": [24 * 30, 24, 24 * 9]}
    return {
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "images": [
            {"id": 139, "file_name": "000000000139.jpg", "height": 24, "width": 40},
            {"id": 285, "file_name": "000000000285.jpg", "height": 30, "width": 20},
        ],
        "annotations": [
            {"id": 5, "image_id": 139, "category_id": 18, "iscrowd": 0, "segmentation": [SQUARE], "area": 100.0},
            {"id": 9, "image_id": 139, "category_id": 1, "iscrowd": 1, "segmentation": crowd},
        ],
    }


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_images_are_videos_of_one_frame(tmp_path: Path) -> None:
    dataset = read_annotations(write(tmp_path, coco()))
    assert dataset.categories == (Category(1, "person"), Category(18, "dog"))
    first, second = dataset.videos
    assert (first.id, first.length, first.height, first.width) == (139, 1, 24, 40)
    assert first.file_names == ("000000000139.jpg",)
    assert second.instances == ()
    assert [(i.id, i.category_id, i.is_crowd) for i in first.instances] == [(5, 18, False), (9, 1, True)]
    square, column = np.zeros((2, 24, 40), dtype=bool)
    square[5:15, 10:20] = True
    column[:, 30] = True
    masks = first.decode_masks(first.instances, [0])
    assert np.array_equal(masks[0].numpy(), [square, column])


def test_a_polygon_without_pixels_is_not_visible(tmp_path: Path) -> None:
    content = coco()
    content["annotations"][0]["segmentation"] = [[10, 5, 10, 5, 10, 5]]
    (video, _) = read_annotations(write(tmp_path, content)).videos
    assert video.instances[0].segmentations == (None,)


@pytest.mark.parametrize(
    ("key", "index", "field", "value", "message"),
    [
        ("images", 1, "id", 139, r"images\[1\]\.id: expected an id of its own, found 139"),
        ("images", 1, "file_name", None, r"images\[1\]\.file_name: expected a string, found nothing"),
        ("annotations", 0, "image_id", 1, r"annotations\[0\]\.image_id: .* images, found 1"),
        ("annotations", 1, "category_id", 2, r"annotations\[1\]\.category_id: .* categories, found 2"),
        ("annotations", 1, "iscrowd", 2, r"annotations\[1\]\.iscrowd: expected 0 or 1, found 2"),
        ("annotations", 0, "segmentation", [[1, 2, 3]], r"annotations\[0\]\.segmentation: expected polygons"),
    ],
)
def test_errors_name_their_place(tmp_path: Path, key: str, index: int, field: str, value: Any, message: str) -> None:
    content = coco()
    content[key][index][field] = value
    with pytest.raises(ValueError, match=rf"instances\.json: {message}"):
        read_annotations(write(tmp_path, content))
