"""Runs a study: several workers, in this process and in others, share its trials through one Optuna storage.

The n-th trial of the storage is the n-th run of the study (of a search, the n-th setting, with all its seeds): storages
number trials without gaps and each once, whoever asks. Whoever runs a trial holds the lock of its folder. A trial that
the storage calls running while nobody holds its lock was left by a process that has died, and is taken up again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from instanceformer.files import locking, replacing
from instanceformer.studies.run import read_run
from instanceformer.studies.study import OUTCOME, Range, Setting, Study, Trial, as_json, differences

PROGRAM = str(Path(sys.executable).with_name("instanceformer"))
LOG = "log.txt"
TRAINED = ".trained"
"""Name of the file in a run's folder that says that its training is complete."""

ENDED = {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT}
"""Exit codes of runs that were told to stop."""

STOPPING = 600.0
"""Seconds that a run of a sweep that has died may take to save itself."""

YOUNG = timedelta(minutes=1)
"""Age up to which a trial without a folder may still be waiting for one."""

PAUSE = 2.0
"""Seconds between two looks at what others do."""


class RunError(Exception):
    """A run has failed; the message is the last line that it printed."""


class Pruned(Exception):  # noqa: N818
    """A run was ended early, since it was below the median of the others."""


class Stopped(Exception):  # noqa: N818
    """This process was told to stop, or a run was."""


@dataclass
class Worker:
    """Runs one trial at a time.

    Attributes:
        environment: of its runs.
        child: its present run.
    """

    environment: dict[str, str]
    child: subprocess.Popen[bytes] | None = None


