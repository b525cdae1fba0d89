"""A study: one file that says which runs to make; the settings, command lines and folders that follow from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from instanceformer.commands.parsing import Parser, nearest, pick
from instanceformer.evaluation.decomposition import STATES
from instanceformer.evaluation.precision_recall import NAMES, OCCLUSION
from instanceformer.evaluation.resampling import TRACKING

FOLDER = Path("runs/studies")
"""Where the folders of studies are unless told otherwise."""

FILE = "study.yaml"
"""Name of the copy of a study's file in its folder."""

OUTCOME = "trial.json"
"""Name of the file in a run's folder that says how it ended."""

LOGGED = (*NAMES, *OCCLUSION)
METRICS = (
    *(f"val/{name}" for name in LOGGED),
    *(f"test/{name}" for name in (*LOGGED, *TRACKING, *STATES)),
)
"""What a study can compare its runs by."""


@dataclass(frozen=True)
class Range:
    """Numbers from which a sampler chooses.

    Attributes:
        low: the smallest.
        high: the largest; whole numbers are chosen if both are whole.
        log: whether to choose by the logarithm.
        step: distance between two neighbors; None: 1 for whole numbers, any for others.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None


@dataclass(frozen=True)
class Plan:
    """What a study's file says. Options are spelled as flags of ``fit`` without dashes: model.network.memory_frames.

    Attributes:
        base: arguments of ``fit`` that all runs have; {STAGE} stands for the folder of a stage.
        seeds: each setting is run with every one, as --seed_everything.
        metric: what settings are compared by: val/AP, test/AP, ...
        direction: whether more of it is better.
        stages: trainings that come first, by name, as arguments of ``fit``; one for each seed, shared by all runs.
        test: whether ``test`` follows ``fit``; a list: further arguments that it has.
        grid: values of options; every combination is a setting.
        settings: options of each setting, by the setting's name.
        search: values or a range of options, from which a sampler chooses.
        trials: number of settings that the sampler chooses.
        sampler: how it chooses: tpe (by what was measured before) or random.
        pruning: whether a run is ended early if its val/... metric is below the median of the others at that step.
    """

    base: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    metric: str = "test/AP"
    direction: Literal["maximize", "minimize"] = "maximize"
    stages: dict[str, list[str]] = field(default_factory=dict)
    test: bool | list[str] = True
    grid: dict[str, list[Any]] | None = None
    settings: dict[str, dict[str, Any]] | None = None
    search: dict[str, Range | list[Any]] | None = None
    trials: int = 20
    sampler: Literal["tpe", "random"] = "tpe"
    pruning: bool = False


@dataclass(frozen=True)
class Setting:
    """One choice of the parameters.

    Attributes:
        name: what it is called; also the name of its folder.
        options: values by option.
    """

    name: str
    options: dict[str, Any]

    @staticmethod
    def of(options: dict[str, Any]) -> Setting:
        """A setting that is named by its options, such as ``memory_frames=2,memory_tokens=5``."""
        leaves = [option.rpartition(".")[2] for option in options]
        names = leaves if len(set(leaves)) == len(leaves) else list(options)
        pairs = zip(names, options.values(), strict=True)
        return Setting(_file_safe(",".join(f"{name}={_as_text(value)}" for name, value in pairs)), options)

    @property
    def flags(self) -> list[str]:
        """Its options as arguments of ``fit``."""
        return [f"--{option}={_as_text(value)}" for option, value in self.options.items()]


@dataclass(frozen=True)
class Trial:
    """A run of a study: a setting with a seed.

    Attributes:
        setting: what is set.
        seed: of its training.
        folder: of its run.
        state: how it ended; "unfinished" until it has.
        value: of the study's metric; None unless the run has finished.
        error: what a failed run said last.
    """

    setting: Setting
    seed: int
    folder: Path
    state: Literal["unfinished", "finished", "failed", "pruned"] = "unfinished"
    value: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Study:
    """A study and its folder.

    Attributes:
        name: of its file.
        folder: for all that its runs write.
        plan: what its file says.
    """

    name: str
    folder: Path
    plan: Plan

    @property
    def settings(self) -> list[Setting]:
        """All settings of a grid or a list; none of a search, whose sampler chooses them."""
        plan = self.plan
        if plan.grid is not None:
            return [Setting.of(dict(zip(plan.grid, values, strict=True))) for values in product(*plan.grid.values())]
        return [Setting(_file_safe(name), options) for name, options in (plan.settings or {}).items()]

    def trial(self, setting: Setting, seed: int) -> Trial:
        """A run, and how it ended."""
        folder = self.folder / "trials" / setting.name / f"seed{seed}"
        outcome = folder / OUTCOME
        return Trial(setting, seed, folder, **(json.loads(outcome.read_text())["outcome"] if outcome.is_file() else {}))

    def trials(self) -> list[Trial]:
        """All runs; of a search those that have been begun. Settings are in order, seeds in order within them."""
        settings = self.settings
        if self.plan.search is not None:
            outcomes = sorted(self.folder.glob(f"trials/*/*/{OUTCOME}"), key=lambda path: path.stat().st_mtime)
            found = {path.parts[-3]: json.loads(path.read_text())["options"] for path in outcomes}
            settings = [Setting(name, options) for name, options in found.items()]
        return [self.trial(setting, seed) for setting in settings for seed in self.plan.seeds]

    def stage_folder(self, stage: str, seed: int) -> Path:
        """The folder of a training that runs share."""
        return self.folder / "stages" / stage / f"seed{seed}"

    def stages_of(self, trial: Trial) -> list[str]:
        """The stages that a run needs, in the order of the file."""
        needed: set[str] = set()
        arguments = [*self.plan.base, *trial.setting.flags]
        for stage in reversed(self.plan.stages):
            if any(f"{{{stage}}}" in argument for argument in arguments):
                needed.add(stage)
                arguments += self.plan.stages[stage]
        return [stage for stage in self.plan.stages if stage in needed]

    def stage_command(self, stage: str, seed: int) -> list[str]:
        """Arguments of ``instanceformer`` that make a stage."""
        return ["fit", *self._placed(self.plan.stages[stage], seed, self.stage_folder(stage, seed))]

    def fit_command(self, trial: Trial) -> list[str]:
        """Arguments of ``instanceformer`` that train a run."""
        return ["fit", *self._placed([*self.plan.base, *trial.setting.flags], trial.seed, trial.folder)]

    def test_command(self, trial: Trial) -> list[str] | None:
        """Arguments of ``instanceformer`` that test a run; None if the study has no tests."""
        if self.plan.test is False:
            return None
        extra = self.plan.test if isinstance(self.plan.test, list) else []
        return ["test", *self._placed([*self.plan.base, *trial.setting.flags], trial.seed, trial.folder), *extra]

    def _placed(self, arguments: list[str], seed: int, folder: Path) -> Iterator[str]:
        """Arguments with the folders of stages, and a seed and a folder of their own."""
        for argument in arguments:
            for stage in self.plan.stages:
                argument = argument.replace(f"{{{stage}}}", str(self.stage_folder(stage, seed)))
            yield argument
        yield from (f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}")


def read_study(path: Path, folder: Path | None = None) -> Study:
    """Read a study's file.

    Args:
        path: the file, or the folder of a study that has begun.
        folder: for what the runs write; None: that of the study, ``runs/studies/NAME`` for a new one.

    Raises:
        FileNotFoundError: there is no such file, or the folder is not that of a study.
        ValueError: the file does not describe a study; the message names the key.
        SystemExit: a key is unknown or a value has the wrong type; one line, code 2.
    """
    if path.is_dir():
        path, folder = path / FILE, path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected that of a study")
    folder = folder or FOLDER / path.stem
    parser = Parser(prog="instanceformer sweep")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Plan)
    plan = pick(Plan, parser.instantiate(parser.parse_args([f"--config={path}"])))
    study = Study(folder.name, folder, plan)
    if problem := next(_problems(study), None):
        raise ValueError(f"{path}: {problem}")
    return study


def check_same(ours: Plan, theirs: dict[str, Any], where: str) -> None:
    """Refuse to go on with another study.

    Args:
        ours: what is to be run.
        theirs: what has begun, as ``as_json`` gives it.
        where: it was found.

    Raises:
        ValueError: they differ.
    """
    mine = as_json(ours)
    unlike = [f"{key}: {_as_text(mine[key])} here, {_as_text(theirs.get(key))} there" for key in mine]
    unlike = [text for text, key in zip(unlike, mine, strict=True) if mine[key] != theirs.get(key)]
    if unlike:
        raise ValueError(f"{where}: found another study ({'; '.join(unlike)}), expected this one; rename its file")


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON gives it back."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    return content


def _problems(study: Study) -> Iterator[str]:
    """What is wrong with a study apart from the options of its runs."""
    plan = study.plan
    kinds = [name for name in ("grid", "settings", "search") if getattr(plan, name) is not None]
    if len(kinds) != 1:
        yield f"found {' and '.join(kinds) or 'none of them'}, expected one of grid, settings, search"
        return
    (kind,) = kinds
    if not getattr(plan, kind):
        yield f"{kind}: found nothing in it, expected at least one entry"
    for option, values in {**(plan.grid or {}), **(plan.search or {})}.items():
        if isinstance(values, list) and (not values or len(set(map(_as_text, values))) < len(values)):
            yield f"{kind}.{option}: found {values}, expected different values, at least one"
        if isinstance(values, Range) and not (values.low < values.high and (values.low > 0 or not values.log)):
            yield f"{kind}.{option}: found {values.low} to {values.high}, expected low below high, above 0 under log"
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        yield f"seeds: found {plan.seeds}, expected different numbers, at least one"
    if plan.metric not in METRICS:
        known = "val/AP, test/AP, test/HOTA or another that `evaluate` prints, after val/ or test/"
        yield f"metric: found {plan.metric}, expected one that runs log: {known}{nearest(plan.metric, METRICS)}"
    if plan.metric.startswith("test/") and plan.test is False:
        yield f"metric: found {plan.metric} and test: false, expected test: true"
    if plan.pruning and not plan.metric.startswith("val/"):
        yield f"pruning: found true with metric: {plan.metric}, expected a metric of validation, such as val/AP"
    if plan.trials < 1:
        yield f"trials: found {plan.trials}, expected 1 or more"
    named = [setting.name for setting in study.settings]
    if len(set(named)) < len(named) or not all(named):
        yield f"{kind}: found two settings that share a folder's name, expected names that differ in letters or digits"
    earlier: list[str] = []
    stages: list[tuple[str, list[str], list[str]]]
    stages = [(f"stages.{name}", arguments, [name]) for name, arguments in plan.stages.items()]
    settings: list[tuple[str, list[str], list[str]]]
    settings = [(f"{kind}.{setting.name}", setting.flags, []) for setting in study.settings]
    for where, arguments, made in [*stages, ("base", plan.base, []), *settings]:
        for found in re.findall(r"\{(\w+)\}", " ".join(arguments)):
            if found not in earlier:
                yield f"{where}: found {{{found}}}, expected a stage before it: {', '.join(earlier) or 'there is none'}"
        earlier += made


def _as_text(value: Any) -> str:
    """A value as an argument of the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _file_safe(name: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", name).strip("-.")
