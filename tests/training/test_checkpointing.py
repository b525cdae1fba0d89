"""Checkpoint files, whatever happens while they are written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.processes import _save_half

from instanceformer.training.callbacks import MetricsFile
from instanceformer.training.checkpointing import CheckpointFiles, LastCheckpoint

MEMORY = Path("/dev/shm")


@pytest.fixture(params=["temporary files on the same disk", "on another one"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run; the system's temporary folder is elsewhere, and full: nothing may be written there."""
    elsewhere = tmp_path / "temporary"
    monkeypatch.setenv("TMPDIR", str(elsewhere))  # which is not there, so that whoever writes to it fails
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    if request.param == "temporary files on the same disk":
        yield tmp_path
        return
    if not os.access(MEMORY, os.W_OK) or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=MEMORY) as other:
        yield Path(other)


def die_while_saving(path: Path) -> None:
    torch.save = _save_half
    CheckpointFiles().save_checkpoint({"step": 2}, path)


def test_a_kill_while_saving_leaves_the_checkpoint_before(folder: Path) -> None:
    path = folder / "run" / "last.ckpt"
    CheckpointFiles().save_checkpoint({"step": 1}, path)
    process = multiprocessing.get_context("fork").Process(target=die_while_saving, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(path.parent.iterdir())) == 2  # it had begun, in the folder itself
    assert torch.load(path, weights_only=True) == {"step": 1}
    CheckpointFiles().save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}


def test_what_is_logged_is_a_table_that_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": 4.0 - step}, step)
    first.log_metrics({"AP": 0.25}, 3)
    with first.path.open("a") as file:
        file.write("4,0.")  # a kill in the middle of a row
    second = MetricsFile(tmp_path)
    second.log_metrics({"loss": 9.0}, 2)
    second.log_metrics({"loss": 8.0}, 3)
    assert first.path.read_text().split() == ["step,loss,AP", "0,4.0,", "1,3.0,", "2,9.0,", "3,8.0,"]


def test_the_newest_state_is_saved_at_least_every_step() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every_n_train_steps: expected 1 or more, found 0"):
        LastCheckpoint(0)
