"""The command line in processes of their own, to be killed; they begin fast, with everything imported."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class StopAt(Callback):
    """Has the process told to end by SIGTERM, at the place that the variable STOP_AT names: a hook and its number."""

    def __init__(self) -> None:
        self.hook, _, number = os.environ.get("STOP_AT", "").partition(" ")
        self.left = int(number or 0)

    def _pass(self, hook: str) -> None:
        if hook == self.hook:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGTERM)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass("sanity")

    def on_train_batch_end(self, *_: Any) -> None:
        self._pass("batch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass("epoch")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._pass("validation")


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["instanceformer.commands.train", "instanceformer.studies.sweep", "tests.processes"])


def start(arguments: Sequence[str], log: Path, die_while_saving: bool = False, **environment: str) -> BaseProcess:
    """Run ``instanceformer ARGUMENTS``, on one thread, as a group of processes of its own.

    Args:
        arguments: of the command line.
        log: file that takes what it prints.
        die_while_saving: the process kills itself in the middle of the first checkpoint that it writes.
        **environment: variables.
    """
    process: BaseProcess = CONTEXT.Process(  # type: ignore[attr-defined]
        target=_run, args=(list(arguments), log, die_while_saving, environment), daemon=False
    )
    process.start()
    return process


def run(arguments: Sequence[str], log: Path, **options: Any) -> int:
    """``start``, wait for the end and give the exit code; negative numbers are those of signals."""
    process = start(arguments, log, **options)
    process.join(300)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Wait for something that the process is to do."""
    while not condition():
        assert process.is_alive(), "the process ended too early"
        time.sleep(0.005)


def kill(process: BaseProcess, number: int = signal.SIGKILL) -> int:
    """Signal the process and all its children, and wait for its end: its exit code."""
    assert process.pid is not None
    os.killpg(process.pid, number)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], log: Path, die_while_saving: bool, environment: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    os.environ |= {"OMP_NUM_THREADS": "1", **environment}  # Lightning's launcher goes by it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv[1:] = []
    torch.set_num_threads(1)
    if die_while_saving:
        torch.save = _save_half
    from instanceformer.cli import main

    main(arguments)


def _save_half(content: Any, path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 the beginning of a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)
