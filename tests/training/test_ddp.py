"""Two ranks on the CPU (gloo) against one process with the same global batch."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY, make_batch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from instanceformer import InstanceFormer
from instanceformer.data.batch import ClipBatch, DenseTargets
from instanceformer.model.options import CHOICES
from instanceformer.training.losses import LossWeights
from instanceformer.training.module import InstanceFormerModule

STEPS = 3


class LossOf(nn.Module):
    """The module's loss as a forward pass, as Lightning hands ``training_step`` to DDP."""

    def __init__(self, network: InstanceFormer) -> None:
        super().__init__()
        self.module = InstanceFormerModule(network)

    def forward(self, batch: ClipBatch) -> Tensor:
        return self.module.compute_losses(batch).total(LossWeights())


def build() -> InstanceFormer:
    torch.manual_seed(0)
    return InstanceFormer(5, **{**TINY, "dropout": 0.0, "location": "refined"})


def global_batch(step: int, instances: list[int]) -> ClipBatch:
    torch.manual_seed(100 + step)
    return make_batch(instances)


def part(batch: ClipBatch, first: int, last: int) -> ClipBatch:
    targets = batch.targets
    per_clip = {"labels": targets.labels[first:last], "pixels": targets.pixels[first:last]}
    per_frame = {name: getattr(targets, name)[:, first:last] for name in ("boxes", "visible", "masks", "entering")}
    return ClipBatch(batch.frames[first:last], None, DenseTargets(**per_clip, **per_frame))


def train(loss_of: Any, network: InstanceFormer, instances: list[int], first: int, last: int) -> dict[str, Any]:
    """A few steps, so that a parameter that DDP waits for in vain is noticed."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(part(global_batch(step, instances), first, last))
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients}


def run_rank(rank: int, port: int, instances: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    network = build()
    found = train(DistributedDataParallel(LossOf(network)), network, instances, 2 * rank, 2 * rank + 2)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("instances", [[3, 1, 2, 2], [3, 2, 0, 0], [0, 0, 0, 0]], ids=["all", "rank 1 none", "none"])
def test_two_ranks_equal_one(instances, tmp_path: Path) -> None:
    multiprocessing.spawn(run_rank, (free_port(), instances, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    network = build()
    alone = train(LossOf(network), network, instances, 0, 4)
    for step in range(STEPS):
        mean = (ranks[0]["losses"][step] + ranks[1]["losses"][step]) / 2
        assert mean == pytest.approx(alone["losses"][step], rel=1e-5)
    scale = max(g.abs().max() for g in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        for rank in ranks:
            difference = (rank["gradients"][name] - gradient).abs().max()
            assert difference <= 1e-5 * max(scale, 1), f"{name}: {difference}"


def every_option() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each value that an option of a few values can have, all else as it is by default."""
    for name, choice in CHOICES.items():
        for value in choice:
            yield (
                f"{name}={value}",
                {name: value, "min_confidence": 0.3 if value in ("renew", "held", "hide", "recover") else 0.0},
            )
    for name in ("cross_position", "propagate_queries", "class_prior", "memory"):
        yield f"{name}=False", {name: False}
    yield "query only", {"propagate_queries": False, "class_prior": False, "memory": False, "location": "none"}
    for levels in (3, 4, 5):
        yield f"num_levels={levels}", {"num_levels": levels, "dim": 64}  # the coarsest has a single cell
    for norm in ("frozen", "batch"):
        yield f"resnet18, {norm}", {"backbone": "resnet18", "backbone_norm": norm}
    yield "d=1", {"memory_frames": 1}
    yield "k=1", {"memory_tokens": 1}
    yield "d=1, k=1", {"memory_frames": 1, "memory_tokens": 1}
    yield "a query for each of 300 instances", {"num_queries": 300}


def take_steps(network: InstanceFormer, rank: int, crowded: bool) -> None:
    """Two optimizer steps of two batches each, under autocast: DDP raises in the second if a parameter had no part."""
    parallel = DistributedDataParallel(LossOf(network.train()))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    many = 300 if crowded else 3
    accumulated = [(3, [2, 0][rank]), (1, [0, 1][rank])]  # frames, and instances: one rank has none
    for batches in (accumulated, [(1, [many, 0][rank]), (3, 0)]):
        optimizer.zero_grad()
        for place, (frames, instances) in enumerate(batches):
            with (
                nullcontext() if place == len(batches) - 1 else parallel.no_sync(),
                torch.autocast("cpu", torch.bfloat16),
            ):
                loss = parallel(make_batch([instances], frames=frames))
            loss.backward()
            assert loss.isfinite(), f"loss of {instances} instances in {frames} frames: {loss}"
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        optimizer.step()


def run_every_option(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    for case, options in every_option():
        torch.manual_seed(0)
        try:
            take_steps(
                InstanceFormer(5, **{**TINY, **options}), rank, crowded="num_queries" in options or case == "d=1"
            )
        except Exception as error:
            error.add_note(f"rank {rank}, {case}")
            raise
    distributed.destroy_process_group()


@pytest.mark.slow
def test_every_option_trains_on_two_ranks_without_a_search_for_unused_parameters() -> None:
    """With accumulation, bfloat16, clips of a frame, no instance on a rank or on both, more instances than queries."""
    multiprocessing.spawn(run_every_option, (free_port(),), nprocs=2)
