"""The stages of scripts/check_gpu.py, each a process of its own that prints what it finds as lines of JSON.

    python scripts/gpu_stages.py STAGE [--quick]

Every line is an object with ``what`` was measured and its figures, or the ``error`` it came to; what needs something
that is missing says so under ``left_out``. Anything else that is printed is for whoever looks for the cause of a
failure. The exit code is 1 if there was an error. Needs src, kernels, scripts and the root on PYTHONPATH, as
check_gpu.py sets it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from instanceformer import InstanceFormer

ROOT = Path(__file__).resolve().parents[1]
QUICK = "--quick" in sys.argv
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
STAGES: dict[str, Callable[[], None]] = {}
_failed: list[str] = []


def stage(function: Callable[[], None]) -> Callable[[], None]:
    STAGES[function.__name__] = function
    return function


def emit(what: str, **figures: object) -> None:
    print("\n" + json.dumps({"what": what, **figures}), flush=True)  # which may find itself behind pytest's dots


def fail(what: str, error: object) -> None:
    text = str(error).strip() or type(error).__name__
    _failed.append(what)
    emit(what, error=f"{type(error).__name__}: {text}" if isinstance(error, Exception) else text)


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """What goes wrong in the block is reported, and the stage goes on."""
    try:
        yield
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        fail(what, error)


@stage
def machine() -> None:
    """Versions, and what the machine can do: copies, matrix products, launches."""
    from timing import Clock, Machine, allow_tf32

    described = Machine.this("triton", "lightning", "torchvision", "torchmetrics", "numpy", "scipy")
    emit("versions", **described.versions)
    emit("machine", processor=described.processor, cores=described.cores, system=described.system)
    clock = Clock(DEVICE)
    if clock.on_gpu:
        properties = torch.cuda.get_device_properties(DEVICE)
        emit(
            "gpu",
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            cuda=torch.version.cuda or torch.version.hip,
            nccl=".".join(map(str, torch.cuda.nccl.version())),
        )

    def best(function: Callable[[], object]) -> float:
        """Seconds."""
        for _ in range(2):
            clock.warm_up(function)
        return min(clock.time(function) for _ in range(3 if QUICK else 10)) / 1e3

    size = 2**20 if QUICK else 2**30
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    emit("copy, read and write", tb_s=2 * size / best(lambda: target.copy_(source)) / 1e12)
    side = 128 if QUICK else 8192
    for name in ("bfloat16", "float16", "tf32", "float32"):
        dtype = getattr(torch, name, torch.float32)
        with attempt(f"matrix product, {name}"):
            allow_tf32(name == "tf32")
            a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
            emit(f"matrix product, {name}", tflop_s=2 * side**3 / best(lambda a=a, b=b: a @ b) / 1e12)
    small, count = torch.zeros(1, device=DEVICE).add_(1), 100 if QUICK else 2000
    begin = time.perf_counter()
    for _ in range(count):
        small.add_(1)
    small.item()
    emit("launch of a small kernel", us=1e6 * (time.perf_counter() - begin) / count)


@stage
def kernel_tests() -> None:
    """The tests of deform_attn and of CUDA graphs, on the GPU with compiled kernels."""
    if find_spec("pytest") is None:
        emit("pytest", left_out="pytest is not installed")
        return
    import pytest

    class Recorder:
        counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.counts[report.outcome] += 1
                if report.failed:
                    fail(report.nodeid.partition("::")[2], str(report.longrepr).strip().splitlines()[-1])
                if sum(self.counts.values()) % (3 if QUICK else 50) == 0:
                    emit("pytest, so far", **self.counts)

    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short"]
    arguments += [str(ROOT / "tests" / name) for name in ("inference/test_graphs.py", "deform_attn")]
    if QUICK:
        arguments += ["-k", "known_values or odd_sizes and boxes and triton"]
    elif find_spec("xdist") is not None:  # kernels are compiled on the CPU, most of the time
        arguments += ["-n", str(min(16, os.cpu_count() or 1))]
    code = pytest.main(arguments, plugins=[Recorder()])
    emit("pytest", **Recorder.counts)
    if code and not _failed:
        fail("pytest", f"pytest ended with {code!r}")


@stage
def memory() -> None:
    """Reads and writes beyond tensors, places never written: by guards, and by compute-sanitizer if it is there."""
    check_guards()
    tool = shutil.which("compute-sanitizer")
    if DEVICE.type == "cpu" or tool is None:
        emit("compute-sanitizer", left_out="there is no GPU" if DEVICE.type == "cpu" else "it is not on the PATH")
        return
    for name in ("memcheck", "racecheck"):
        # each tensor has to be an allocation of its own, beyond whose end the tool sees
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [tool, "--tool", name, sys.executable, __file__, "tiny"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", output)
        said = [line for line in output.splitlines() if line.startswith("=========")]
        if summary is None or "Device not supported" in output:
            emit(f"compute-sanitizer {name}", left_out=f"it does not run here: {(said or [output])[-1][-200:]}")
            continue
        errors, repeated = int(summary[1]), repeated_writes(output)
        if errors > repeated or done.returncode:
            print(output[-4000:])
            fail(f"compute-sanitizer {name}", f"{errors} errors; {' '.join(said[1:4])[:300]}")
        else:
            emit(f"compute-sanitizer {name}", errors=errors - repeated, repeated_writes=repeated)


def repeated_writes(output: str) -> int:
    """Hazards in which an instruction of a warp writes one value to shared memory from several lanes.

    Triton does so where lanes hold copies of an element; a program of our kernels is a single warp. A write that meets
    another instruction is not among them.
    """
    pair = r"Race reported between Write access at (\S+) in .*\n=+ +and Write access at (\S+) in "
    return sum(first == second for first, second in re.findall(pair, output))


def check_guards() -> None:
    """Run the kernels between guards, on memory that is NaN where nothing was written, and compare the results."""
    if find_spec("triton") is None:
        emit("guards", left_out="triton is not installed")
        return
    from deform_attn_providers import Inputs, Maps, Results, Size, bind_fused, bind_plain, true_results
    from guards import guarded_kernels

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN; the backward pass warns
    warnings.filterwarnings("ignore", message=".*deterministic")
    warnings.filterwarnings("ignore", message=".*encountered in", category=RuntimeWarning)
    odd = Size("odd", 2, 5, 3, 19, ((7, 13), (1, 5), (3, 1), (1, 1)), 3)
    even = Size("even", 1, 37, 2, 32, ((8, 16), (4, 8)), 4)
    for size in (odd,) if QUICK else (odd, even):
        for name, bind in (("plain", bind_plain), ("fused", bind_fused)):
            what = f"guards, {size.name} sizes, {name}"
            with attempt(what), guarded_kernels() as kernels:
                maps = Maps.of(size.shapes, DEVICE)
                data = Inputs.of(size, DEVICE, torch.float32)
                with torch.no_grad():  # some of the points lie far outside
                    data.offsets[:, ::2] *= 40
                    data.locations[:, ::2] = (data.locations[:, ::2] - 0.5) * 3 + 0.5
                inputs = data.of_operator(name)
                truth = true_results(name, maps, inputs, data.grad)
                error = Results.of(bind("triton")(maps), inputs, data.grad).error(truth)
                for kernel, guard in kernels.items():
                    if guard.broken:
                        raise AssertionError(f"{kernel} wrote beyond its arguments {guard.broken}")
                if not error < 1e-4:
                    raise AssertionError(f"relative error {error:.1e}: read beyond a tensor, or left a place unwritten")
                emit(what, launches=sum(guard.launches for guard in kernels.values()), error=error)
    torch.use_deterministic_algorithms(False)


def tiny() -> None:
    """What the memory checker looks at."""
    from deform_attn_providers import OPERATORS, Inputs, Maps, Results, Size, bind_fused, bind_plain

    size = Size("tiny", 2, 5, 3, 19, ((7, 13), (1, 5), (3, 1), (1, 1)), 3)
    for name in OPERATORS:
        data = Inputs.of(size, DEVICE, torch.float32)
        bind = bind_plain if name == "plain" else bind_fused
        Results.of(bind("triton")(Maps.of(size.shapes, DEVICE)), data.of_operator(name), data.grad)
    torch.cuda.synchronize()


@stage
def operator() -> None:
    """Deformable attention against grid_sample, grid_sample compiled and other packages."""
    from benchmark_deform_attn import Options, measure
    from deform_attn_providers import DTYPES, OPERATORS, SIZES, error_limit, providers, usable_peers
    from timing import Clock

    peers, clock = usable_peers(DEVICE), Clock(DEVICE)
    emit("peers", found=[peer.module for peer in peers])
    names = ("decoder-demo",) if QUICK else ("encoder-360x640", "decoder-360x640", "encoder-800x1333")
    for compiles in (False,) if QUICK else (False, True):  # what takes long comes last
        for size in (size for size in SIZES if size.name in (names[:2] if compiles else names)):
            for dtype in ("float32", "bfloat16"):
                options = Options(DEVICE, DTYPES[dtype], 2 if QUICK else 20, 0.3, check=True)
                for name in ("fused",) if compiles else OPERATORS:  # as the network has it
                    with attempt(f"{size.name}, {name}, {dtype}"):
                        timed = providers(name, DEVICE, peers)
                        timed = [p for p in timed if ("compiled" in p.name) == compiles]
                        figures: dict[str, dict[str, object]] = {provider.name: {} for provider in timed}
                        for row in measure(size, name, timed, clock, options):
                            if row.direction != "forward + backward":
                                entry = figures[row.provider]
                                entry |= {"error": row.error, f"{row.direction}_ms": row.median_ms}
                                entry[f"{row.direction}_queue_ms"] = row.queue_ms
                        for provider, entry in figures.items():
                            what = f"{size.name}, {name}, {dtype}, {provider}"
                            emit(what, **entry)
                            if entry["error"] > error_limit(options.dtype):
                                fail(what, f"relative error {entry['error']:.1e}")


def train(precision: str, clips: int = 1, compiles: bool = False, ddp: bool = False) -> None:
    from instanceformer import InstanceFormer
    from measure_training_step import build, make_clips, measure
    from timing import allow_tf32

    what = precision + f", {clips} clips" * (clips > 1) + ", compiled" * compiles + ", DDP" * ddp
    with attempt(what):
        torch.compiler.reset()
        allow_tf32(precision != "float32")  # what autocast leaves in float32, too
        if QUICK:
            network = InstanceFormer(
                4, backbone="small", num_queries=12, dim=32, num_heads=4, encoder_layers=1, decoder_layers=2
            )
            batch, steps = make_clips(clips, 2, 64, 96, 2, 4), 1
        else:
            (network, batch), steps = build("paper", clips), 15
        if compiles:
            network.compile_parts(backend="aot_eager" if QUICK else "inductor")
        mode = precision if precision.endswith("mixed") else "32-true"
        emit(what, **measure(network, batch, steps, mode, ddp).flat())
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@stage
def training() -> None:
    """20 steps of the paper's network in each precision: 3 to warm up, 15 that are timed, 2 that are profiled."""
    if not QUICK:
        train("float32")
        train("tf32")
    train("bf16-mixed")
    train("bf16-mixed", clips=2 if QUICK else 4)
    if not QUICK:
        train("16-mixed")


