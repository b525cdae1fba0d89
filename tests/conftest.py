from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "passive"  # before torch comes: two processes share the cores, see the Makefile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it when it defines functions

from instanceformer import InstanceFormer
from instanceformer.data.batch import ClipBatch, ClipTargets, DenseTargets

TINY: dict[str, Any] = {
    "backbone": "small",
    "num_queries": 12,
    "dim": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward_dim": 48,
    "memory_frames": 3,
    "memory_tokens": 4,
}

needs_bfloat16 = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no products of bfloat16 on this processor",
)


@pytest.fixture(autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    """Trainers that a test stops leave handlers behind, which the next trainer would call before its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def tiny() -> Callable[..., InstanceFormer]:
    """Builds a small network in evaluation mode, every parameter moved off its special initial value."""

    def build(num_classes: int = 5, **options: Any) -> InstanceFormer:
        network = InstanceFormer(num_classes, **{**TINY, **options})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return network.eval()

    return build


@pytest.fixture
def shared() -> Path:
    """Folder of real data that is not part of the repository."""
    folder = os.environ.get("INSTANCEFORMER_SHARED")
    path = Path(folder) if folder else Path(__file__).parents[2] / "shared"
    if not (path / "real").is_dir():
        pytest.skip(f"no real data in {path}; INSTANCEFORMER_SHARED names its folder")
    return path


def make_targets(frames: int, instances: int, height: int, width: int, classes: int = 5) -> ClipTargets:
    """Rectangles that move to the right; instance i is hidden in frame i + 1, instance 1 enters in frame 1."""
    masks = torch.zeros(frames, instances, height, width, dtype=torch.bool)
    boxes = torch.zeros(frames, instances, 4)
    for t in range(frames):
        for i in range(instances):
            if t == i + 1 or (i == 1 and t < 1):
                continue
            top, left = 8 * i, 10 * i + 3 * t
            bottom, right = min(top + 20, height), min(left + 24, width)
            masks[t, i, top:bottom, left:right] = True
            boxes[t, i] = torch.tensor(
                [
                    (left + right) / 2 / width,
                    (top + bottom) / 2 / height,
                    (right - left) / width,
                    (bottom - top) / height,
                ]
            )
    visible = masks.flatten(2).any(-1)
    return ClipTargets(torch.arange(instances) % classes, boxes, masks, visible)


def make_batch(instances: list[int], frames: int = 4, height: int = 64, width: int = 96) -> ClipBatch:
    """One clip for each entry of ``instances``, all of one size."""
    return ClipBatch(
        frames=torch.randn(len(instances), frames, 3, height, width),
        padding=None,
        targets=DenseTargets.from_clips([make_targets(frames, n, height, width) for n in instances], (height, width)),
    )
