"""Compares the settings of a study, or single runs: means over seeds, and paired differences over resampled videos."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instanceformer.commands.parsing import nearest
from instanceformer.evaluation.evaluate import compare_files
from instanceformer.evaluation.ground_truth import GroundTruth, read_ground_truth
from instanceformer.evaluation.overlap import FloatArray
from instanceformer.evaluation.resampling import RESAMPLED, draw_videos, resample
from instanceformer.studies.run import Run, check_annotations, read_run
from instanceformer.studies.study import FILE, read_study

MAIN = ("AP", "AP50", "AP75", "AR10", "APso", "APmo", "APho", "HOTA", "IDF1", "IDSW")
"""Metrics that are compared unless others are asked for, as far as all runs have them."""

PROTOCOL = ("data.eval_size", "data.max_size", "precision", "model.inference.")
"""Beginnings of the settings that must be the same for metrics to be comparable, besides the annotations."""

COUNTS = ("IDSW",)
"""Metrics that are numbers of events rather than fractions."""

OF_A_SEED = ("seed_everything", "ckpt_path", "default_root_dir", "logger")
"""Options, of ``trainer`` or not, in which the runs of one setting may differ."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Group:
    """The finished runs of one setting.

    Attributes:
        name: of the setting, or the folder of the first run.
        options: what the study sets, by option; empty for runs without a study.
        runs: by seed, ascending; of runs without a configuration the seed is unknown, and counted from 0.
    """

    name: str
    options: dict[str, Any]
    runs: dict[int, Run]


@dataclass(frozen=True)
class Measured:
    """One metric of one setting.

    Attributes:
        values: of each run, by seed.
        interval: 95 % over resampled videos of the mean over seeds; None if the metric cannot be resampled.
        difference: from the baseline; None for the baseline itself.
        difference_interval: 95 % of it over resampled videos, the same ones for both settings.
        difference_deviation: standard deviation of the difference over the seeds that both have; None below two.
    """

    values: dict[int, float]
    interval: Interval | None
    difference: float | None = None
    difference_interval: Interval | None = None
    difference_deviation: float | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean([*self.values.values()]))

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds, of the population that they are drawn from; None for one seed."""
        return deviation([*self.values.values()])


@dataclass(frozen=True)
class Row:
    """One setting of a comparison: its runs, and what was measured, by metric."""

    group: Group
    metrics: dict[str, Measured]


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` finds.

    Attributes:
        rows: a row for each setting.
        metrics: names of the metrics, the most important first.
        baseline: name of the setting that the others' differences are from.
        videos: number of videos.
        resamples: number of resampled sets of videos.
        notes: what is missing, or to be kept in mind; a sentence each.
    """

    rows: list[Row]
    metrics: list[str]
    baseline: str
    videos: int
    resamples: int
    notes: list[str]


def compare(
    targets: Sequence[Path], baseline: str | None = None, metrics: Sequence[str] = (), resamples: int = 1000
) -> Comparison:
    """Compare the settings of a study, or runs.

    Args:
        targets: a study's file or folder, or the folders of runs; runs that differ in their seed alone are one setting.
        baseline: a setting's name, or the folder of one of its runs; None: the first setting.
        metrics: names such as AP or test/AP; empty: the study's and those of ``MAIN`` that all runs have.
        resamples: number of resampled sets of videos.

    Raises:
        FileNotFoundError: a folder is not that of a finished test.
        ValueError: runs were tested on other data or with another protocol, or a name is unknown.
    """
    if resamples < 1:
        raise ValueError(f"--resamples: found {resamples}, expected 1 or more")
    groups, notes, main = find_groups(targets)
    base = _find_baseline(groups, baseline)
    runs = [run for group in groups for run in group.runs.values()]
    check_comparable(runs, {option for group in groups for option in group.options})
    names = _find_metrics(runs, metrics, main)
    truth = _read_truth(runs)
    counts = draw_videos(len(truth.videos), resamples)
    resampled = {run.folder: _resample(run, truth, counts, names) for run in runs}
    for group in groups:
        if group.runs.keys() != base.runs.keys():
            both = group.runs.keys() & base.runs.keys()
            notes.append(
                f"{group.name} has {_seeds(group.runs)}, {base.name} has {_seeds(base.runs)}; the difference is of "
                + (_seeds(both) if both else "their means")
            )
    rows = [Row(group, {name: _measure(name, group, base, resampled) for name in names}) for group in groups]
    return Comparison(rows, names, base.name, len(truth.videos), resamples, notes)


