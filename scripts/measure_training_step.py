"""Time and peak memory of one training step, forward, backward and optimiser, on made-up clips.

    python scripts/measure_training_step.py [demo | paper] [--steps 5]

``demo`` is the network of configs/demo.yaml on 2 clips of 4 frames at 96x160; ``paper`` is the default network on one
clip of 4 frames at 360x640, with 5 instances. Without a name each is measured in a process of its own, so that the peak
memory is its own. On a GPU the peak is that of the allocator, on a CPU that of the process.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from instanceformer import InstanceFormer
from instanceformer.data.batch import ClipBatch, ClipTargets
from instanceformer.training.losses import LossWeights
from instanceformer.training.module import InstanceFormerModule
from instanceformer.training.optim import OptimizerOptions, build_optimizer

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def make_clips(clips: int, frames: int, height: int, width: int, instances: int, classes: int) -> ClipBatch:
    """Noise with rectangles on it."""
    masks = torch.zeros(frames, instances, height, width, dtype=torch.bool)
    boxes = torch.zeros(frames, instances, 4)
    for i in range(instances):
        x, y, w, h = i * width // 8, i * height // 8, width // 4, height // 3
        masks[:, i, y : y + h, x : x + w] = True
        boxes[:, i] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
    targets = ClipTargets(torch.arange(instances) % classes, boxes, masks, masks.flatten(2).any(-1))
    return ClipBatch(torch.randn(clips, frames, 3, height, width), None, [targets] * clips)


def measure(name: str, steps: int) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "demo":
        network = InstanceFormer(**yaml.safe_load(DEMO.read_text())["model"]["network"])
        batch = make_clips(2, 4, 96, 160, 5, 4)
    else:
        network = InstanceFormer()
        batch = make_clips(1, 4, 360, 640, 5, 40)
    network, batch = network.to(device).train(), batch.to(device)
    module = InstanceFormerModule(network)
    optimizer = build_optimizer(network, OptimizerOptions())
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        module.compute_losses(batch).total(LossWeights()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (
        torch.cuda.max_memory_allocated() / 2**30
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    timed = seconds[1:]
    return (
        f"{name:6} {statistics.median(timed):8.3f} s a step ({min(timed):.3f} to {max(timed):.3f}, {steps} steps), "
        f"peak memory {peak:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=["demo", "paper"])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if options.name is not None:
        print(measure(options.name, options.steps))
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, {platform.machine()}, torch {torch.__version__}, float32", flush=True)
    for name in ("demo", "paper"):
        subprocess.run([sys.executable, __file__, name, "--steps", str(options.steps)], check=True)


if __name__ == "__main__":
    main()
