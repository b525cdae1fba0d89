"""No malformed file gives a bare traceback or a wrong number: a message that names the file, or something sound."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from tests.broken import broken, broken_text

from instanceformer.data.annotations import VideoDataset
from instanceformer.data.formats.validation import check_dataset
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.results import read_results

HEIGHT, WIDTH = 4, 6
POLYGON = [[0.0, 0.0, 4.0, 0.0, 4.0, 4.0]]
RUNS = {"size": [HEIGHT, WIDTH], "counts": [2, 5, 17]}
TEXT = mask_utils.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))["counts"].decode()
COMPRESSED = {"size": [HEIGHT, WIDTH], "counts": TEXT}
CATEGORIES = [{"id": 1, "name": "one"}, {"id": 0, "name": "zero"}]

YOUTUBE_VIS: dict[str, Any] = {
    "categories": CATEGORIES,
    "videos": [
        {
            "id": v,
            "height": HEIGHT,
            "width": float(WIDTH),
            "length": 3,
            "file_names": [f"{v}/{t}.jpg" for t in range(3)],
        }
        for v in (0, 1)
    ],
    "annotations": [
        {
            "id": i,
            "video_id": i % 2,
            "category_id": i // 2 % 2,
            "iscrowd": i // 3,
            "segmentations": [COMPRESSED, (RUNS, None)[i % 2], POLYGON],
            "areas": [4, (5, None)[i % 2], 8.0],
            "bboxes": [[0, 0, 4, 4], ([0, 0, 2, 4], None)[i % 2], [0, 0, 4, 4]],
            "occlusion": ["no_occlusion", ("slight_occlusion", None)[i % 2], "severe_occlusion"],
        }
        for i in range(4)
    ],
}
COCO: dict[str, Any] = {
    "categories": CATEGORIES,
    "images": [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in (0, 1)],
    "annotations": [
        {"id": i, "image_id": i % 2, "category_id": 1, "iscrowd": 0, "segmentation": mask, "area": 4.0}
        for i, mask in enumerate([POLYGON, RUNS, COMPRESSED])
    ],
}
RESULTS: list[dict[str, Any]] = [
    {"video_id": v, "category_id": c, "score": score, "segmentations": [COMPRESSED, None, COMPRESSED]}
    for v, c, score in [(0, 1, 0.9), (1, 0, 1), (1, 1, 0.5)]
]

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def or_message(read: Callable[[Path], Any], path: Path) -> Any:
    """What ``read`` makes of the file; None where it refuses it with a message that begins with its name."""
    try:
        return read(path)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    return None


def assert_sound(dataset: VideoDataset) -> None:
    categories = {category.id for category in dataset.categories}
    assert len({video.id for video in dataset.videos}) == len(dataset.videos)
    for video in dataset.videos:
        assert video.length == (len(video.file_names) or video.length) > 0
        for instance in video.instances:
            assert instance.category_id in categories
            assert len(instance.segmentations) == video.length
            for counts in filter(None, instance.segmentations):
                assert video.height * video.width < 10**6  # as every mask here has this size
                mask = mask_utils.decode({"size": [video.height, video.width], "counts": counts})
                again = mask_utils.encode(mask)["counts"]
                assert mask.any()
                assert (mask_utils.decode({"size": [video.height, video.width], "counts": again}) == mask).all()


@many
@given(content=st.one_of(broken(YOUTUBE_VIS), broken(COCO)))
def test_annotations_with_wrong_values(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    dataset = or_message(read_annotations, path)
    if dataset is not None:
        assert_sound(dataset)
    report = or_message(check_dataset, path)
    if dataset is not None:
        assert report is not None
        kinds = {finding.kind for finding in report.findings if finding.severity == "error"}
        assert kinds <= {"unknown level of occlusion", "area larger than the frame"}  # which only evaluation minds
    elif report is not None:
        assert not report.is_sound  # what cannot be used has an error


@many
@given(text=st.one_of(broken_text(YOUTUBE_VIS), broken_text(COCO), st.binary(max_size=40)))
def test_annotations_that_are_cut_or_garbled(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(text)
    dataset = or_message(read_annotations, path)
    if dataset is not None:
        assert_sound(dataset)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(YOUTUBE_VIS))
    return path


@many
@given(text=st.one_of(broken(RESULTS).map(lambda content: json.dumps(content).encode()), broken_text(RESULTS)))
def test_results_of_every_kind(truth: Path, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(text)
    tracks = or_message(read_results, path)
    evaluation = or_message(lambda path: evaluate_files(truth, path), path)
    if evaluation is not None:
        assert tracks is not None
        assert all(value == -1 or 0 <= value <= 1 for value in evaluation.summary.values())


@many
@given(content=broken(YOUTUBE_VIS))
def test_evaluation_against_wrong_ground_truth(tmp_path: Path, content: Any) -> None:
    (truth := tmp_path / "truth.json").write_text(json.dumps(content))
    (results := tmp_path / "results.json").write_text("[]")
    evaluation = or_message(lambda truth: evaluate_files(truth, results), truth)
    if evaluation is not None:
        assert all(value in (-1, 0) for value in evaluation.summary.values())  # nothing is found


@pytest.mark.parametrize("depth", [900, 100_000])
def test_lists_in_lists_without_end(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * depth + "]" * depth)
    for read in (read_annotations, read_results):
        with pytest.raises(ValueError, match=r"deep\.json: "):
            read(path)
    path.write_text(json.dumps(YOUTUBE_VIS).replace('"counts": [2, 5, 17]', '"counts": ' + "[" * depth + "]" * depth))
    with pytest.raises(ValueError, match=r"deep\.json: "):
        read_annotations(path)


@pytest.mark.parametrize("value", [10**1000, 2**63, -(2**63) - 1, 1e300])
def test_ids_beyond_64_bits(tmp_path: Path, value: float) -> None:
    path = tmp_path / "file.json"
    for content, keys in (
        (YOUTUBE_VIS, ("videos", 0, "id")),
        (YOUTUBE_VIS, ("categories", 0, "id")),
        (YOUTUBE_VIS, ("annotations", 0, "id")),
        (COCO, ("images", 0, "id")),
        (RESULTS, (0, "video_id")),
        (RESULTS, (0, "category_id")),
    ):
        changed: Any = copy.deepcopy(content)
        owner = changed
        for key in keys[:-1]:
            owner = owner[key]
        owner[keys[-1]] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=r"file\.json: .*(id: expected|, expected) a whole number of at most 64 bits"
        ):
            (read_results if content is RESULTS else read_annotations)(path)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text("")
    for read in (read_annotations, read_results):
        with pytest.raises(ValueError, match=r"empty\.json: not .*JSON"):
            read(path)