class Sweep:
    """Runs the trials of a study until none is left.

    Args:
        study: which trials there are.
        url: of the storage; None: a journal in the study's folder.
        environments: of the runs of each worker, beyond this process's own.

    Raises:
        ValueError: the storage or the folder holds another study of this name.
    """

    def __init__(self, study: Study, url: str | None, environments: list[dict[str, str]]) -> None:
        self.study = study
        self.workers = [Worker({**os.environ, **environment}) for environment in environments]
        self.stop = threading.Event()
        self._mutex = threading.Lock()
        self._broken_stages: dict[Path, str] = {}
        self._optuna = _load(study, _open(study, url), url or str(study.folder))

    @property
    def total(self) -> int:
        """Number of trials in the storage when all have begun."""
        plan = self.study.plan
        return plan.trials if plan.search is not None else len(self.study.settings) * len(plan.seeds)

    def run(self) -> list[Trial]:
        """Run what is left, and give all runs."""
        threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in self.workers]
        handlers = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.2)  # in the meantime signals are handled
                time.sleep(0.1)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.study.trials()

    def _end(self, number: int, frame: object) -> None:
        """Have all runs save themselves, and begin no more."""
        self.stop.set()
        for worker in self.workers:
            if worker.child is not None:
                worker.child.terminate()

    def _work(self, worker: Worker) -> None:
        while (taken := self._take()) is not None:
            trial, lock = taken
            with lock:
                try:
                    self._run(trial, worker)
                except Stopped:
                    self.stop.wait(PAUSE)  # a signal to a process group reaches the run first

    # Which trial comes next ------------------------------------------------------------------------------------------

    def _take(self) -> tuple[optuna.Trial, ExitStack] | None:
        """The next trial and its lock; None if none is left or this process is to stop."""
        while not self.stop.is_set():
            with self._mutex:
                waits = False
                for frozen in self._running():
                    if not self._is_here(frozen):
                        continue
                    lock = self._lock(frozen)
                    if lock is not None and any(frozen.number == again.number for again in self._running()):
                        return optuna.Trial(self._optuna, frozen._trial_id), lock
                    waits = True  # whoever runs it may die
                latest = self._latest()
                if len(latest) < self.total or any(t.state == TrialState.WAITING for t in latest.values()):
                    trial = self._optuna.ask(_distributions(self.study))
                    if self._entry(trial) >= self.total:  # another process was faster
                        self._optuna.tell(trial, state=TrialState.FAIL)
                        continue
                    if (lock := self._lock(trial)) is not None:
                        trial.set_user_attr("runs", [str(run.folder) for run in self._runs(trial)])
                        return trial, lock
                    waits = True
            if not waits:
                return None
            self.stop.wait(PAUSE)
        return None

    def retry_failed(self) -> None:
        """Have the trials that failed run again, each from its checkpoint."""
        for entry, trial in self._latest().items():
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

    def _latest(self) -> dict[int, FrozenTrial]:
        """By place in the list, the last trial of each."""
        placed = {self._entry(trial): trial for trial in self._trials()}
        return {entry: trial for entry, trial in placed.items() if entry < self.total}

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._latest().values() if trial.state == TrialState.RUNNING]

    def _is_here(self, trial: FrozenTrial) -> bool:
        """Whether the folder of a trial is on this machine, or nobody has come to make it."""
        assert trial.datetime_start is not None
        return self._runs(trial)[0].folder.is_dir() or (
            "runs" not in trial.user_attrs and datetime.now() - trial.datetime_start > YOUNG
        )

    def _runs(self, trial: optuna.Trial | FrozenTrial) -> list[Trial]:
        """The runs of a trial of the storage."""
        plan = self.study.plan
        if plan.search is not None:
            setting = Setting.of({name: _rounded(value) for name, value in trial.params.items()})
            return [self.study.trial(setting, seed) for seed in plan.seeds]
        seed, place = divmod(self._entry(trial), len(self.study.settings))  # seed by seed, to compare early
        return [self.study.trial(self.study.settings[place], plan.seeds[seed])]

    def _lock(self, trial: optuna.Trial | FrozenTrial) -> ExitStack | None:
        """The lock of a trial's folder, which is made; None if another worker has it."""
        folder = self._runs(trial)[0].folder
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locking(folder))
            except BlockingIOError:
                return None
            return stack.pop_all()

    # One trial -------------------------------------------------------------------------------------------------------

    def _run(self, trial: optuna.Trial, worker: Worker) -> None:
        """Make the runs of a trial, and tell the storage how it ended."""
        ended = [self._end_of(run, trial, worker) for run in self._runs(trial)]
        values = [run.value for run in ended if run.value is not None]
        if len(values) == len(ended):
            self._optuna.tell(trial, sum(values) / len(values))
        else:
            broken = next(run for run in ended if run.value is None)
            trial.set_user_attr("error", broken.error)
            state = TrialState.PRUNED if broken.state == "pruned" else TrialState.FAIL
            self._optuna.tell(trial, state=state)
        for run in ended:
            self._report(run, trial.number)

    def _end_of(self, run: Trial, trial: optuna.Trial, worker: Worker) -> Trial:
        """Make a run, unless it has been made, and note in its folder how it ended."""
        if run.state != "unfinished":
            return run
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            for stage in self.study.stages_of(run):
                self._make_stage(stage, run.seed, worker)
            self._call(self.study.fit_command(run), run.folder, worker)
            if (command := self.study.test_command(run)) is not None:
                self._call(command, run.folder, worker)
            run = replace(run, state="finished", value=self._measure(run))
        except (RunError, OSError, ValueError) as error:
            run = replace(run, state="failed", error=str(error))
        with replacing(run.folder / OUTCOME) as temporary:
            outcome = {"state": run.state, "value": run.value, "error": run.error}
            temporary.write_text(json.dumps({"options": run.setting.options, "seed": run.seed, "outcome": outcome}))
        return run

    def _make_stage(self, stage: str, seed: int, worker: Worker) -> None:
        """Make a training that runs share, unless it has been made; wait if another worker makes it."""
        folder = self.study.stage_folder(stage, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with locking(folder, patience=-1):
            if folder in self._broken_stages:
                raise RunError(self._broken_stages[folder])
            try:
                self._call(self.study.stage_command(stage, seed), folder, worker)
            except RunError as error:
                self._broken_stages[folder] = f"{folder}: {error}"
                raise RunError(self._broken_stages[folder]) from error

    def _call(self, command: list[str], folder: Path, worker: Worker) -> None:
        """Run ``instanceformer`` in a process that ends with this one; a finished training is not repeated."""
        if self.stop.is_set():
            raise Stopped
        trains, trained = command[0] == "fit", folder / TRAINED
        if trains and trained.exists():
            return
        for written in ("last.ckpt", "results.json"):  # a run of a sweep that has died may still be saving itself
            with locking(folder / written, patience=STOPPING):
                pass
        with (folder / LOG).open("a") as log:
            print(f"$ instanceformer {' '.join(command)}", file=log, flush=True)
            worker.child = child = subprocess.Popen(
                [PROGRAM, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=worker.environment,
                start_new_session=True,  # so that Ctrl-C reaches it once, from here
                preexec_fn=_end_with_parent,
            )
        if self.stop.is_set():  # the signal may have come before there was a child
            child.terminate()
        code = child.wait()
        worker.child = None
        if code in ENDED or (code and self.stop.is_set()):
            raise Stopped
        if code:
            raise RunError(f"{command[0]}: {_last_line(folder / LOG)} (exit code {code})")
        if trains:
            trained.touch()

    def _measure(self, run: Trial) -> float:
        """A finished run's metric; of several validations that of the last one."""
        metric = self.study.plan.metric
        found = read_run(run.folder)
        if metric.startswith("test/"):
            value = found.metrics.get(metric)
        else:
            value = found.curves().get(metric, ([], [None]))[1][-1]
        if value is None:
            raise ValueError(
                f"{run.folder}: found no {metric} among what it has logged; expected its data to be annotated"
            )
        return value

    def _report(self, run: Trial, number: int) -> None:
        """Print a line for a run that has ended."""
        ended = [trial for trial in self._latest().values() if trial.state.is_finished()]
        seconds = [t.duration.total_seconds() for t in ended if t.duration is not None]
        last = next(t.duration for t in ended if t.number == number)
        took = f" in {last.total_seconds():.0f} s" if last is not None else ""
        left = (self.total - len(ended)) * median(seconds) / len(self.workers)
        said = f"{self.study.plan.metric} {run.value:.4f}" if run.value is not None else f"{run.state}: {run.error}"
        ends = f"; {left / 60:.0f} min left" if len(ended) < self.total else ""
        print(f"{len(ended)} of {self.total}: {run.setting.name}, seed {run.seed}: {said}{took}{ends}", flush=True)


optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open(study: Study, url: str | None) -> BaseStorage:
    if url is not None:
        return optuna.storages.get_storage(url)
    study.folder.mkdir(parents=True, exist_ok=True)
    journal = str(study.folder / "journal.log")
    lock: Any = FileLock(f"{journal}.lock")  # one that ends with its process; Optuna's own would last half a minute
    return JournalStorage(JournalFileBackend(journal, lock_obj=lock))


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
    elif unlike := differences(plan, json.loads(found.user_attrs["plan"])):
        raise ValueError(
            f"{study.name}: found another study of this name in {where} ({unlike}); expected the same; give the "
            "study's file another name"
        )
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


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith("(--debug")), "nothing")


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Between fork and exec: have the kernel tell this process to end when the one that started it dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def environments(workers: int, devices: list[str]) -> Iterator[dict[str, str]]:
    """What each worker's runs find in their environment beyond what this process has: GPUs, number of threads."""
    for number in range(workers):
        environment = {}
        if devices:
            share = len(devices) // workers
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[number * share : (number + 1) * share])
        elif workers > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        yield environment
