"""Optimizer, parameter groups and learning-rate schedules (A.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

SLOW = ("sampling_offsets", "location.")
"""In the names of layers that place sampling points, which like the backbone learn at a tenth of the rate."""


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW as in the paper.

    Attributes:
        lr: learning rate.
        backbone_lr: learning rate of the backbone.
        slow_factor: factor on ``lr`` for sampling offsets and reference points.
        weight_decay: AdamW's weight decay, for every parameter.
        schedule: ``multistep``, by epochs, the paper's; ``cosine`` to zero or ``constant``, by steps after a warm-up.
        milestones: epochs after which ``multistep`` divides the rates by ten.
        warmup_steps: steps of linear warm-up before ``cosine`` or ``constant``.

    Raises:
        ValueError: ``multistep`` is given a warm-up.
    """

    lr: float = 1e-4
    backbone_lr: float = 1e-5
    slow_factor: float = 0.1
    weight_decay: float = 1e-4
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: tuple[int, ...] = (4, 10)
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps and self.schedule == "multistep":
            raise ValueError(
                f"optimizer.warmup_steps: found {self.warmup_steps} with schedule multistep, which has no warm-up; "
                "expected 0, or the schedule cosine or constant"
            )

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of each group of parameters."""
        return {"network": self.lr, "backbone": self.backbone_lr, "slow": self.lr * self.slow_factor}


def build_optimizer(network: nn.Module, options: OptimizerOptions, fused: bool = True) -> Optimizer:
    """AdamW over three groups, named ``network``, ``backbone`` and ``slow``; frozen parameters are left out.

    Args:
        network: whose ``named_parameters`` are grouped.
        options: learning rates and weight decay.
        fused: update all parameters in one kernel. Not for fp16 loss scaling: a fused optimizer unscales the gradients
            itself, after they were clipped.
    """
    groups: dict[str, list[nn.Parameter]] = {"network": [], "backbone": [], "slow": []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            slow = any(part in name for part in SLOW)
            groups["backbone" if name.startswith("backbone.") else "slow" if slow else "network"].append(parameter)
    return AdamW(
        [
            {"params": parameters, "lr": options.rates[name], "name": name}
            for name, parameters in groups.items()
            if parameters
        ],
        weight_decay=options.weight_decay,
        fused=fused,
    )


def build_scheduler(optimizer: Optimizer, options: OptimizerOptions, total_steps: float) -> tuple[LambdaLR, str]:
    """The schedule and the interval, ``epoch`` or ``step``, at which Lightning advances it.

    Raises:
        ValueError: ``cosine`` with infinite ``total_steps``.
    """
    if options.schedule == "cosine" and not math.isfinite(total_steps):
        raise ValueError("optimizer.schedule: found cosine without an end, expected trainer.max_steps or max_epochs")
    if options.schedule == "multistep":
        return LambdaLR(optimizer, lambda epoch: 0.1 ** sum(epoch >= end for end in options.milestones)), "epoch"

    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        if options.schedule == "constant":
            return 1.0
        done = (step - options.warmup_steps) / max(1, total_steps - options.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor), "step"


def apply_options(optimizer: Optimizer, scheduler: LambdaLR, options: OptimizerOptions) -> None:
    """Replace the learning rates and weight decay that a checkpoint brought with those of ``options``."""
    scheduler.base_lrs = []
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        rate = options.rates[group["name"]]
        scheduler.base_lrs.append(rate)
        group.update(initial_lr=rate, lr=rate * factor(scheduler.last_epoch), weight_decay=options.weight_decay)
