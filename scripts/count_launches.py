"""Kernels launched and host synchronizations of a training step and of a streamed frame, counted without a GPU.

    python scripts/count_launches.py [train stream] [--precision bf16 | float32] [--clips 1] [--frames 4] [--size 64 96]
                                     [--entering first | each] [--by file | line | operator]

The paper's network runs on a GPU that is not there; ``fake_gpu.py`` says what is counted. The network's count does not
depend on the size of the frames. What a step is: the batch's way to the device, forward, losses, backward, clipping of
the norm, fused AdamW, under autocast as Lightning's ``bf16-mixed`` has it. Counted is the second step, and the third
frame. ``--entering each`` has one instance enter with each frame.

It leaves out what the Trainer adds, such as logging, and under DDP the collectives.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from fake_gpu import GPU, Counts, FakeGpu, a_gpu_that_is_not_there, on_gpu
from instanceformer import InstanceFormer
from instanceformer.data.batch import ClipBatch
from instanceformer.inference import segmenter as segmenter_module
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.tracks import SegmenterOptions
from instanceformer.training.module import InstanceFormerModule, cached_autocast
from instanceformer.training.optim import OptimizerOptions, build_optimizer
from measure_training_step import make_clips
from timing import table

Precision = Literal["bf16", "float32"]
KINDS = ("train", "stream")


def clip(module: InstanceFormerModule) -> None:
    """Clip the gradients' norm."""
    torch.nn.utils.clip_grad_norm_(
        [p for p in module.parameters() if p.grad is not None], 0.1, foreach=True
    )  # as on a GPU


def update(optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step."""
    optimizer.step()
    optimizer.zero_grad()


def transfer(batch: ClipBatch) -> ClipBatch:
    """Bring the batch to the device, as the Trainer does."""
    moved: ClipBatch = move_data_to_device(batch, GPU)
    return moved


STAGES = {clip.__code__: "clipping", update.__code__: "optimizer", transfer.__code__: "transfer"}
"""Functions of this file that are parts of a step."""


def count_training_step(
    network: InstanceFormer, batch: ClipBatch, precision: Precision = "bf16", by: str = "file"
) -> Counts:
    """Counts of the second step of a training.

    Args:
        network: which is left as it is.
        batch: of both steps.
        precision: ``bf16`` as Lightning's bf16-mixed.
        by: what is counted by: ``file``, ``line`` or ``operator``.
    """
    gpu = FakeGpu(by, STAGES)
    network = deepcopy(network)
    with a_gpu_that_is_not_there(gpu):
        module = InstanceFormerModule(on_gpu(network).train())
        optimizer = build_optimizer(module.network, OptimizerOptions(), fused=True)
        for _ in range(2):
            gpu.counts = Counts()
            moved = transfer(batch)
            mixed = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
            with mixed, cached_autocast("cuda"):
                loss = module.compute_losses(moved).total(module.losses)
            gpu.backward(loss)
            clip(module)
            update(optimizer)
    return gpu.counts


def count_frame(
    network: InstanceFormer,
    size: tuple[int, int],
    precision: Precision = "bf16",
    by: str = "file",
    shown: int = 10,
) -> Counts:
    """Counts of the third frame of a stream, in which so many instances are shown; without the graph that it is."""
    gpu = FakeGpu(by, STAGES)
    network = deepcopy(network)
    options = SegmenterOptions(size=min(size), precision="bf16" if precision == "bf16" else "fp32")
    to_host = segmenter_module.to_host

    def shown_to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
        copies = to_host(*tensors)
        copies[0][shown:] = 0  # the table's other rows are of queries that are not visible
        return copies

    with (
        a_gpu_that_is_not_there(gpu),
        patch.object(segmenter_module, "to_host", shown_to_host),
        patch.object(segmenter_module, "captured", lambda function, written: function),
    ):
        segmenter = VideoInstanceSegmenter(on_gpu(network).eval(), options=options)
        for _ in range(3):
            gpu.counts = Counts()
            segmenter.step(np.zeros((*size, 3), np.uint8))
    return gpu.counts


def report(title: str, counts: Counts) -> str:
    """A table by place, the largest first."""
    places = sorted(counts.kernels | counts.copies | counts.waits, key=lambda place: (-counts.kernels[place], place))
    columns = (counts.kernels, counts.copies, counts.waits)
    rows = [(place, *(column[place] for column in columns)) for place in places]
    rows.append(("all", *(column.total() for column in columns)))
    return table((title, " kernels", "copies", "waits"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="train | stream", default=list(KINDS), help="both if left out")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32"])
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=[64, 96], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--entering", default="first", choices=["first", "each"])
    parser.add_argument("--by", default="file", choices=["file", "line", "operator"])
    options = parser.parse_args()
    if not set(options.what) <= set(KINDS):
        parser.error(
            f"found {' '.join(options.what)}, expected {' or '.join(KINDS)}"
        )  # argparse refuses no word at all
    height, width = options.size
    if "train" in options.what:
        batch = make_clips(options.clips, options.frames, height, width, 5, 40)
        if options.entering == "each":
            entering = batch.targets.entering
            entering[:] = torch.eye(*entering.shape[::2], dtype=torch.bool)[:, None]
        counts = count_training_step(InstanceFormer(), batch, options.precision, options.by)
        print(report(f"training step, {options.clips} x {options.frames} frames, {options.precision}", counts))
    if "stream" in options.what:
        print(
            report(
                f"streamed frame, {options.precision}",
                count_frame(InstanceFormer(), (height, width), options.precision, options.by),
            )
        )


if __name__ == "__main__":
    main()