def find_groups(targets: Sequence[Path]) -> tuple[list[Group], list[str], str]:
    """The settings of a study or among runs, notes of what a study lacks, and the metric that it is about.

    Raises:
        FileNotFoundError: a folder is not that of a finished test.
        ValueError: there is nothing to compare, or a study among others.
    """
    studies = [path for path in targets if path.is_file() or (path / FILE).is_file()]
    if not studies:
        return _group_runs([read_run(folder) for folder in targets]), [], MAIN[0]
    if len(targets) > 1:
        raise ValueError(f"{studies[0]}: found a study among others, expected one study, or the folders of runs")
    study = read_study(studies[0])
    groups: dict[str, Group] = {}
    notes: list[str] = []
    missing: dict[tuple[str, str], list[int]] = {}
    for trial in study.trials():
        group = groups.setdefault(trial.setting.name, Group(trial.setting.name, trial.setting.options, {}))
        if trial.state == "finished":
            group.runs[trial.seed] = read_run(trial.folder)
        elif trial.error:
            notes.append(f"{group.name}, seed {trial.seed}: {trial.state} ({trial.error}); left out")
        else:
            missing.setdefault((group.name, trial.state), []).append(trial.seed)
    notes += [f"{name}, {_seeds(seeds)}: {state}; left out" for (name, state), seeds in missing.items()]
    finished = [group for group in groups.values() if group.runs]
    if not finished:
        raise ValueError(
            f"{study.folder}: found no finished run, expected some; `instanceformer sweep {targets[0]}` makes them"
        )
    return finished, notes, study.plan.metric.partition("/")[2]


def _group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in their seed alone together, in the order in which they were given.

    Raises:
        ValueError: two runs have the same configuration and seed.
    """
    groups: dict[str, Group] = {}
    for run in runs:
        key = str(run.folder) if run.seed is None else _without_seed(run.config, run.seed)
        group = groups.setdefault(key, Group(str(run.folder), {}, {}))
        seed = run.seed or 0
        if seed in group.runs:
            raise ValueError(
                f"{run.folder}: found the same configuration and seed as in {group.runs[seed].folder}, expected runs "
                "that differ in something"
            )
        group.runs[seed] = run
    return [Group(group.name, {}, dict(sorted(group.runs.items()))) for group in groups.values()]


def _without_seed(config: Mapping[str, Any], seed: int) -> str:
    """A configuration as text, without what differs between seeds: also a 1 in init_from: runs/images_s1/last.ckpt."""
    trainer, model = (dict(config.get(name, {})) for name in ("trainer", "model"))
    model["init_from"] = re.sub(rf"(?<!\d){seed}(?!\d)", "SEED", str(model.get("init_from")))
    trainer = {key: value for key, value in trainer.items() if key not in OF_A_SEED}
    rest = {key: value for key, value in config.items() if key not in OF_A_SEED}
    return json.dumps({**rest, "trainer": trainer, "model": model}, sort_keys=True)


def _find_baseline(groups: Sequence[Group], name: str | None) -> Group:
    """The setting of a name or a folder.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return groups[0]
    for group in groups:
        if name == group.name or Path(name) in [run.folder for run in group.runs.values()]:
            return group
    known = [group.name for group in groups]
    raise ValueError(f"--baseline: found {name}, expected one of {', '.join(known)}{nearest(name, known)}")


def check_comparable(runs: Sequence[Run], varied: Collection[str] = ()) -> None:
    """Refuse runs whose metrics mean different things.

    Args:
        runs: the runs.
        varied: options that a study varies, which may differ.

    Raises:
        ValueError: two runs were tested on other annotations or under another protocol; the message says which.
    """
    first, *others = runs
    for run in others:
        for key in sorted(first.settings.keys() | run.settings.keys()):
            here, there = run.settings.get(key), first.settings.get(key)
            if here == there:
                continue
            if key == "annotations":
                raise ValueError(
                    f"{run.folder}: found a test on {run.annotations} (SHA-256 {str(here)[:8]}), expected that of "
                    f"{first.folder}, {first.annotations} ({str(there)[:8]}); test both on the same file"
                )
            if key.startswith(PROTOCOL) and key not in varied:
                raise ValueError(
                    f"{run.folder}: found a test with {key} {here}, expected {there} as in {first.folder}; test both "
                    f"with the same"
                )


