"""A training that is stopped anywhere ends with the weights of one that was not."""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import TINY
from tests.processes import kill, run, start, wait_until

from instanceformer.cli import main

STEPS = 8
Fit = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sizes = ["--train_videos=5", "--valid_videos=2", "--length=8", "--height=48", "--width=80"]
    main(["synthesize", str(folder), *sizes, "--workers=1", "--overwrite"])
    return folder


@pytest.fixture(scope="module")
def fit(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Gives the arguments of a training in a folder: 4 steps an epoch, of videos and images, with dropout."""
    split = {
        name: {"annotations": f"{data}/{name}.json", "images": f"{data}/JPEGImages"} for name in ("train", "valid")
    }
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "log_every_n_steps": 1,
            "gradient_clip_val": 0.5,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
        },
        "model": {
            "network": {"num_classes": 4, **TINY, "backbone_norm": "batch", "dropout": 0.1},
            "optimizer": {"milestones": [1], "lr": 1e-3, "backbone_lr": 1e-3},
        },
        "data": {
            **split,
            "joint": {"share": 0.4, "split": split["train"]},
            "augmentation": {"sizes": [40, 48], "crop": 0.5, "crop_from": [48], "crop_sides": [32, 48]},
            "batch_size": 2,
            "clip_frames": 2,
            "clips_per_video": 1,
            "eval_size": 48,
            "num_workers": 0,
        },
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(config))

    def arguments(folder: Path, *more: str) -> list[str]:
        return ["fit", f"--config={path}", f"--trainer.default_root_dir={folder}", *more]

    return arguments


@pytest.fixture(scope="module")
def whole(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Where the training comes to without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    main(fit(folder))
    return state(folder)


def state(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return checkpoint


def assert_same(found: dict[str, Any], expected: dict[str, Any], steps: int = STEPS) -> None:
    assert found["global_step"] == expected["global_step"] == steps
    for name, weight in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], weight), name
    for of, theirs in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        assert [group["lr"] for group in of["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]
        for index, moments in theirs["state"].items():
            for name, moment in moments.items():
                assert torch.equal(of["state"][index][name], moment), (index, name)


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (3, []),
        (4, []),
        (5, ["--trainer.limit_val_batches=0"]),
        (3, ["--data.num_workers=2"]),
        (2, ["--trainer.accumulate_grad_batches=3"]),
        (3, ["--trainer.precision=bf16-mixed", "--model.optimizer={schedule: cosine, warmup_steps: 2}"]),
        (3, ["--trainer.limit_train_batches=2"]),
    ],
    ids=["mid-epoch", "end of epoch", "second epoch", "workers", "accumulation", "bfloat16", "part of an epoch"],
)
def test_steps_and_the_rest_equal_all_at_once(fit: Fit, whole, tmp_path: Path, stop: int, options: list[str]) -> None:
    """Also where the first part ends with max_steps, and the second, which has more, gets its checkpoint."""
    expected = whole
    if len(options) and "limit_val" not in options[0] and "workers" not in options[0]:
        main(fit(tmp_path / "whole", *options))
        expected = state(tmp_path / "whole")
    total = [] if "cosine" not in str(options) else [f"--trainer.max_epochs={STEPS}"]
    folder = tmp_path / "parts"
    main(fit(folder, *options, f"--trainer.max_steps={stop}", *total))
    assert state(folder)["global_step"] == stop
    main(fit(folder, *options, f"--ckpt_path={folder}"))
    assert_same(state(folder), expected)


def logged(folder: Path) -> list[tuple[str, str, str]]:
    """Everything in the table of what a training logged: step, name and value."""
    with (folder / "metrics.csv").open(newline="") as file:
        return sorted(
            (row["step"], name, value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name != "step"
        )


STOPPER = "--trainer.callbacks+=tests.processes.StopAt"
EPOCHS = ["--trainer.max_steps=-1", "--trainer.max_epochs=3", "--model.optimizer.milestones=[1,2]", STOPPER]
EARLY = (
    "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.EarlyStopping, "
    "init_args: {monitor: val/AP, mode: max, patience: 100}}"
)
SCHEDULES = {
    "epochs, workers": (12, [*EPOCHS, "--data.num_workers=2"]),
    "steps": (12, ["--trainer.max_steps=12", "--trainer.limit_val_batches=0", *EPOCHS[2:]]),
    "steps and epochs": (9, ["--trainer.max_steps=9", "--trainer.limit_val_batches=0", *EPOCHS[1:]]),
    "early stopping": (12, [*EPOCHS, EARLY]),
    "validation within an accumulation": (
        4,
        [
            *("--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.val_check_interval=2"),
            *("--trainer.accumulate_grad_batches=3", STOPPER),
        ],
    ),
    "part of an epoch": (9, [*EPOCHS, "--trainer.limit_train_batches=3"]),
}


@pytest.fixture(scope="module")
def uninterrupted(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a whole training of a schedule."""
    found: dict[str, Path] = {}

    def folder_of(schedule: str) -> Path:
        if schedule not in found:
            found[schedule] = tmp_path_factory.mktemp("uninterrupted")
            main(fit(found[schedule], *SCHEDULES[schedule][1]))
        return found[schedule]

    return folder_of


@pytest.mark.parametrize(
    ("schedule", "place"),
    [
        ("epochs, workers", "sanity 1"),
        ("epochs, workers", "batch 6"),
        ("epochs, workers", "epoch 1"),
        ("epochs, workers", "validation 5"),
        ("steps", "batch 4"),
        ("steps", "epoch 2"),
        ("steps and epochs", "epoch 1"),
        ("early stopping", "validation 3"),
        ("early stopping", "epoch 1"),
        ("validation within an accumulation", "validation 3"),
        ("validation within an accumulation", "batch 5"),
        ("part of an epoch", "batch 4"),
    ],
)
def test_a_training_that_is_told_to_end_anywhere_goes_on(
    fit: Fit, uninterrupted: Callable[[str], Path], tmp_path: Path, monkeypatch, schedule: str, place: str
) -> None:
    """Weights, moments, rates and all that was logged are those of a training that was never stopped."""
    steps, options = SCHEDULES[schedule]
    whole = uninterrupted(schedule)
    monkeypatch.setenv("STOP_AT", place)
    with pytest.raises(SystemExit) as stop:
        main(fit(tmp_path, *options))
    monkeypatch.delenv("STOP_AT")
    assert stop.value.code == 143
    main(fit(tmp_path, *options))
    assert_same(state(tmp_path), state(whole), steps)
    assert logged(tmp_path) == logged(whole)


def test_weights_of_a_training_that_has_not_ended_are_taken_with_a_word(
    fit: Fit, tmp_path: Path, monkeypatch, capsys
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    begin = fit(second, f"--model.init_from={first / 'last.ckpt'}", "--trainer.max_steps=1")
    monkeypatch.setenv("STOP_AT", "batch 2")
    with pytest.raises(SystemExit):
        main(fit(first, STOPPER))
    monkeypatch.delenv("STOP_AT")
    capsys.readouterr()
    said = f"{first / 'last.ckpt'}: saved at step 2 of a training that had not ended"
    main(begin)
    out = capsys.readouterr().out
    assert said in out
    assert re.search(rf"{first / 'last.ckpt'}: (\d) of \1 classes are taken over by name\n", out)
    main(fit(first, STOPPER))
    main([*begin, "--overwrite"])
    assert said not in capsys.readouterr().out


def test_a_training_that_runs_out_of_time_is_saved_where_it_was(fit: Fit, tmp_path: Path) -> None:
    options = ["--trainer.max_steps=-1", "--trainer.max_epochs=1000", "--data.clips_per_video=200"]
    main(fit(tmp_path, *options, "--trainer.max_time=00:00:00:02", "--trainer.limit_val_batches=0"))
    assert state(tmp_path)["global_step"] == sum(name == "train/loss" for _, name, _ in logged(tmp_path)) > 0


def begun(folder: Path) -> int:
    """Number of steps that a training has logged."""
    try:
        return len((folder / "metrics.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(fit: Fit, whole, tmp_path: Path, number: int, code: int) -> None:
    """The signal comes to all processes of the group, as a cluster and a terminal send it."""
    log, command = tmp_path / "log", fit(tmp_path / "run", "--data.num_workers=2", "--trainer.limit_val_batches=0")
    process = start(command, log)
    wait_until(lambda: begun(tmp_path / "run") >= 2, process)
    assert kill(process, number) == code, log.read_text()
    stopped = state(tmp_path / "run")["global_step"]
    assert 2 <= stopped < STEPS
    assert f"stopped by {signal.Signals(number).name} at step {stopped}; the same command goes on" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert run(command, log) == 0, log.read_text()
    assert_same(state(tmp_path / "run"), whole)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == [
            str(step) for step in range(STEPS)
        ]


@pytest.mark.slow
def test_twenty_kills_at_any_moment_change_nothing(fit: Fit, tmp_path: Path) -> None:
    """Fifteen at random moments, five while a checkpoint is being written; always the same command again."""
    steps, log, draw = 120, tmp_path / "log", random.Random(0)
    options = [f"--trainer.max_steps={steps}", "--checkpoint.every_n_train_steps=2", "--trainer.limit_val_batches=0"]
    assert run(fit(tmp_path / "whole", *options), log) == 0, log.read_text()
    folder, command = tmp_path / "run", fit(tmp_path / "run", *options)
    for while_saving in draw.sample([False] * 15 + [True] * 5, 20):
        process = start(command, log, die_while_saving=while_saving)
        process.join(300 if while_saving else draw.uniform(0.2, 1.8))
        code = kill(process) if process.exitcode is None else process.exitcode
        assert code == -signal.SIGKILL, log.read_text()
    assert 0 < state(folder)["global_step"] < steps
    assert run(command, log) == 0, log.read_text()
    assert_same(state(folder), state(tmp_path / "whole"), steps)
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.slow
def test_two_ranks_stopped_by_a_signal_or_killed_equal_two_that_were_not(fit: Fit, tmp_path: Path) -> None:
    """As a user starts them: one program, which starts the other; the signal goes to the first alone."""
    program = tmp_path / "run.py"
    program.write_text("from instanceformer.cli import main\n\nmain()\n")
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1", "--data.num_workers=2"]
    options += ["--trainer.limit_val_batches=0"]

    def begin(folder: Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(program), *fit(folder, *options, "--checkpoint.every_n_train_steps=2")]
        return subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    whole, parts = begin(tmp_path / "whole"), begin(tmp_path / "parts")
    while begun(tmp_path / "parts") < 1:
        assert parts.poll() is None, parts.communicate()[0]
        time.sleep(0.05)
    parts.send_signal(signal.SIGTERM)
    said = parts.communicate(timeout=120)[0]
    assert parts.returncode == 143, said
    stopped = state(tmp_path / "parts")["global_step"]
    assert 1 <= stopped < STEPS
    said = whole.communicate(timeout=120)[0]
    assert whole.returncode == 0, said

    parts = begin(tmp_path / "parts")
    while begun(tmp_path / "parts") < stopped + 2:
        assert parts.poll() is None, parts.communicate()[0]
        time.sleep(0.05)
    os.killpg(parts.pid, signal.SIGKILL)
    parts.communicate()
    parts = begin(tmp_path / "parts")
    said = parts.communicate(timeout=120)[0]
    assert parts.returncode == 0, said
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))
