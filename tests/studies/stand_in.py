"""A program that does in a moment what a sweep sees of ``fit`` and ``test``: a lock, steps, a checkpoint, signals.

What is measured depends on the steps being made each once and in order.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from instanceformer.files import locking, replacing

STEPS = 8


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def fit(folder: Path, options: dict[str, str]) -> None:
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    if start := options.get("model.init_from"):
        assert len(Path(start).read_text().split()) == STEPS, "the stage is not complete"
    if os.environ.get("FAIL", "none") in str(folder):
        sys.exit("instanceformer fit: found no luck\n(--debug shows where)")
    last, curves = folder / "last.ckpt", folder / "metrics.csv"
    steps = last.read_text().split() if last.exists() else []
    rate = float(options.get("model.optimizer.lr", "0"))
    while len(steps) < STEPS:
        time.sleep(float(os.environ.get("PACE", "0.02")))
        steps.append(str(len(steps)))
        write(last, " ".join(steps))
        write(curves, "".join(["step,val/AP\n", *(f"{step},{rate * float(step)}\n" for step in steps)]))
        if told:
            print(f"stopped at step {len(steps)}")
            sys.exit(128 + signal.SIGTERM)


def test(folder: Path, options: dict[str, str]) -> None:
    steps = (folder / "last.ckpt").read_text().split()
    assert steps == [str(step) for step in range(STEPS)]
    value = int(options["model.network.memory_frames"]) / 10 + int(options["seed_everything"]) / 100
    write(folder / "results.json", "[]")
    files = {"annotations": "a.json", "images": "images"}
    write(folder / "results.metrics.json", json.dumps({"metrics": {"test/AP": value}, "run": {}, "files": files}))


def main() -> None:
    command, *arguments = sys.argv[1:]
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    folder = Path(options["trainer.default_root_dir"])
    with locking(folder / ("last.ckpt" if command == "fit" else "results.json")):
        devices, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
        with (folder / "calls.txt").open("a") as calls:
            print(command, devices, threads, file=calls)
        {"fit": fit, "test": test}[command](folder, options)


if __name__ == "__main__":
    main()
