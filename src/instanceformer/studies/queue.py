"""The trials of a study in an Optuna storage: which there are, who has which, and which comes next.

The n-th trial of the storage is the n-th run of the study (of a search, the n-th setting, with all its seeds): storages
number trials without gaps and each once, whoever asks. Whoever runs a trial holds the lock of its folder. A trial that
the storage calls running while nobody holds its lock was left by a process that has died, and is taken up again.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from instanceformer.files import locking
from instanceformer.studies.study import OUTCOME, Range, Setting, Study, Trial, as_json, check_same

NEW = timedelta(seconds=10)
"""Age up to which whoever has asked for a trial may still be about to say where it runs."""

PAUSE = 2.0
"""Seconds between two looks at what others do."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Taken:
    """A trial that a worker has taken.

    Attributes:
        trial: in the storage.
        runs: one; of a search one for each seed.
        lock: of the trial's folder, to be closed when the trial has ended.
    """

    trial: optuna.Trial
    runs: list[Trial]
    lock: ExitStack


class Queue:
    """The trials of a study, shared by workers of this process and of others.

    Args:
        study: which trials there are.
        url: of the storage; None: a journal in the study's folder.

    Raises:
        ValueError: the storage holds another study of this name, or cannot be opened.
    """

    def __init__(self, study: Study, url: str | None) -> None:
        self.study = study
        self._optuna = _load(study, _open(study, url), url or str(study.folder))
        self._mutex = threading.Lock()

    @property
    def total(self) -> int:
        """Number of trials when all have begun."""
        plan = self.study.plan
        return plan.trials if plan.search is not None else len(self.study.settings) * len(plan.seeds)

    def take(self, stop: threading.Event) -> Taken | None:
        """The next trial; waits while others run the last ones, in case they die; None if none is left.

        Args:
            stop: set when this process is to take no more.
        """
        while not stop.is_set():
            with self._mutex:
                running = self._running()
                for frozen in running:
                    if (taken := self._take_up(frozen)) is not None:
                        return taken
                latest = self.latest()
                if len(latest) < self.total or any(t.state == TrialState.WAITING for t in latest.values()):
                    trial = self._optuna.ask(_distributions(self.study))
                    if self._entry(trial) >= self.total:  # another process was faster
                        self._optuna.tell(trial, state=TrialState.FAIL)
                        continue
                    runs = self._runs(trial)
                    runs[0].folder.mkdir(parents=True, exist_ok=True)
                    trial.set_user_attr("runs", [str(run.folder) for run in runs])
                    if (lock := self._lock(trial)) is None:  # a search may choose a setting twice
                        continue
                    return Taken(trial, runs, lock)
            if not any(self._is_here(frozen) for frozen in running):
                return None
            stop.wait(PAUSE)
        return None

    def _take_up(self, frozen: FrozenTrial) -> Taken | None:
        """A trial that a process has left when it died; None if it runs, or on another machine."""
        if not self._is_here(frozen) or _is_new(frozen):
            return None
        if len(frozen.params) < len(self.study.plan.search or ()):  # it died before all parameters were chosen
            self._optuna.tell(frozen.number, state=TrialState.FAIL)
            self._optuna.enqueue_trial({}, user_attrs={"again": self._entry(frozen)})
            return None
        lock = self._lock(frozen)
        if lock is None:
            return None
        if all(frozen.number != trial.number for trial in self._running()):  # it has ended in the meantime
            lock.close()
            return None
        return Taken(optuna.Trial(self._optuna, frozen._trial_id), self._runs(frozen), lock)

    def tell(self, trial: optuna.Trial, value: float | None, state: str, error: str | None) -> None:
        """Note how a trial ended; its value is None unless it has finished."""
        if value is not None:
            self._optuna.tell(trial, value)
            return
        trial.set_user_attr("error", error)
        self._optuna.tell(trial, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)

    def falls_behind(self, trial: optuna.Trial, values: dict[int, float]) -> bool:
        """Note a trial's metric so far, by step, and say whether it is to be ended."""
        told = next(t.intermediate_values for t in self._trials() if t.number == trial.number)
        for step in values.keys() - told.keys():
            trial.report(values[step], step)
        return trial.should_prune()

    def retry_failed(self) -> None:
        """Have the trials that failed run again, each from its checkpoint."""
        for entry, trial in self.latest().items():
            if trial.state == TrialState.FAIL:
                for run in self._runs(trial):
                    if run.state == "failed":
                        (run.folder / OUTCOME).unlink()
                self._optuna.enqueue_trial(trial.params, user_attrs={"again": entry})

    def _trials(self) -> list[FrozenTrial]:
        return self._optuna.get_trials(deepcopy=False)

    def _entry(self, trial: optuna.Trial | FrozenTrial) -> int:
        """A trial's place in the list of the study; repetitions of failed ones have that of the first."""
        if "again" in trial.user_attrs:
            return int(trial.user_attrs["again"])
        return sum(t.number < trial.number and "again" not in t.user_attrs for t in self._trials())

    def latest(self) -> dict[int, FrozenTrial]:
        """By place in the list, the last trial of each."""
        placed = {self._entry(trial): trial for trial in self._trials()}
        return {entry: trial for entry, trial in placed.items() if entry < self.total}

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self.latest().values() if trial.state == TrialState.RUNNING]

    def _is_here(self, trial: FrozenTrial) -> bool:
        """Whether the folder of a trial is on this machine, or nobody has said yet where it is."""
        return "runs" not in trial.user_attrs or self._runs(trial)[0].folder.is_dir()

    def _runs(self, trial: optuna.Trial | FrozenTrial) -> list[Trial]:
        """The runs of a trial of the storage."""
        plan = self.study.plan
        if plan.search is not None:
            setting = Setting.of({name: _rounded(value) for name, value in trial.params.items()})
            return [self.study.trial(setting, seed) for seed in plan.seeds]
        seed, place = divmod(self._entry(trial), len(self.study.settings))  # seed by seed, to compare early
        return [self.study.trial(self.study.settings[place], plan.seeds[seed])]

    def _lock(self, trial: optuna.Trial | FrozenTrial) -> ExitStack | None:
        """The lock of a trial's folder; None if another worker has it."""
        folder = self._runs(trial)[0].folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locking(folder))
            except BlockingIOError:
                return None
            return stack.pop_all()