def _find_metrics(runs: Sequence[Run], asked: Sequence[str], main: str) -> list[str]:
    """Names of the metrics to compare, without ``test/``; unless they are asked for, ``main`` first.

    Raises:
        ValueError: a metric is not known, or a run lacks it; or runs have none in common.
    """
    of_runs = [[name.removeprefix("test/") for name, value in run.metrics.items() if value >= 0] for run in runs]
    shared = set(of_runs[0]).intersection(*of_runs)
    asked = [name.removeprefix("test/") for name in asked]
    for name in asked:
        for run, names in zip(runs, of_runs, strict=True):
            if name not in names:
                raise ValueError(
                    f"--metrics: found {name}, which {run.folder} does not have; expected some of "
                    f"{', '.join(sorted(shared))}{nearest(name, shared)}"
                )
    found = list(dict.fromkeys(asked)) or [name for name in dict.fromkeys((main, *MAIN)) if name in shared]
    if not found:
        raise ValueError(f"{runs[0].folder}: found no metric that all runs have, expected AP; run test again")
    return found


def _read_truth(runs: Sequence[Run]) -> GroundTruth:
    """The annotations that all runs were tested on.

    Raises:
        FileNotFoundError: they are not where the first run has them.
        ValueError: they have changed since.
    """
    check_annotations(runs[0])
    return read_ground_truth(runs[0].annotations)


def _resample(run: Run, truth: GroundTruth, counts: FloatArray, names: Sequence[str]) -> dict[str, FloatArray]:
    """(1 + R,) values of those metrics that can be resampled; the first is that of the run.

    Raises:
        ValueError: the results are not of these videos, or not those that were measured.
    """
    compared, identities = compare_files(truth, run.results, identity=True)
    values = resample(truth, compared, identities, counts, [name for name in names if name in RESAMPLED])
    for name, of_sets in values.items():
        measured = run.metrics[f"test/{name}"]
        if not abs(of_sets[0] - measured) < 1e-4:
            raise ValueError(
                f"{run.results}: found results with {name} {of_sets[0]:.4f}, expected {measured:.4f} as measured by "
                "the test; run it again"
            )
    return values


def _measure(name: str, group: Group, base: Group, resampled: Mapping[Path, Mapping[str, FloatArray]]) -> Measured:
    """One metric of one setting, and its difference from the baseline."""

    def over_videos(group: Group, seeds: Collection[int]) -> FloatArray | None:
        chosen = [resampled[group.runs[seed].folder] for seed in seeds]
        return np.mean([values[name][1:] for values in chosen], axis=0) if name in chosen[0] else None

    values = {seed: run.metrics[f"test/{name}"] for seed, run in group.runs.items()}
    own = over_videos(group, group.runs)
    interval = None if own is None else _interval(own)
    if group is base:
        return Measured(values, interval)
    of_base = {seed: run.metrics[f"test/{name}"] for seed, run in base.runs.items()}
    both = [seed for seed in values if seed in of_base]
    ours, theirs = over_videos(group, both or values), over_videos(base, both or of_base)
    return Measured(
        values,
        interval,
        difference=float(np.mean([values[s] for s in both or values]) - np.mean([of_base[s] for s in both or of_base])),
        difference_interval=None if ours is None or theirs is None else _interval(ours - theirs),
        difference_deviation=deviation([values[seed] - of_base[seed] for seed in both]),
    )


def _interval(values: FloatArray) -> Interval | None:
    """The middle 95 %, of the sets in which the metric is defined."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, (2.5, 97.5)).tolist()
    return low, high


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the population that values are drawn from; None for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _seeds(seeds: Collection[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"


def show_mean(name: str, measured: Measured) -> str:
    """A mean and, with several seeds, its deviation."""
    around = "" if measured.deviation is None else f" ± {show_number(name, measured.deviation)}"
    return f"{show_number(name, measured.mean)}{around}"


def show_number(name: str, value: float, sign: str = "") -> str:
    """A value of a metric, with three digits unless it is a count; ``sign`` as in format strings."""
    return f"{value:{sign}.{1 if name in COUNTS else 3}f}"
