import csv
import json

import numpy as np
import pytest
from PIL import Image

from instanceformer.evaluation.report import write_report
from instanceformer.evaluation.summary import NAMES, VideoEvaluation

RECALLS = [f"{recall:.2f}" for recall in np.linspace(0, 1, 101)]


def evaluation(ids: list[int]) -> VideoEvaluation:
    numbers = dict.fromkeys(NAMES, 0.25)
    precision = {id_: np.outer(np.linspace(1, 0.1, 10), np.linspace(1, 0, 101)) for id_ in ids}
    per_category = {7: dict.fromkeys(NAMES, -1.0)} | {id_: numbers | {"AP": 0.1 * id_} for id_ in ids}
    return VideoEvaluation(numbers, {"APso": 0.5}, per_category, precision)


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_numbers_tables_and_a_picture(tmp_path):
    files = write_report(evaluation([1, 4]), tmp_path / "new" / "report", {1: "cat, small", 4: "dog", 7: "unused"})
    assert [path.name for path in files] == [
        "metrics.json",
        "per_category.csv",
        "precision_recall.csv",
        "precision_recall.png",
    ]
    metrics = json.loads(files[0].read_text())
    assert metrics.keys() == {*NAMES, "APso", "per_category"}
    assert metrics["per_category"]["7"]["AP"] == -1

    rows = read(files[1])
    assert [(row["category_id"], row["name"], float(row["AP"])) for row in rows] == [
        ("1", "cat, small", 0.1),
        ("4", "dog", 0.4),
    ]
    curves = read(files[2])
    assert [row["iou_threshold"] for row in curves[:10]] == [f"{0.5 + 0.05 * i:.2f}" for i in range(10)]
    assert len(curves) == 20
    assert [float(curves[9][recall]) for recall in RECALLS] == pytest.approx(0.1 * np.linspace(1, 0, 101), abs=1e-6)
    with Image.open(files[3]) as picture:
        assert min(picture.size) > 400
        assert len(picture.getcolors(maxcolors=2**24)) > 10


@pytest.mark.parametrize("categories", [0, 1, 500])
def test_draws_any_number_of_categories(tmp_path, categories):
    path = write_report(evaluation(list(range(10, 10 + categories))), tmp_path, {})[-1]
    with Image.open(path) as picture:
        assert max(picture.size) < 4000
