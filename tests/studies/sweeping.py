"""Sweeps in processes of their own, to be killed, with the stand-in or the real program."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests import processes

STAND_IN = Path(__file__).with_name("stand_in.py")


def write_program(folder: Path) -> str:
    """The stand-in as a program."""
    program = folder / "instanceformer"
    program.write_text(f"#!{sys.executable}\nimport runpy\nrunpy.run_path({str(STAND_IN)!r}, run_name='__main__')\n")
    program.chmod(0o700)
    return str(program)


def start(
    arguments: Sequence[str], folder: Path, log: Path, program: str | None = None, **environment: str
) -> BaseProcess:
    """Run ``instanceformer sweep ARGUMENTS`` in a folder.

    Args:
        arguments: of the command.
        folder: where it runs.
        log: file that takes what it prints.
        program: that the runs start; None: the real one.
        **environment: variables.
    """
    process: BaseProcess = processes.CONTEXT.Process(  # type: ignore[attr-defined]
        target=_sweep, args=(["sweep", *arguments], folder, log, program, environment), daemon=False
    )
    process.start()
    return process


def _sweep(arguments: list[str], folder: Path, log: Path, program: str | None, environment: dict[str, str]) -> None:
    from instanceformer.commands import compare
    from instanceformer.studies import queue, sweep

    os.chdir(folder)
    queue.PAUSE = sweep.PAUSE = 0.05
    if program is not None:
        sweep.PROGRAM, compare.run = program, lambda args: None  # there is nothing that could be measured again
    processes._run(arguments, log, False, environment)


def end(process: BaseProcess) -> int:
    """Wait for the end of a sweep: its exit code."""
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode
