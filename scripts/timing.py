"""What the scripts that measure share: a clock, a GPU's activity, the machine that they name, a table."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType

WARM_UP = 2
MIN_REPEATS = 3


class Clock:
    """Milliseconds of a call: on a GPU of its kernels alone, with nothing of the call before left in its L2 cache.

    A GPU that waits for its next kernel between the two events would be timed as if it worked. So it is kept busy, by
    flushing its cache again and again, until the whole call is queued.
    """

    MOST_FLUSHES = 256  # some 20 ms: for a call that waits for the GPU itself no number would do

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.flush = torch.empty(2**28 if self.on_gpu else 0, dtype=torch.uint8, device=device)
        self.flushes = 1

    def warm_up(self, function: Callable[[], object]) -> None:
        """Call it once, to its end, so that nothing is left to be compiled or allocated."""
        function()
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, function: Callable[[], object]) -> float:
        """Call it once; again, if the GPU was free before the call was queued."""
        if not self.on_gpu:
            begin = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - begin)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        while True:
            for _ in range(self.flushes):
                self.flush.zero_()
            start.record()
            function()
            end.record()
            waited = start.query()
            end.synchronize()
            if not waited or self.flushes == self.MOST_FLUSHES:
                return float(start.elapsed_time(end))
            self.flushes *= 2

    def queue(self, function: Callable[[], object], repeats: int = 20) -> float | None:
        """Median of the milliseconds that the CPU takes to queue a call on an idle GPU; None on a CPU."""
        if not self.on_gpu:
            return None
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
        return statistics.median(times)


def take_turns(
    functions: Sequence[Callable[[], object]], clock: Clock, repeats: int, budget: float
) -> list[list[float]]:
    """Times of each function, all of them called once a round; ``budget`` is in seconds for each function."""
    total = budget * len(functions)
    begin = time.monotonic()
    for warm in range(WARM_UP):
        if warm == 0 or time.monotonic() - begin < total:  # once is enough where a round takes long
            for function in functions:
                clock.warm_up(function)
    times: list[list[float]] = [[] for _ in functions]
    deadline = time.monotonic() + total
    while len(times[0]) < repeats and (len(times[0]) < MIN_REPEATS or time.monotonic() < deadline):
        for function, series in zip(functions, times, strict=True):
            series.append(clock.time(function))
    return times


@dataclass(frozen=True)
class Activity:
    """What a GPU did.

    Attributes:
        kernels: that ran.
        copies: between host and device, on the device, and fills.
        waits: of the CPU for the GPU, ``item()`` and the like.
        busy_ms: with at least one kernel or copy running.
    """

    kernels: int
    copies: int
    waits: int
    busy_ms: float

    @classmethod
    def of(cls, profile: torch.profiler.profile, steps: int = 1) -> Activity:
        """Of each of so many equal steps that were profiled."""
        spans, kernels, waits = [], 0, 0
        for event in profile.events():
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
                spans.append((event.time_range.start, event.time_range.end))
                kernels += not event.name.startswith(("Memcpy", "Memset"))
            waits += event.name.startswith(("cudaStreamSynchronize", "cudaEventSynchronize", "hipStreamSynchronize"))
        busy = reached = 0.0  # in microseconds
        for start, end in sorted(spans):
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return cls(
            round(kernels / steps), round((len(spans) - kernels) / steps), round(waits / steps), busy / 1e3 / steps
        )


def allow_tf32(allowed: bool) -> None:
    """Whether matrix products and convolutions of float32 may round their factors to TF32, on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


@dataclass(frozen=True)
class Machine:
    """What times depend on.

    Attributes:
        processor: its name.
        cores: that the operating system counts.
        threads: that PyTorch computes with.
        gpu: its name, if there is one.
        system: name of the operating system.
        versions: of python and of packages, None for one that is not installed.
    """

    processor: str
    cores: int | None
    threads: int
    gpu: str | None
    system: str
    versions: dict[str, str | None]

    @classmethod
    def this(cls, *packages: str, device: torch.device | None = None) -> Machine:
        """The machine of this process, with the versions of these packages beside PyTorch's."""
        on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
        return cls(
            processor(),
            os.cpu_count(),
            torch.get_num_threads(),
            torch.cuda.get_device_name(device) if on_gpu else None,
            operating_system(),
            {"python": platform.python_version(), "torch": torch.__version__}
            | {name: version(name) for name in packages},
        )

    def lines(self) -> tuple[str, str]:
        """The machine, and the versions."""
        cpu = f"{self.processor}, {self.threads} thread{'s' if self.threads > 1 else ''}, {self.system}"
        versions = ", ".join(f"{name} {version or '-'}" for name, version in self.versions.items())
        return f"{self.gpu}; {cpu}" if self.gpu else cpu, versions

    def __str__(self) -> str:
        return "; ".join(self.lines())


def peak_memory() -> float:
    """MiB that this process has had in memory at most."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10  # getrusage would count what it was forked from, too


def positive(text: str) -> int:
    """An argument of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return int(text)


def table(columns: Sequence[object], rows: Iterable[Sequence[object]], text: int = 1) -> str:
    """Lines of cells, each column as wide as need be: the first ``text`` ones to the left, the others to the right."""
    cells = [list(map(str, row)) for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        [
            cell.ljust(width) if i < text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
