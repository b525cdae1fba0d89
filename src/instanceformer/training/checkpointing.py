"""Checkpoints from which a training goes on as if nothing had happened, whatever ended it."""

from __future__ import annotations

import signal
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from instanceformer import checkpoints
from instanceformer.files import replacing

LAST = "last.ckpt"
"""Name of the checkpoint in the run's folder from which a training is resumed."""


class CheckpointFiles(CheckpointIO):
    """How every checkpoint of the trainer and its callbacks is written and read.

    A file is written beside its target, flushed and renamed, so that a kill or a full disk leaves the one before it.
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
        """Read what ``fit`` or ``convert`` wrote, on the CPU; see ``checkpoints.load_for_trainer``."""
        return checkpoints.load_for_trainer(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, if it is there."""
        Path(path).unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keeps the newest state of a training in ``last.ckpt``, and saves it when the process is told to end.

    It is written every so many optimizer steps, before and after every validation and at the end of every epoch. On
    SIGTERM, as a cluster sends it before it takes a machine away, or on SIGINT (Ctrl-C), to any process, the optimizer
    step that is running is finished and saved, and the program ends with the exit code 143 or 130. In a validation it
    ends with the chunk; a resumed training does not take that validation up again. A second signal ends it at once.

    ``test`` and ``predict`` end at once, since each video's results are kept as soon as it is finished.

    Args:
        every_n_train_steps: optimizer steps from one save to the next within an epoch.
    """

    def __init__(self, every_n_train_steps: int = 500) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"checkpoint.every_n_train_steps: expected 1 or more, found {every_n_train_steps}")
        self.every_n_train_steps = every_n_train_steps
        self._saved_step = -1
        self._signal: int | None = None
        self._leaves = False
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen."""
        self._saved_step = trainer.global_step
        self._signal = signal.SIGTERM if trainer.received_sigterm else None  # to which Lightning listened before
        self._listen(self._remember)
        if self._stops(trainer):
            self._leave(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen, to a signal that Lightning would not heed."""
        self._listen(_end)

    on_predict_start = on_test_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop where it is time to, after an optimizer step; what ends an epoch is saved at its end."""
        if (
            trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            or (batch_idx + 1) % trainer.accumulate_grad_batches
        ):
            return
        self._leaves = self._stops(trainer)
        if self._leaves or trainer.global_step in (trainer.max_steps, self._saved_step + self.every_n_train_steps):
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the next batch: only now has Lightning handed what the last step logged to the loggers."""
        if self._leaves:
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the epoch came to, unless ``max_steps`` cut it off, which a later training may go beyond."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)
        if self._stops(trainer):
            self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is about to be validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what other callbacks made of the validation."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop where that is asked for; each process for itself, since they have different numbers of chunks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._signal is not None:
            if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
                trainer.strategy.launcher.kill(signal.SIGKILL)  # the others would wait for this one
            self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let signals do what they did before."""
        self._unlisten()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let signals do what they did before."""
        self._unlisten()

    def _save(self, trainer: Trainer) -> None:
        if not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / LAST, weights_only=False)
            self._saved_step = trainer.global_step

    def _stops(self, trainer: Trainer) -> bool:
        """Whether any process was told to end."""
        return bool(trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False))

    def _leave(self, trainer: Trainer) -> None:
        number = self._signal or signal.SIGTERM
        if not trainer.is_global_zero:
            raise SystemExit(0)  # Lightning takes another code for a crash and kills the process that saves
        print(
            f"stopped by {signal.Signals(number).name} at step {trainer.global_step}; the same command goes on from "
            f"{Path(trainer.default_root_dir) / LAST}"
        )
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
        if self._signal is not None:
            _end(number, frame)
        self._signal = number


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