@stage
def training_ddp() -> None:
    """The same as the only process of DDP."""
    train("float32" if QUICK else "bf16-mixed", ddp=True)


@stage
def training_compiled() -> None:
    """The same with backbone, encoder and decoder compiled."""
    for precision in ("float32",) if QUICK else ("bf16-mixed", "tf32", "16-mixed", "float32"):
        train(precision, compiles=True)


def stream_ways(compiles: bool) -> None:
    from gpu_streaming import SHOWN, moving_frames, segmenter_fps
    from instanceformer import InstanceFormer

    torch.manual_seed(0)
    network = InstanceFormer(40, **({"backbone": "small", "dim": 64, "num_queries": 20} if QUICK else {})).eval()
    network.to(DEVICE)
    shown = torch.arange(SHOWN, device=DEVICE)[None]
    for size in ((64, 96),) if QUICK else ((360, 640), (720, 1280)):
        place = f"{size[0]}x{size[1]}"
        frames = moving_frames(2 if QUICK else 20, size, DEVICE)
        report_ways(place, network, frames, shown, compiles)
        if compiles:
            continue
        for precision in ("float32", "tf32", "bf16") if DEVICE.type == "cuda" else ("float32",):
            for graph in (False, True) if DEVICE.type == "cuda" else (False,):
                what = f"{place}, online segmenter, {precision}" + ", graph" * graph
                with attempt(what):
                    emit(what, fps=segmenter_fps(network, size, len(frames), precision, graph))


