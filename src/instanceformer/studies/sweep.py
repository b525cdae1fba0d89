"""Runs the trials of a study: a worker is a thread that runs ``instanceformer fit`` and ``test`` as processes."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from instanceformer.files import locking, replacing
from instanceformer.studies.queue import PAUSE, Queue, Taken
from instanceformer.studies.run import read_curves, read_run
from instanceformer.studies.study import OUTCOME, Study, Trial

PROGRAM = str(Path(sys.executable).with_name("instanceformer"))
LOG = "log.txt"
TRAINED = ".trained"
"""Name of the file in a run's folder that says that its training is complete."""

ENDED = {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT}
"""Exit codes of runs that were told to stop."""


class RunError(Exception):
    """A run has failed; the message ends with the last line that it printed."""


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
        study: what is run.
        queue: its trials, which other processes may share.
        environments: of the runs of each worker, beyond this process's own.
    """

    def __init__(self, study: Study, queue: Queue, environments: list[dict[str, str]]) -> None:
        self.study, self.queue = study, queue
        self.workers = [Worker({**os.environ, **environment}) for environment in environments]
        self.signal: int | None = None
        """The signal that ended the sweep, if any."""
        self._stop = threading.Event()
        self._broken_stages: dict[Path, str] = {}

    def run(self) -> None:
        """Run what is left. On SIGTERM and SIGINT the runs save themselves, and nothing more begins."""
        handlers = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(len(self.workers)) as pool:
                threads = [pool.submit(self._work, worker) for worker in self.workers]
                wait(threads)
            for thread in threads:
                thread.result()  # raises what it has raised
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: object) -> None:
        self.signal = number
        self._stop.set()
        for worker in self.workers:
            if worker.child is not None:
                worker.child.terminate()

    def _work(self, worker: Worker) -> None:
        while (taken := self.queue.take(self._stop)) is not None:
            with taken.lock:
                try:
                    self._run(taken, worker)
                except Stopped:
                    self._stop.wait(PAUSE)  # a signal to all processes may reach the run before this one

    def _run(self, taken: Taken, worker: Worker) -> None:
        """Make the runs of a trial, one after the other, until one fails."""
        values = []
        for run in taken.runs:
            run = self._finish(run, taken, worker)
            if run.value is None:
                break
            values.append(run.value)
        self.queue.tell(taken.trial, mean(values) if len(values) == len(taken.runs) else None, run.state, run.error)
        self._report(taken, run)

    def _finish(self, run: Trial, taken: Taken, worker: Worker) -> Trial:
        """Make a run, unless it has been made, and note in its folder how it ended."""
        if run.state != "unfinished":
            return run
        run.folder.mkdir(parents=True, exist_ok=True)

        def falls_behind() -> bool:
            steps, values = read_curves(run.folder).get(self.study.plan.metric, ([], []))
            return self.queue.falls_behind(taken.trial, dict(zip(steps, values, strict=True)))

        prunes = self.study.plan.pruning and run.seed == taken.runs[0].seed
        try:
            for stage in self.study.stages_of(run):
                self._make_stage(stage, run.seed, worker)
            self._call(self.study.fit_command(run), run.folder, worker, falls_behind if prunes else None)
            if (command := self.study.test_command(run)) is not None:
                self._call(command, run.folder, worker)
            run = replace(run, state="finished", value=self._measure(run))
        except Pruned:
            run = replace(run, state="pruned", error=f"its {self.study.plan.metric} was below the others' median")
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
        with self._holding(folder):
            try:
                if folder in self._broken_stages:
                    raise RunError(self._broken_stages[folder])
                self._call(self.study.stage_command(stage, seed), folder, worker)
            except RunError as error:
                self._broken_stages[folder] = str(error)
                raise

    @contextmanager
    def _holding(self, path: Path) -> Iterator[None]:
        """Hold a path's lock, as soon as whoever has it lets it go."""
        with ExitStack() as stack:
            while True:
                if self._stop.is_set():
                    raise Stopped
                with suppress(BlockingIOError):
                    stack.enter_context(locking(path, patience=PAUSE))
                    break
            yield

    def _call(
        self, command: list[str], folder: Path, worker: Worker, falls_behind: Callable[[], bool] | None = None
    ) -> None:
        """Run ``instanceformer`` in a process that ends with this one; a finished training is not repeated."""
        trains, trained = command[0] == "fit", folder / TRAINED
        if trains and trained.exists():
            return
        for written in ("last.ckpt", "results.json"):  # a run of a sweep that has died may still be saving itself
            with self._holding(folder / written):
                pass
        with (folder / LOG).open("a") as log:
            print(f"$ {shlex.join(['instanceformer', *command])}", file=log, flush=True)
            worker.child = child = subprocess.Popen(
                [PROGRAM, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=worker.environment,
                start_new_session=True,  # so that Ctrl-C reaches it once, from here
                preexec_fn=_end_with_parent,
            )
        if self._stop.is_set():  # the signal may have come before there was a child
            child.terminate()
        pruned = False
        while (code := _wait(child)) is None:
            if falls_behind is not None and not pruned and falls_behind():
                pruned = True
                child.terminate()
        worker.child = None
        if pruned:
            raise Pruned
        if code in ENDED or (code and self._stop.is_set()):
            raise Stopped
        if code:
            raise RunError(f"{_last_line(folder / LOG)} (exit code {code}, {folder / LOG})")
        if trains:
            trained.touch()

    def _measure(self, run: Trial) -> float:
        """A finished run's metric; of several validations that of the last one."""
        metric = self.study.plan.metric
        values = read_curves(run.folder).get(metric, ([], []))[1]
        if metric.startswith("test/"):
            values = [value for name, value in read_run(run.folder).metrics.items() if name == metric]
        if not values:
            raise ValueError(f"found no {metric} among what was logged, expected it; are the videos annotated?")
        return values[-1]

    def _report(self, taken: Taken, run: Trial) -> None:
        """Print a line for a trial that has ended; of several seeds, ``run`` is the last one."""
        total = self.queue.total
        ended = {t.number: t for t in self.queue.latest().values() if t.state.is_finished()}
        seconds = {number: t.duration.total_seconds() for number, t in ended.items() if t.duration is not None}
        value = ended[taken.trial.number].value
        said = run.error if value is None else f"{self.study.plan.metric} {value:.4f}"
        minutes = (total - len(ended)) * median(seconds.values()) / len(self.workers) / 60
        left = f"; {minutes:.0f} min left" if len(ended) < total else ""
        seeds = f"seed {run.seed}" if self.study.plan.search is None else f"{len(taken.runs)} seeds"
        print(
            f"{len(ended)} of {total}: {run.setting.name}, {seeds}: {run.state}, {said}, "
            f"{seconds[taken.trial.number]:.0f} s{left}",
            flush=True,
        )


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """A process's exit code; None if it has none within a while."""
    with suppress(subprocess.TimeoutExpired):
        return child.wait(PAUSE)
    return None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line and not line.startswith("(--debug")), "")
    return "it said nothing" if said.startswith("$ instanceformer ") else said


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Between fork and exec: have Linux tell this process to end when the thread that started it dies."""
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
