"""Everything that the first hour on a GPU should say, in one command of at most nine minutes.

    python scripts/check_gpu.py [--quick] [--stages NAME ...] [--output FILE]

Each stage is a process of its own, which may take the seconds below and those that the stages before it have left over,
with ``--quick`` five times as many:

{stages}

What a stage finds is printed as it comes, one JSON object a line, also into ``--output``: the ``stage``, ``what`` was
measured, its figures (names end in their units), or its ``error``, or why it was ``left_out``; and when the stage ends
its ``outcome``: ok, failed or timed out, after which the next one begins. A table comes last. The exit code is 1 if a
stage failed or timed out. Without a GPU, use ``--quick``: tiny sizes, which show that the stages work and give no
figures to go by. Runs from the sources, with torch, Triton, torchvision, Lightning, torchmetrics, SciPy and Matplotlib;
the demo needs jsonargparse and pycocotools as well, and the kernels' tests pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
TAIL = 12
"""Lines of other output that are shown of a stage that failed."""


@dataclass(frozen=True)
class Stage:
    """Attributes: its name, the seconds that are its own, and what it shows."""

    name: str
    seconds: float
    shows: str

    @property
    def command(self) -> list[str]:
        """What runs it."""
        return [sys.executable, str(SCRIPTS / "gpu_stages.py"), self.name]


STAGES = (
    Stage("machine", 15, "versions; copies, matrix products, launches"),
    Stage("kernel_tests", 95, "the tests of deform_attn, compiled, and of CUDA graphs"),
    Stage("memory", 40, "reads and writes beyond tensors: guards, compute-sanitizer"),
    Stage("operator", 60, "deformable attention against grid_sample, plain and compiled, and other packages"),
    Stage("training", 90, "20 steps of the paper's network: float32, TF32, bf16-mixed, 16-mixed"),
    Stage("training_ddp", 30, "the same under DDP with NCCL"),
    Stage("streaming", 45, "frames a second at 360x640 and 720x1280, from Python and by CUDA graph"),
    Stage("demo", 50, "the command line: first steps of the demo's trainings, its test"),
    Stage("training_compiled", 60, "20 steps, compiled"),
    Stage("streaming_compiled", 40, "frames a second, compiled"),
)


def lines_until(deadline: float, process: subprocess.Popen[str]) -> Iterator[str]:
    """What the process prints; at the deadline it is killed, with all that it has started."""
    assert process.stdout is not None
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), kill, [process])
    timer.start()
    try:
        yield from process.stdout
    finally:
        timer.cancel()
        kill(process)
        process.wait()


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(stage: Stage, quick: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """What a stage finds, and at last its outcome; ``deadline`` is on ``time.monotonic``'s clock."""
    paths = [ROOT / "src", ROOT / "kernels", SCRIPTS, ROOT]
    known = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([known] if known else [])]),
        "PYTHONUNBUFFERED": "1",
    }
    begin = time.monotonic()
    process = subprocess.Popen(
        [*stage.command, *(["--quick"] if quick else [])],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=TAIL)
    for line in lines_until(deadline, process):
        entry = parse(line)
        if entry is None and line.strip():
            tail.append(line.rstrip()[:300])
        if entry is not None:
            yield {"stage": stage.name, **entry}
    outcome: dict[str, Any] = {"stage": stage.name, "outcome": "ok", "seconds": time.monotonic() - begin}
    if process.returncode != 0:
        late = process.returncode == -signal.SIGKILL and time.monotonic() >= deadline
        outcome |= {"outcome": "timed out" if late else "failed", "code": process.returncode, "printed": list(tail)}
    yield outcome


def parse(line: str) -> dict[str, Any] | None:
    """The object that a line holds, if it is one of a stage's."""
    if line.startswith('{"what"'):
        with suppress(ValueError):
            return dict(json.loads(line))
    return None


def readable(value: Any) -> str:
    """With three digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def table(entries: Sequence[dict[str, Any]]) -> str:
    """One line for each object that was printed, below the outcome of its stage."""
    rows = []
    for end in (entry for entry in entries if "outcome" in entry):
        rows.append(f"{end['stage']}: {end['outcome']}, {end['seconds']:.0f} s")
        for entry in (entry for entry in entries if entry["stage"] == end["stage"] and "what" in entry):
            figures = {key: x for key, x in entry.items() if key not in ("stage", "what") and x is not None}
            text = ", ".join(f"{key} {readable(x)}" for key, x in figures.items())
            rows.append(f"  {entry['what']:46} {' '.join(text.split())[:200]}")
    return "\n".join(rows)


def main() -> int:
    listed = "\n".join(f"    {stage.name:20}{stage.seconds:4.0f} s  {stage.shows}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        description=str(__doc__).format(stages=listed), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME", help="all by default")
    parser.add_argument("--output", type=Path, help="file for the JSON lines, too")
    options = parser.parse_args()
    output = open(options.output, "w") if options.output else None  # noqa: SIM115  (open as long as the script runs)
    entries = []
    deadline = time.monotonic()
    for stage in STAGES:
        if stage.name not in options.stages:
            continue
        deadline += stage.seconds * (5 if options.quick else 1)
        for entry in run(stage, options.quick, deadline):
            line = json.dumps(entry)
            print(line, flush=True)
            if output is not None:
                print(line, file=output, flush=True)
            entries.append(entry)
    print(f"\n{table(entries)}")
    return int(any(entry.get("outcome", "ok") != "ok" for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
