"""Sweeps whose runs are a stand-in that takes a moment; the last test has real ones."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
import yaml
from tests import processes
from tests.studies import stand_in, sweeping

from instanceformer.cli import main
from instanceformer.commands import compare
from instanceformer.studies import sweep
from instanceformer.studies.study import Trial, read_study

GRID = {"model.network.memory_frames": [2, 3, 4, 8]}


@pytest.fixture
def program(tmp_path: Path) -> str:
    return sweeping.write_program(tmp_path)


@pytest.fixture
def begin(tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a study, and has this process run it with the stand-in if it runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "PROGRAM", program)
    monkeypatch.setattr(sweep, "PAUSE", 0.05)
    monkeypatch.setattr(compare, "run", lambda args: print("table of", *args))

    def write(**keys: object) -> Path:
        path = tmp_path / "memory.yaml"
        path.write_text(yaml.safe_dump({"base": ["--trainer.max_steps=8"], "seeds": [0, 1], **keys}))
        return path

    return write


def trials(path: Path, folder: Path | None = None) -> list[Trial]:
    return read_study(path, folder).trials()


def calls(trial: Trial) -> list[str]:
    """What was run in its folder."""
    return [line.split()[0] for line in (trial.folder / "calls.txt").read_text().splitlines()]


def test_every_setting_runs_with_every_seed_after_its_stage(
    begin: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"images": ["--trainer.max_steps=4"], "unused": ["--trainer.max_steps=5"]}
    path = begin(base=["--model.init_from={images}/last.ckpt"], stages=stage, grid=GRID)
    main(["sweep", str(path), "--workers=2"])
    found = trials(path)
    assert [trial.setting.name for trial in found] == [f"memory_frames={d}" for d in (2, 2, 3, 3, 4, 4, 8, 8)]
    assert [trial.value for trial in found] == pytest.approx([0.2, 0.21, 0.3, 0.31, 0.4, 0.41, 0.8, 0.81])
    assert all(calls(trial) == ["fit", "test"] for trial in found)
    folder = Path("runs/studies/memory")
    assert [(folder / f"stages/images/seed{seed}/calls.txt").read_text().count("fit") for seed in (0, 1)] == [1, 1]
    assert not (folder / "stages/unused").exists()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 9
    assert printed[-1] == "table of runs/studies/memory"
    assert printed[0].startswith("1 of 8: memory_frames=")
    assert printed[0].endswith(" min left")
    assert all("seed 0" in line for line in printed[:3])  # seed by seed, so that settings can be compared early

    main(["sweep", str(folder), "--workers=2"])  # nothing is left to do
    assert capsys.readouterr().out == "table of runs/studies/memory\n"
    assert all(calls(trial) == ["fit", "test"] for trial in found)


def test_a_failed_run_is_recorded_and_can_be_repeated(
    begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begin(grid=GRID, seeds=[0])
    monkeypatch.setenv("FAIL", "memory_frames=3")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(path)])
    assert stop.value.code == 1
    assert [trial.state for trial in trials(path)] == ["finished", "failed", "finished", "finished"]
    said = "runs/studies/memory/trials/memory_frames=3/seed0: instanceformer fit: found no luck (exit code 1"
    assert capsys.readouterr().err.startswith(said)
    monkeypatch.delenv("FAIL")
    with pytest.raises(SystemExit):
        main(["sweep", str(path)])
    main(["sweep", str(path), "--retry_failed"])
    found = trials(path)
    assert [trial.value for trial in found] == pytest.approx([0.2, 0.3, 0.4, 0.8])
    assert [calls(trial) for trial in found] == [["fit", "test"], ["fit", "fit", "test"], *[["fit", "test"]] * 2]


def test_a_stage_that_fails_is_tried_once(
    begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begin(base=["--model.init_from={images}/last.ckpt"], stages={"images": []}, grid=GRID, seeds=[0])
    monkeypatch.setenv("FAIL", "images")
    with pytest.raises(SystemExit):
        main(["sweep", str(path)])
    assert {trial.state for trial in trials(path)} == {"failed"}
    assert capsys.readouterr().err.count("found no luck (exit code 1, runs/studies/memory/stages/images/seed0") == 4
    assert Path("runs/studies/memory/stages/images/seed0/calls.txt").read_text().count("fit") == 1


def test_a_search_runs_each_chosen_setting_with_all_seeds(begin: Callable[..., Path]) -> None:
    search = {"model.network.memory_frames": {"low": 1, "high": 6}, "model.network.memory": [True]}
    path = begin(search=search, trials=5, sampler="random")
    main(["sweep", str(path), "--workers=2"])
    found = trials(path)
    settings = {trial.setting.name for trial in found}
    assert len(found) == 2 * len(settings)
    assert all(calls(trial) == ["fit", "test"] for trial in found)  # also if a setting was chosen twice
    assert all(1 <= trial.setting.options["model.network.memory_frames"] <= 6 for trial in found)
    values = [trial.value for trial in study_of(path).trials]
    means = {name: sum(t.value or 0 for t in found if t.setting.name == name) / 2 for name in settings}
    assert {round(value or 0, 6) for value in values} == {round(value, 6) for value in means.values()}


def study_of(path: Path, url: str | None = None) -> optuna.Study:
    from instanceformer.studies.queue import Queue

    return Queue(read_study(path), url)._optuna


def test_a_run_below_the_median_is_ended_early(begin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACE", "0.1")
    grid = {"model.optimizer.lr": [5.0, 6.0, 7.0, 8.0, 9.0, 1.0]}  # the stand-in's val/AP rises as fast
    path = begin(grid=grid, seeds=[0], metric="val/AP", pruning=True, test=False)
    main(["sweep", str(path)])
    found = trials(path)
    assert [trial.state for trial in found] == [*["finished"] * 5, "pruned"]
    assert [trial.value for trial in found] == [35.0, 42.0, 49.0, 56.0, 63.0, None]
    assert len((found[-1].folder / "last.ckpt").read_text().split()) < stand_in.STEPS


def test_sigterm_ends_the_runs_and_the_same_command_goes_on(
    begin: Callable[..., Path], tmp_path: Path, program: str
) -> None:
    path, log = begin(grid=GRID), tmp_path / "log.txt"
    process = sweeping.start([str(path), "--workers=2"], tmp_path, log, program, PACE="0.2")
    processes.wait_until(lambda: len(list(tmp_path.glob("runs/*/*/trials/*/*/last.ckpt"))) == 2, process)
    assert processes.kill(process, signal.SIGTERM) == 128 + signal.SIGTERM
    assert log.read_text().endswith("stopped by SIGTERM; the same command goes on\n")
    assert len(list(tmp_path.glob("runs/*/*/trials/*/*/calls.txt"))) == 2
    main(["sweep", str(path), "--workers=2"])
    assert sorted(len(calls(trial)) for trial in trials(path)) == [2, 2, 2, 2, 2, 2, 3, 3]


def kill_often(begin: Callable[[], BaseProcess], logs: Callable[[], int], times: int, latest: float) -> int:
    """Kill a sweep when it has begun a run and start it again: how often it was alive.

    Args:
        begin: starts it.
        logs: number of runs that have begun so far.
        times: that it is started.
        latest: seconds after the beginning of a run.
    """
    chance, alive = random.Random(0), 0
    for _ in range(times):
        before, process = logs(), begin()
        while process.is_alive() and logs() == before:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, latest))
        alive += process.is_alive()
        process.kill()
        process.join()
    return alive


def test_after_many_kills_each_run_was_made_once(begin: Callable[..., Path], tmp_path: Path, program: str) -> None:
    """Runs of a killed sweep save themselves; the next sweep begins at once, and waits for them."""
    path, log = begin(grid=GRID, stages={"s": []}, base=["--model.init_from={s}/last.ckpt"]), tmp_path / "log.txt"
    start = partial(sweeping.start, [str(path), "--workers=2"], tmp_path, log, program, PACE="0.1")

    def begun() -> int:
        return sum(len(path.read_text().splitlines()) for path in tmp_path.rglob("calls.txt"))

    assert kill_often(start, begun, times=12, latest=0.8) > 5
    assert sweeping.end(start()) == 0, log.read_text()
    found = trials(path)
    assert [trial.value for trial in found] == pytest.approx([0.2, 0.21, 0.3, 0.31, 0.4, 0.41, 0.8, 0.81])
    assert [trial.state.name for trial in study_of(path).trials] == ["COMPLETE"] * 8


@pytest.mark.parametrize("apart", [False, True], ids=["one folder", "two machines"])
def test_two_processes_share_a_database(begin: Callable[..., Path], tmp_path: Path, program: str, apart: bool) -> None:
    path, url = begin(grid=GRID), f"sqlite:///{tmp_path}/study.db"
    folders = [tmp_path / "a", tmp_path / ("b" if apart else "a")]
    both = [
        sweeping.start(
            [str(path), f"--storage={url}", f"--folder={folder}/memory"], tmp_path, tmp_path / f"log{n}", program
        )
        for n, folder in enumerate(folders)
    ]
    assert [sweeping.end(process) for process in both] == [0, 0], [log.read_text() for log in tmp_path.glob("log*")]
    made = [trial for folder in set(folders) for trial in trials(path, folder / "memory") if trial.value is not None]
    assert sorted((t.setting.name, t.seed) for t in made) == sorted((t.setting.name, t.seed) for t in trials(path))
    assert all(calls(trial) == ["fit", "test"] for trial in made)
    assert all((tmp_path / f"log{n}").read_text().count(": finished, ") > 0 for n in (0, 1))


def test_devices_and_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert list(sweep.environments(1, [])) == [{}]
    assert list(sweep.environments(2, [])) == [{"OMP_NUM_THREADS": "4"}] * 2
    shares = [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert list(sweep.environments(2, ["0", "1", "2", "3"])) == shares


REAL = """
base:
  - --config={folder}/network.yaml
  - --model.init_from={{images}}/last.ckpt
  - --trainer.max_steps=3