def report_ways(
    place: str, network: InstanceFormer, frames: list[torch.Tensor], shown: torch.Tensor, compiles: bool
) -> None:
    from gpu_streaming import eager, measure, stream, ways

    state = network.initial_state(1)
    truth = stream(eager(network, "float32", shown), frames, state)
    for name, step in ways(network, frames[0], shown, compiles, "aot_eager" if QUICK else "inductor"):
        with attempt(f"{place}, {name}"):
            if isinstance(step, Exception):
                raise step
            emit(f"{place}, {name}", **measure(step, frames, state, truth).flat())


@stage
def streaming() -> None:
    """A video frame by frame: from Python and as a CUDA graph."""
    stream_ways(compiles=False)


@stage
def streaming_compiled() -> None:
    """The same, compiled."""
    stream_ways(compiles=True)


@stage
def demo() -> None:
    """The command line: the first steps of the demo's two trainings in mixed precision, and its test."""
    missing = [name for name in ("jsonargparse", "pycocotools") if find_spec(name) is None]
    if missing:
        emit("demo", left_out=f"not installed: {', '.join(missing)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the configurations name data/demo and runs/demo
        run_demo()


def run_demo() -> None:
    from instanceformer.cli import main

    def command(what: str, *arguments: str) -> None:
        begin = time.perf_counter()
        main(arguments)
        emit(what, seconds=time.perf_counter() - begin)

    command("demo, videos", "synthesize", "data/demo", *(["--train_videos=4", "--valid_videos=1"] if QUICK else []))
    demo, frames = (f"--config={ROOT / 'configs' / name}" for name in ("demo.yaml", "demo_frames.yaml"))
    flags = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.enable_progress_bar=false"]
    flags += [f"--trainer.accelerator={'gpu' if DEVICE.type == 'cuda' else 'cpu'}", "--trainer.logger=false"]
    flags += [f"--data.num_workers={0 if QUICK else min(8, os.cpu_count() or 1)}"]
    fit = [*flags, "--trainer.limit_val_batches=0", "--trainer.precision=bf16-mixed"]
    command("demo, steps on frames", "fit", demo, frames, *fit, f"--trainer.max_steps={2 if QUICK else 150}")
    command("demo, steps on clips", "fit", demo, *fit, f"--trainer.max_steps={2 if QUICK else 60}")
    command("demo, test", "test", demo, *flags)
    stream_demo()


@torch.no_grad()
def stream_demo() -> None:
    """What lower precision and graphs make of masks that were learned."""
    from gpu_streaming import SHOWN
    from instanceformer import InstanceFormer
    from instanceformer.data.augment import normalize
    from instanceformer.data.clips import read_frames
    from instanceformer.data.formats.youtube_vis import read_annotations

    network = InstanceFormer.from_checkpoint("runs/demo/last.ckpt").to(DEVICE).eval()
    video = read_annotations(Path("data/demo/valid.json")).videos[0]
    images = read_frames(video, Path("data/demo/JPEGImages"), range(video.length))
    frames = [normalize(image[None].to(DEVICE))[None] for image in images]
    prediction, _ = network(torch.cat(frames, dim=1))
    shown = prediction.logits.amax((1, 3)).topk(SHOWN).indices
    report_ways("demo", network, frames, shown, compiles=False)


if __name__ == "__main__":
    with attempt(sys.argv[1]):
        tiny() if sys.argv[1] == "tiny" else STAGES[sys.argv[1]]()
    sys.exit(bool(_failed))
