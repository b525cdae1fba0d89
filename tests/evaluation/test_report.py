import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from instanceformer.evaluation.decomposition import Decomposition
from instanceformer.evaluation.identity import IdentityMetrics
from instanceformer.evaluation.precision_recall import NAMES, VideoEvaluation
from instanceformer.evaluation.report import plot_identity, write_report

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


def test_identity_has_a_table_and_a_picture(tmp_path):
    groups = [Decomposition(0.5, 0.25, 0.125, 0.0, 0.125, 8), Decomposition(*[-1.0] * 5, pairs=0)]
    ages = dict(zip(("0-3", "4-7"), groups, strict=True))
    perfect = {"AP_identity": 0.7}
    identity = IdentityMetrics(0.5, 0.5, 0.5, 0.6, 0.35, 3, perfect, groups[0], {"no_occlusion": groups[0]}, ages)
    files = write_report(replace(evaluation([1]), identity=identity), tmp_path, {})
    assert [path.name for path in files[4:]] == ["identity.csv", "identity.png"]
    found = json.loads(files[0].read_text())["identity"]
    assert (found["HOTA"], found["IDSW"], found["captured"], found["AP_identity"]) == (0.5, 3, 0.25, 0.7)
    assert found["decomposition"]["age 0-3"]["lost"] == 0.125
    rows = read(files[4])
    assert [(row["group"], float(row["right"]), int(row["pairs"])) for row in rows] == [
        ("all", 0.5, 8),
        ("no_occlusion", 0.5, 8),
        ("age 0-3", 0.5, 8),
        ("age 4-7", -1, 0),
    ]
    with Image.open(files[5]) as picture:
        assert len(picture.getcolors(maxcolors=2**24)) > 10
    nothing = replace(identity, overall=groups[1], by_occlusion={}, by_age={"0-3": groups[1]})
    plot_identity(nothing).savefig(tmp_path / "nothing.png")


@pytest.mark.parametrize("categories", [0, 1, 500])
def test_draws_any_number_of_categories(tmp_path, categories):
    path = write_report(evaluation(list(range(10, 10 + categories))), tmp_path, {})[-1]
    with Image.open(path) as picture:
        assert max(picture.size) < 4000
