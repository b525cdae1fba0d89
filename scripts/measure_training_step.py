"""Time, memory and kernels of one training step, as the Trainer takes it, on made-up clips.

    python scripts/measure_training_step.py [demo | paper] [--clips N] [--steps 5] [--precision 32-true] [--compile]

``demo`` is the network of configs/demo.yaml on 2 clips of 4 frames at 96x160; ``paper`` is the default network on one
clip of 4 frames at 360x640, or as many as ``--clips`` says, with 5 instances; gradients are clipped. Without a name
each is measured in a process of its own, so that the peak memory is its own. On a GPU the peak is that of the
allocator, on a CPU that of the process. ``--compile`` puts backbone, encoder and decoder through torch.compile.
scripts/check_gpu.py measures with every precision.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader

from instanceformer import InstanceFormer
from instanceformer.data.batch import ClipBatch, ClipTargets, DenseTargets
from instanceformer.training.module import InstanceFormerModule
from timing import Activity, Machine, peak_memory

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def make_clips(clips: int, frames: int, height: int, width: int, instances: int, classes: int) -> ClipBatch:
    """Noise with rectangles on it."""
    masks = torch.zeros(frames, instances, height, width, dtype=torch.bool)
    boxes = torch.zeros(frames, instances, 4)
    for i in range(instances):
        x, y, w, h = i * width // 8, i * height // 8, width // 4, height // 3
        masks[:, i, y : y + h, x : x + w] = True
        boxes[:, i] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
    targets = ClipTargets(torch.arange(instances) % classes, boxes, masks, masks.flatten(2).any(-1))
    dense = DenseTargets.from_clips([targets] * clips, (height, width))
    return ClipBatch(torch.randn(clips, frames, 3, height, width), None, dense)


def build(name: str, clips: int | None = None) -> tuple[InstanceFormer, ClipBatch]:
    """The network of that name and its batch, of so many clips."""
    torch.manual_seed(0)
    if name == "demo":
        network = InstanceFormer(4, **yaml.safe_load(DEMO.read_text())["model"]["network"])
        return network, make_clips(clips or 2, 4, 96, 160, 5, 4)
    return InstanceFormer(), make_clips(clips or 1, 4, 360, 640, 5, 40)


class UntrainedModule(InstanceFormerModule):
    """A module that trains a frozen stage of random weights without a word."""

    def on_fit_start(self) -> None:
        """Load nothing."""


@dataclass(frozen=True)
class Figures:
    """What was measured; times in seconds.

    Attributes:
        step_s: a step, mean of those that were timed.
        fastest_s, slowest_s: of them; on a GPU, which may lag behind, the times at which the CPU had queued them.
        first_s: the first step, with what is compiled and allocated in it.
        peak_gib: memory.
        loss: of the last step.
        activity: of the GPU in a step.
    """

    step_s: float
    fastest_s: float
    slowest_s: float
    first_s: float
    peak_gib: float
    loss: float
    activity: Activity | None

    def flat(self) -> dict[str, float | None]:
        """One level, for a line of JSON."""
        figures = asdict(self)
        activity = figures.pop("activity") or {}
        return figures | activity


class Meter(Callback):
    """Times the steps after a warm-up, and on a GPU profiles two after them."""

    def __init__(self, steps: int, on_gpu: bool) -> None:
        self.on_gpu, self.warm_up = on_gpu, 3 if on_gpu else 1
        self.timed = self.warm_up + steps
        self.total = self.timed + (2 if on_gpu else 0)
        self.ends: list[float] = []
        self.profile: torch.profiler.profile | None = None

    def now(self) -> float:
        """Seconds; where the timed steps begin and end, with all done that was queued."""
        if self.on_gpu and len(self.ends) in (0, self.warm_up, self.timed):
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin what begins with this step."""
        if batch_idx == 0:
            self.ends.append(self.now())
        if batch_idx == self.timed:
            self.profile = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
            self.profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End what ends with it."""
        self.ends.append(self.now())
        if batch_idx + 1 == self.warm_up and self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if batch_idx + 1 == self.total:
            self.loss = float(outputs["loss"])
            if self.profile is not None:
                torch.cuda.synchronize()
                self.profile.stop()

    def figures(self) -> Figures:
        """Once the training has ended."""
        times = self.ends[self.warm_up : self.timed + 1]
        each = [after - before for before, after in pairwise(times)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else peak_memory() / 2**10
        return Figures(
            step_s=sum(each) / len(each),
            fastest_s=min(each),
            slowest_s=max(each),
            first_s=self.ends[1] - self.ends[0],
            peak_gib=peak,
            loss=self.loss,
            activity=None if self.profile is None else Activity.of(self.profile, self.total - self.timed),
        )


def measure(
    network: InstanceFormer, batch: ClipBatch, steps: int, precision: Precision = "32-true", ddp: bool = False
) -> Figures:
    """Train for some steps, with the gradients' norm clipped.

    Args:
        network: to train, in place.
        batch: of every step.
        steps: that are timed.
        precision: of Lightning's Trainer.
        ddp: train as one of several processes does, of which there is one.
    """
    on_gpu = torch.cuda.is_available()
    meter = Meter(steps, on_gpu)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        strategy=DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True) if ddp else "auto",
        precision=precision,
        max_steps=meter.total,
        gradient_clip_val=0.1,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    clips: list[Any] = [batch] * 1000  # enough for any measurement
    trainer.fit(UntrainedModule(network), DataLoader(clips, batch_size=None, pin_memory=torch.cuda.is_available()))
    return meter.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=["demo", "paper"])
    parser.add_argument("--clips", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.name is None:
        print(f"{Machine.this('lightning')}; {options.precision}", flush=True)
        for name in ("demo", "paper"):
            subprocess.run([sys.executable, __file__, name, *sys.argv[1:]], check=True)
        return
    network, batch = build(options.name, options.clips)
    if options.compile:
        network.compile_parts()
    figures = measure(network, batch, options.steps, options.precision)
    print(
        f"{options.name:6} {figures.step_s:8.3f} s a step ({figures.fastest_s:.3f} to {figures.slowest_s:.3f}, "
        f"{options.steps} steps), peak memory {figures.peak_gib:.2f} GiB"
    )
    if figures.activity is not None:
        print(figures.activity)


if __name__ == "__main__":
    main()
