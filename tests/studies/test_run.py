from __future__ import annotations

import json
from pathlib import Path

import pytest

from instanceformer.studies.run import read_run
from instanceformer.training.callbacks import MetricsFile

METRICS = {
    "metrics": {"test/AP": 0.5},
    "run": {"weights": "12ab", "data.eval_size": "96"},
    "files": {"annotations": "data/valid.json", "images": "data/JPEGImages"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text("[]")
    (folder / "results.metrics.json").write_text(json.dumps(METRICS))
    (folder / "config.yaml").write_text("seed_everything: 3\nmodel: {network: {dim: 96}}\n")
    return folder


def test_a_run_is_what_its_folder_holds(folder: Path) -> None:
    run = read_run(folder)
    assert run.metrics == {"test/AP": 0.5}
    assert run.settings == METRICS["run"]
    assert (run.annotations, run.images) == (Path("data/valid.json"), Path("data/JPEGImages"))
    assert run.results == folder / "results.json"
    assert run.config["model"] == {"network": {"dim": 96}}
    assert run.seed == 3
    assert run.curves() == {}


def test_a_run_that_was_only_tested_has_no_configuration(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    run = read_run(folder)
    assert (run.config, run.seed) == ({}, None)


def test_curves_have_the_steps_at_which_something_was_logged(folder: Path) -> None:
    logger = MetricsFile(folder)
    for step in range(3):
        logger.log_metrics({"train/loss": 3.0 - step}, step)
    logger.log_metrics({"val/AP": 0.25}, 1)
    with logger.path.open("a") as file:
        file.write("4,0.")  # a kill in the middle of a row
    assert read_run(folder).curves() == {"train/loss": ([0, 1, 2], [3.0, 2.0, 1.0]), "val/AP": ([1], [0.25])}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.metrics.json", None, r"run: found no results\.metrics\.json, expected .*; run `instanceformer test"),
        ("results.metrics.json", "{", r"results\.metrics\.json: not valid JSON"),
        ("results.metrics.json", '{"metrics": {}}', r"found other content than `instanceformer test` writes"),
        ("results.metrics.json", "[]", r"found other content than `instanceformer test` writes"),
        ("results.json", None, r"results\.json: no such file; expected the results file of a finished"),
        ("config.yaml", "some words", r"config\.yaml: found no options in YAML"),
    ],
)
def test_a_folder_without_results_is_refused_in_one_line(
    folder: Path, name: str, content: str | None, message: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: found no such folder, expected that of a finished run"):
        read_run(tmp_path / "nowhere")