stages:
  images: ["--config={folder}/network.yaml", --data.clip_frames=1, --trainer.max_steps=2]
seeds: [0, 1]
grid:
  model.network.memory_frames: [1, 2]
  model.network.memory_tokens: [1, 2]
"""
NETWORK = """
trainer: {accelerator: cpu, devices: 1, logger: true, enable_progress_bar: false, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 1}
model:
  network: {backbone: small, backbone_norm: batch, num_queries: 10, dim: 32, num_heads: 4, encoder_layers: 1,
            decoder_layers: 2, feedforward_dim: 48}
data:
  train: {annotations: data/train.json, images: data/JPEGImages}
  valid: {annotations: data/valid.json, images: data/JPEGImages}
  test: {annotations: data/valid.json, images: data/JPEGImages}
  augmentation: {sizes: [], crop: 0.0}
  batch_size: 2
  clip_frames: 3
  eval_size: 64
  num_workers: 0
"""


@pytest.mark.slow
def test_killed_five_times_a_study_ends_as_its_commands_typed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.yaml").write_text(NETWORK)
    path = tmp_path / "memory.yaml"
    path.write_text(REAL.format(folder=tmp_path))
    videos = ["--train_videos=2", "--valid_videos=1", "--length=8", "--height=64", "--width=96", "--workers=1"]
    main(["synthesize", "data", *videos])
    capfd.readouterr()
    main(["sweep", str(path), "--dry_run", "--folder=typed"])
    commands = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
    assert len(commands) == 2 + 8 * 2
    for command in commands:
        assert processes.run(command[1:], tmp_path / "typed.log") == 0

    log = tmp_path / "log.txt"
    start = partial(sweeping.start, [str(path), "--workers=2"], tmp_path, log)

    def begun() -> int:
        return sum(log.read_text().count("$ instanceformer") for log in tmp_path.rglob("log.txt"))

    assert kill_often(start, begun, times=5, latest=12) == 5
    assert sweeping.end(start()) == 0, log.read_text()
    assert re.search(r"^\| memory_frames=2,memory_tokens=2 +\| 2 ", log.read_text(), re.MULTILINE), log.read_text()
    assert [trial.state.name for trial in study_of(path).trials] == ["COMPLETE"] * 8
    for ours, typed in zip(trials(path), trials(path, tmp_path / "typed"), strict=True):
        numbers = [json.loads((t.folder / "results.metrics.json").read_text())["metrics"] for t in (ours, typed)]
        assert numbers[0] == numbers[1]
        assert json.loads((ours.folder / "results.json").read_text())  # there are tracks to compare
        assert (ours.folder / "results.json").read_bytes() == (typed.folder / "results.json").read_bytes()
        steps = [[row["step"] for row in csv.DictReader((t.folder / "metrics.csv").open())] for t in (ours, typed)]
        assert steps[0] == steps[1]
