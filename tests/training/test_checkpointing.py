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


def test_the_newest_state_is_saved_at_least_every_step() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every_n_train_steps: found 0, expected 1 or more"):
        LastCheckpoint(0)
