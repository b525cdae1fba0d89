"""``instanceformer sweep``."""

from __future__ import annotations

import io
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from instanceformer.commands import compare
from instanceformer.commands.parsing import Parser
from instanceformer.studies.study import FILE, FOLDER, Setting, Study, as_json, check_same, read_study


def run(args: Sequence[str]) -> None:
    """Make all runs of a study: every setting with every seed. The same command again goes on where it stopped."""
    parser = Parser(prog="instanceformer sweep", description=run.__doc__)
    parser.add_argument("study", type=Path, help="its file (see docs/studies.md), or the folder of one that has begun")
    parser.add_argument("--folder", type=Path, help=f"for all that is written; {FOLDER}/NAME unless given")
    parser.add_argument("--storage", help="URL of a database that Optuna takes; a journal in the folder unless given")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--devices", help="GPUs to share out among the workers, such as 0,1,2,3")
    parser.add_argument("--retry_failed", action="store_true", help="run trials that failed again")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(list(args))
    devices = options.devices.split(",") if options.devices else []
    if options.workers < 1:
        raise ValueError(f"--workers: found {options.workers}, expected 1 or more")
    if devices and len(devices) % options.workers:
        raise ValueError(f"--devices: found {len(devices)}, expected a multiple of --workers, {options.workers}")
    study = read_study(options.study, options.folder)
    if (study.folder / FILE).is_file():
        check_same(study.plan, as_json(read_study(study.folder).plan), str(study.folder))
    _check_options(study, str(options.study))
    if options.dry_run:
        _print_commands(study)
        return
    try:
        from instanceformer.studies.queue import Queue
        from instanceformer.studies.sweep import Sweep, environments
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name}: not installed, expected for sweeps; pip install '.[sweep]'"
        ) from error
    queue = Queue(study, options.storage)
    if options.study.is_file():
        study.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.study, study.folder / FILE)
    if options.retry_failed:
        queue.retry_failed()
    sweep = Sweep(study, queue, list(environments(options.workers, devices)))
    sweep.run()
    if sweep.signal is not None:
        print(f"stopped by {signal.Signals(sweep.signal).name}; the same command goes on")
        sys.exit(128 + sweep.signal)
    trials = study.trials()
    if elsewhere := sum(trial.state == "unfinished" for trial in trials):
        print(f"{elsewhere} of {len(trials)} runs are not in {study.folder}: another machine has them")
    failed = [trial for trial in trials if trial.state == "failed"]
    for trial in failed:
        print(f"{trial.folder}: {trial.error}", file=sys.stderr)
    if study.plan.test is not False and any(trial.state == "finished" for trial in trials):
        compare.run([str(study.folder)])
    if failed:
        sys.exit(1)


def _some_settings(study: Study) -> list[Setting]:
    """All settings; of a search one, with the first value of each option."""
    if study.plan.search is None:
        return study.settings
    first = {
        option: values[0] if isinstance(values, list) else values.low for option, values in study.plan.search.items()
    }
    return [Setting.of(first)]


def _check_options(study: Study, name: str) -> None:
    """Have the command line of every setting read by ``fit`` and ``test`` themselves.

    Raises:
        ValueError: one has an unknown option or a wrong value.
    """
    from instanceformer.commands.train import check_options  # here: it imports torch

    seed = study.plan.seeds[0]
    trials = [study.trial(setting, seed) for setting in _some_settings(study)]
    commands = [study.stage_command(stage, seed) for stage in study.plan.stages]
    commands += [study.fit_command(trial) for trial in trials]
    commands += [command for trial in trials[:1] if (command := study.test_command(trial))]  # options are the same
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            check_options(commands)
    except SystemExit as stop:
        raise ValueError(f"{name}: {said.getvalue().strip() or stop.code}") from stop


def _print_commands(study: Study) -> None:
    """Print what would be run, as anyone could type it."""
    made = set()
    for seed in study.plan.seeds:
        for trial in (study.trial(setting, seed) for setting in _some_settings(study)):
            stages = [study.stage_command(stage, seed) for stage in study.stages_of(trial)]
            for command in (*stages, study.fit_command(trial), study.test_command(trial)):
                if command is not None and tuple(command) not in made:
                    made.add(tuple(command))
                    print(shlex.join(["instanceformer", *command]))