def _is_new(trial: FrozenTrial) -> bool:
    assert trial.datetime_start is not None
    return "runs" not in trial.user_attrs and datetime.now() - trial.datetime_start < NEW


def _open(study: Study, url: str | None) -> BaseStorage:
    if url is not None:
        return _connect(url)
    study.folder.mkdir(parents=True, exist_ok=True)
    journal = str(study.folder / "journal.log")
    lock: Any = FileLock(f"{journal}.lock")  # one that ends with its process; Optuna's own would last half a minute
    return JournalStorage(JournalFileBackend(journal, lock_obj=lock))


def _connect(url: str, attempts: int = 5) -> BaseStorage:
    """A database's storage; tried again, since another process may be making the same tables."""
    try:
        return optuna.storages.get_storage(url)
    except SQLAlchemyError as error:
        if isinstance(error, DBAPIError) and attempts > 1:
            time.sleep(1)
            return _connect(url, attempts - 1)
        expected = "expected the URL of a database that Optuna takes, such as sqlite:///study.db"
        raise ValueError(f"--storage: found {url}, {expected} ({error})") from error


def _load(study: Study, storage: BaseStorage, where: str) -> optuna.Study:
    """The study in a storage, a new one if there is none; refuses another of its name."""
    plan = study.plan
    sampler: optuna.samplers.BaseSampler = (
        optuna.samplers.RandomSampler()
        if plan.sampler == "random"
        else optuna.samplers.TPESampler(constant_liar=True)  # others' unfinished trials count
    )
    found = optuna.create_study(
        storage=storage,
        sampler=sampler,
        pruner=optuna.pruners.MedianPruner() if plan.pruning else optuna.pruners.NopPruner(),
        study_name=study.name,
        direction=plan.direction,
        load_if_exists=True,
    )
    if "plan" not in found.user_attrs:
        found.set_user_attr("plan", json.dumps(as_json(plan)))
    check_same(plan, json.loads(found.user_attrs["plan"]), f"{where}, study {study.name}")
    return found


def _distributions(study: Study) -> dict[str, optuna.distributions.BaseDistribution]:
    """What the sampler of a search chooses from."""
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for option, values in (study.plan.search or {}).items():
        if not isinstance(values, Range):
            found[option] = optuna.distributions.CategoricalDistribution(values)
        elif isinstance(values.low, int) and isinstance(values.high, int):
            step = int(values.step or 1)
            found[option] = optuna.distributions.IntDistribution(values.low, values.high, values.log, step)
        else:
            found[option] = optuna.distributions.FloatDistribution(values.low, values.high, values.log, values.step)
    return found


def _rounded(value: Any) -> Any:
    """A number that people can read."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
