from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from instanceformer.data.synthetic import SyntheticOptions, synthesize
from scripts import check_gpu, timing

SCRIPTS = Path(check_gpu.__file__).parent
ON_GPU = torch.cuda.is_available()


def without(folder: Path, *packages: str) -> dict[str, str]:
    """An environment in whose processes these packages cannot be imported, and ours is not installed."""
    (folder / "sitecustomize.py").write_text(f"""
import sys
from importlib import metadata

for name in {packages}:
    sys.modules[name] = None
known = metadata.version

def version(name):
    if name == "instanceformer":
        raise metadata.PackageNotFoundError(name)
    return known(name)

metadata.version = version
""")
    sources = [folder, SCRIPTS.parent / "src", SCRIPTS.parent / "kernels"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sources))}


@dataclass(frozen=True)
class Program(check_gpu.Stage):
    program: str = ""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.program]


def dry_run(*stages: str, environment: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """What was found of each stage, by what it is; all must end well."""
    command = [sys.executable, SCRIPTS / "check_gpu.py", "--quick", "--stages", *stages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in map(json.loads, (line for line in done.stdout.splitlines() if line.startswith("{"))):
        found[entry["stage"]][entry.get("what", "outcome")] = entry
    assert done.returncode == 0, done.stdout + done.stderr
    assert {stage: entries["outcome"]["outcome"] for stage, entries in found.items()} == dict.fromkeys(stages, "ok")
    return found


def test_failed_and_late_stages_are_reported_and_the_next_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = 'print(\'{"what": "%s", "speed": 2.5}\', flush=True)'
    child = "import subprocess, time; child = subprocess.Popen(['sleep', '99'])"
    keeps = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))"
    stages = (
        Program("broken", 6, "", program=f"{says % 'before'}; raise ValueError('no such kernel')"),
        Program("late", 0, "", program=f"{child}; {keeps}; {says % 'reached'}; time.sleep(99)"),
        Program("good", 30, "", program=says % "after"),
    )
    monkeypatch.setattr(check_gpu, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--output", str(tmp_path / "found.jsonl")])
    begin = time.monotonic()
    assert check_gpu.main() == 1
    assert time.monotonic() - begin < 30

    lines, table = capsys.readouterr().out.split("\n\n")
    assert (tmp_path / "found.jsonl").read_text() == lines + "\n"
    found = [json.loads(line) for line in lines.splitlines()]
    assert [entry.get("what", entry.get("outcome")) for entry in found] == [
        *("before", "failed"),
        *("reached", "timed out"),
        *("after", "ok"),
    ]
    assert found[1]["printed"][-1] == "ValueError: no such kernel"
    assert found[4] == {"stage": "good", "what": "after", "speed": 2.5}
    assert [line.split(",")[0] for line in table.splitlines()[::2]] == ["broken: failed", "late: timed out", "good: ok"]
    assert table.splitlines()[-1].split() == ["after", "speed", "2.5"]
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # what a late stage started has ended too


def test_a_stage_may_take_what_those_before_it_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (Program("short", 60, "", program=""), Program("long", 0, "", program="import time; time.sleep(0.5)"))
    monkeypatch.setattr(check_gpu, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    assert check_gpu.main() == 0
    assert capsys.readouterr().out.count('"ok"') == 2


def test_takes_nine_minutes_at_most() -> None:
    assert sum(stage.seconds for stage in check_gpu.STAGES) < 9 * 60


def test_dry_run_of_the_short_stages(tmp_path: Path) -> None:
    environment = without(tmp_path, "wandb", "av", "pycocotools", "jsonargparse")
    found = dry_run("machine", "memory", "demo", environment=environment)
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["machine"]["copy, read and write"]["tb_s"] > 0
    assert found["machine"]["matrix product, bfloat16"]["tflop_s"] > 0
    for operator in ("plain", "fused"):
        guarded = found["memory"][f"guards, odd sizes, {operator}"]
        assert guarded["launches"] == 2
        assert guarded["error"] < 1e-5
    assert found["demo"]["demo"]["left_out"] == "not installed: jsonargparse, pycocotools"


@pytest.mark.slow
def test_dry_run_of_the_long_stages(tmp_path: Path) -> None:
    environment = without(tmp_path, "wandb", "av", "pycocotools", "jsonargparse")
    stages = ("kernel_tests", "operator", "training", "training_ddp", "streaming")
    found = dry_run(*stages, "training_compiled", "streaming_compiled", environment=environment)
    assert found["kernel_tests"]["pytest"]["passed"] > 5
    ours = found["operator"][f"decoder-demo, fused, float32, {'triton' if ON_GPU else 'cpu'}"]
    assert ours["error"] < 1e-4
    assert {"forward_ms", "backward_ms"} <= ours.keys()
    for stage, what in (
        ("training", "bf16-mixed"),
        ("training", "bf16-mixed, 2 clips"),
        ("training_ddp", "float32, DDP"),
        ("training_compiled", "float32, compiled"),
    ):
        entry = found[stage][what]
        assert entry["step_s"] > 0
        assert entry["peak_gib"] > 0
        assert 1 < entry["loss"] < 1000
        assert ("kernels" in entry) == ON_GPU
    assert found["streaming"]["64x96, float32"]["error"] == 0
    assert 0 < found["streaming"]["64x96, bf16"]["error"] < 0.2
    assert found["streaming"]["64x96, online segmenter, float32"]["fps"] > 0
    assert found["streaming_compiled"]["64x96, bf16 compiled"]["error"] < 0.2


@pytest.mark.slow
def test_dry_run_of_the_demo(tmp_path: Path) -> None:
    found = dry_run("demo", environment=without(tmp_path, "wandb", "av"))["demo"]
    assert found["demo, test"]["seconds"] > 0
    assert found["demo, float32"]["error"] == 0


def test_training_and_its_data_need_no_films_no_wandb_and_no_pycocotools(tmp_path: Path) -> None:
    synthesize(tmp_path / "data", SyntheticOptions(train_videos=2, valid_videos=1, length=8))
    program = """
from pathlib import Path
import instanceformer.training.callbacks
from instanceformer import InstanceFormer, VideoInstanceSegmenter, __version__
from instanceformer.data.datamodule import Split, VideoDataModule
from instanceformer.training.module import InstanceFormerModule

assert __version__ == "not installed"
data = VideoDataModule(Split(Path("data/train.json"), Path("data/JPEGImages")), clip_frames=2, num_workers=0)
data.setup("fit")
batch = next(iter(data.train_dataloader()))
network = InstanceFormer(4, backbone="small", dim=32, num_queries=12, num_heads=4, encoder_layers=1, decoder_layers=1)
module = InstanceFormerModule(network)
module.compute_losses(batch).total(module.losses).backward()
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env=without(tmp_path, "wandb", "av", "pycocotools", "jsonargparse"),
        cwd=tmp_path,
        check=True,
    )


class Kernel:
    """One that copies its second tensor to its first, and does more."""

    def __init__(self, writes: int = 0, reads: int = 0) -> None:
        self.writes, self.reads = writes, reads

    def __getitem__(self, grid: object) -> Any:
        def run(to: torch.Tensor, source: torch.Tensor) -> None:
            to.copy_(source)
            end = to.storage_offset() + to.numel()
            to.as_strided((self.writes,), (1,), end).fill_(1)
            if self.reads:
                to[-1] = source.as_strided((1,), (1,), source.storage_offset() + source.stride(0) * len(source))[0]

        return run


def test_guards_find_what_lies_beyond_a_tensor() -> None:
    pytest.importorskip("triton")
    from scripts.guards import GuardedKernel

    source = torch.arange(3.0)
    for strided in (source, torch.arange(6.0)[::2], torch.ones(1).expand(3)):
        to, guarded = torch.zeros(3), GuardedKernel(Kernel())
        guarded[(1,)](to, strided)
        assert torch.equal(to, strided)
        assert (guarded.launches, guarded.broken) == (1, [])
    guarded = GuardedKernel(Kernel(writes=1))
    guarded[(1,)](torch.zeros(3), source)
    assert guarded.broken == [0]
    to = torch.zeros(3)
    GuardedKernel(Kernel(reads=1))[(1,)](to, source)
    assert to[:2].tolist() == [0, 1]
    assert to[2].isnan()


def test_the_clock_times_again_where_the_gpu_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = timing.Clock(torch.device("cpu"))
    clock.on_gpu = True
    queued: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            queued.append("event")

        def query(self) -> bool:  # the GPU comes to the event once it has flushed: four times take long enough
            return clock.flushes < 4

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert clock.time(lambda: queued.append("call")) == 1.5
    assert clock.flushes == 4
    assert queued == ["event", "call", "event"] * 3


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_clock_does_not_count_what_the_cpu_does_before_the_kernel() -> None:
    clock, x = timing.Clock(torch.device("cuda")), torch.zeros(1, device="cuda")

    def call() -> None:
        time.sleep(0.005)
        x.add_(1)

    clock.warm_up(call)
    assert clock.time(call) < 1
    queue = clock.queue(call)
    assert queue is not None
    assert queue > 5


def test_activity_counts_kernels_copies_waits_and_busy_time() -> None:
    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    events = [
        event("gemm", 0, 1000),
        event("Memcpy HtoD (Pageable -> Device)", 500, 1500),  # on another stream
        event("relu", 2000, 2500),
        event("gemm", 2100, 2200),
        event("cudaStreamSynchronize", 0, 9000, DeviceType.CPU),
        event("cudaStreamSynchronize", 0, 9000, DeviceType.CPU),
        event("cudaLaunchKernel", 0, 5, DeviceType.CPU),
    ]
    profile: Any = SimpleNamespace(events=lambda: events)
    assert timing.Activity.of(profile) == timing.Activity(kernels=3, copies=1, waits=2, busy_ms=2.0)
    assert timing.Activity.of(profile, steps=2).busy_ms == 1.0
