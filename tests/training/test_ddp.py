"""Two ranks on the CPU (gloo) against one process with the same global batch."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY, make_batch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from instanceformer import InstanceFormer
from instanceformer.data.batch import ClipBatch
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
    return ClipBatch(batch.frames[first:last], None, batch.targets[first:last])


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


@pytest.mark.parametrize("instances", [[3, 1, 2, 2], [3, 2, 0, 0], [0, 0, 0, 0]], ids=["all", "rank 1 none", "none"])
def test_two_ranks_equal_one(instances, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_rank, (port, instances, tmp_path), nprocs=2)
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
