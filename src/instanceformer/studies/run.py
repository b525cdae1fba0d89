"""The folder of a finished run: what was measured, on what, with which configuration, and how the training went."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from instanceformer.data.formats.records import expect_file, load_json
from instanceformer.evaluation.results import metrics_path
from instanceformer.files import hash_file


@dataclass(frozen=True)
class Run:
    """A run that has been tested.

    Attributes:
        folder: the trainer's ``default_root_dir``.
        metrics: what ``test`` measured, by name, such as ``test/AP``.
        settings: what the results depend on, by name, as text: see ``training.callbacks.describe_run``.
        annotations: annotation file of the test videos, as given: a relative path starts where the run was started.
        images: folder of their frames, likewise.
        config: the whole configuration of the training; empty if the folder holds none.
    """

    folder: Path
    metrics: dict[str, float]
    settings: dict[str, str]
    annotations: Path
    images: Path
    config: dict[str, Any] = field(repr=False)

    @property
    def results(self) -> Path:
        """The result file of the test videos, in YouTube-VIS format."""
        return self.folder / "results.json"

    @property
    def seed(self) -> int | None:
        """The training's seed; None if the folder holds no configuration."""
        seed = self.config.get("seed_everything")
        return None if seed is None else int(seed)

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """The steps and values at which each metric of ``metrics.csv`` was logged, by name; empty without the file."""
        return read_curves(self.folder)


def read_curves(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The same of a run's folder, also while the training goes on."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    path = folder / "metrics.csv"
    if not path.is_file():
        return curves
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values():  # the last row, cut off by a kill
                continue
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(float(value))
    return curves


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: there is no such folder, or the run has not been tested on annotated videos.
        ValueError: a file is not what ``fit`` and ``test`` write.
    """
    results = folder / "results.json"
    measured, config = metrics_path(results), folder / "config.yaml"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: found no such folder, expected that of a finished run")
    if not measured.is_file():
        raise FileNotFoundError(
            f"{folder}: found no {measured.name}, expected the folder of a finished `instanceformer test` on annotated "
            f"videos; run `instanceformer test --config {config}`"
        )
    expect_file(results, "the results file of a finished `instanceformer test`")
    content: Any = load_json(measured)
    try:
        metrics = {str(name): float(value) for name, value in content["metrics"].items()}
        settings = {str(name): str(value) for name, value in content["run"].items()}
        annotations, images = Path(content["files"]["annotations"]), Path(content["files"]["images"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{measured}: found other content than `instanceformer test` writes ({error!r}); run it again"
        ) from error
    given = yaml.safe_load(config.read_text()) if config.is_file() else {}
    if not isinstance(given, dict):
        raise ValueError(f"{config}: found no options in YAML, expected the configuration of a training")
    return Run(folder, metrics, settings, annotations, images, given)


def check_annotations(run: Run) -> None:
    """Refuse a run whose annotations are not the ones that it was tested on.

    Raises:
        FileNotFoundError: they are not where the run has them.
        ValueError: they have changed since.
    """
    expect_file(run.annotations, f"the annotations that {run.folder} was tested on; start where that test was started")
    if hash_file(run.annotations) != run.settings.get("annotations"):
        raise ValueError(
            f"{run.annotations}: found other annotations than {run.folder} was tested on, expected the same file; run "
            "the test again"
        )
