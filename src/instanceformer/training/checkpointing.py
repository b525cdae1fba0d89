"""Checkpoints from which a training resumes as if it had never stopped, whatever stopped it."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from instanceformer import checkpoints
from instanceformer.files import replacing

PAUSE = 1.0
"""Seconds after a signal in which another one counts as the same: launchers and process groups pass signals on."""


class CheckpointFiles(CheckpointIO):
    """Writes and reads all checkpoints of the trainer and its callbacks.

    A file is written beside its target, flushed and renamed, so that the previous one survives a kill or a full disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; see ``files.replacing`` for errors."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of ``fit`` or ``convert`` onto the CPU; see ``checkpoints.load_for_trainer``."""
        return checkpoints.load_for_trainer(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file if it exists."""
        Path(path).unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keeps the newest state of a training in ``last.ckpt``, and saves it when the process is told to stop.

    It is saved every ``every_n_train_steps`` optimizer steps, before every validation, at the end of every epoch and
    when something stops the training. On SIGTERM, which clusters send before they take a machine away, or SIGINT
    (Ctrl-C), the current optimizer step is finished and saved, and the program exits with code 143 or 130. During a
    validation it exits after the current chunk; a resumed training starts that validation over. A second signal, a
    second or more later, ends the program at once.

    Any process may receive the signal. During a validation only the first one acts on it right away; a signal to
    another takes effect at the next training step.

    ``validate``, ``test`` and ``predict`` exit at once, since each video's results are saved as soon as it is finished.

    Args:
        every_n_train_steps: optimizer steps between two saves within an epoch.
    """

    def __init__(self, every_n_train_steps: int = 500) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"checkpoint.every_n_train_steps: found {every_n_train_steps}, expected 1 or more")
        self.every_n_train_steps = every_n_train_steps
        self._saved_step = 0
        self._validates = False  # whether a validation is unfinished, here or in the resumed checkpoint
        self._signal: int | None = None
        self._told = 0.0  # when the signal came
        self._leaves = False
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation is still to be done."""
        return {"validates": self._validates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._validates = state_dict["validates"]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals: with Lightning's own handler, a training that was told to stop would look finished."""
        self._listen(self._remember)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals; continue exactly where the checkpoint left off."""
        self._saved_step = trainer.global_step
        if trainer.received_sigterm:  # before signals were handled here
            self._signal = signal.SIGTERM
        self._listen(self._remember)
        if trainer.ckpt_path is not None:
            take_up(trainer.fit_loop, self._validates)
        if self._stops(trainer):
            self._leave(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the next batch: only now has Lightning passed the last step's metrics to the loggers."""
        if self._leaves:
            self._leave(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimizer step if a save is due; the last step of an epoch is saved at the epoch's end."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or not has_stepped(trainer):
            return
        self._leaves = self._stops(trainer)
        is_due = trainer.global_step in (trainer.max_steps, self._saved_step + self.every_n_train_steps)
        if is_due or self._leaves or trainer.should_stop:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the epoch was cut short and is saved already: from that save it can be continued."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or trainer.global_step != self._saved_step:
            self._save(trainer)
        if self._stops(trainer):
            self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state that is about to be validated, unless gradients are being accumulated."""
        if trainer.state.fn == "validate":
            self._listen(partial(_end, trainer))
        elif not trainer.sanity_checking:
            self._validates = True
            if has_stepped(trainer):
                self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop all processes if the first one was told to stop."""
        if trainer.state.fn == "fit" and self._signal is not None and trainer.is_global_zero:
            _end_others(trainer)
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that no validation is to be done any more."""
        if not trainer.sanity_checking:
            self._validates = False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals, which Lightning would not act on here."""
        self._listen(partial(_end, trainer))

    on_predict_start = on_test_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self._unlisten()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._unlisten()

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(trainer.default_root_dir) / checkpoints.LAST, weights_only=False)
            self._saved_step = trainer.global_step

    def _stops(self, trainer: Trainer) -> bool:
        """Whether any process was told to stop."""
        return bool(trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False))

    def _leave(self, trainer: Trainer) -> None:
        number = self._signal or signal.SIGTERM
        if not trainer.is_global_zero:
            raise SystemExit(0)  # Lightning takes any other code for a crash and kills the process that is saving
        last = Path(trainer.default_root_dir) / checkpoints.LAST
        goes_on = f"from {last}" if last.is_file() else "from the beginning"
        name = signal.Signals(number).name
        print(f"stopped by {name} at step {self._saved_step}; the same command goes on {goes_on}")
        raise SystemExit(128 + number)

    def _listen(self, handler: Any) -> None:
        if current_thread() is main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers.setdefault(number, signal.getsignal(number))
                signal.signal(number, handler)

    def _unlisten(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._told = number, now
        elif now > self._told + PAUSE:
            raise SystemExit(128 + number)


def has_stepped(trainer: Trainer) -> bool:
    """Whether the last training batch ended with an optimizer step, so that no gradients are accumulated."""
    loop = trainer.fit_loop.epoch_loop
    return loop.batch_progress.is_last_batch or (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0


def take_up(loop: _FitLoop, validates: bool) -> None:
    """Make Lightning's loops continue from a checkpoint as if the training had never stopped.

    Args:
        loop: the loop that the checkpoint was loaded into.
        validates: whether the checkpoint was written before a validation.
    """
    epoch_loop = loop.epoch_loop
    if loop.restarted_on_epoch_end:  # Lightning would take the next epoch's first batch for the last of this one
        loop.epoch_progress.increment_completed()
        for part in (loop, epoch_loop, epoch_loop.val_loop):
            part._restarting = False
        loop.reset_restart_stage()
        epoch_loop.reset_restart_stage()
    if validates:  # Lightning would skip the validation
        epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        epoch_loop.val_loop._restarting = False
    assert loop._data_fetcher is not None
    iter(loop._data_fetcher)  # workers may have started on the first batches, before Lightning knew its position


def _end_others(trainer: Trainer) -> None:
    """Kill the processes that this one has launched; they would wait for it."""
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy.launcher.kill(signal.SIGKILL)


def _end(trainer: Trainer, number: int, frame: FrameType | None) -> None:
    _end_others(trainer)
    raise SystemExit(128 + number)
