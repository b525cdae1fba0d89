"""A memory checker for Triton kernels that needs no tool: their tensors lie between guards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from deform_attn import launch

GUARD = 4096
"""Elements before and after each tensor."""


@dataclass
class GuardedKernel:
    """A kernel that runs on copies of its tensors, which lie between NaN, and copies them back.

    What it reads beyond a tensor turns its results into NaN, what it writes there is noticed.

    Attributes:
        kernel: of Triton.
        launches: how often it ran.
        broken: positions of the tensors among the arguments beyond which something was written.
    """

    kernel: Any
    launches: int = 0
    broken: list[int] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Any:
        """Launch it, as Triton does."""

        def run(*tensors: Tensor, **arguments: Any) -> None:
            pairs = [(flat(tensor), guarded(tensor)) for tensor in tensors]
            inner = [
                memory.as_strided(tensor.shape, tensor.stride(), GUARD)
                for tensor, (_, memory) in zip(tensors, pairs, strict=True)
            ]
            self.kernel[grid](*inner, **arguments)
            self.launches += 1
            for index, (outside, memory) in enumerate(pairs):
                outside.data.copy_(memory[GUARD:-GUARD])
                if not (memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()):
                    self.broken.append(index)

        return run


def flat(tensor: Tensor) -> Tensor:
    """The memory that a tensor of any strides spans, as a view of one axis."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span if tensor.numel() else 0,), (1,))


def guarded(tensor: Tensor) -> Tensor:
    """A copy of that memory between NaN."""
    memory = flat(tensor)
    return torch.nn.functional.pad(memory.detach(), (GUARD, GUARD), value=float("nan"))


@contextmanager
def guarded_kernels() -> Iterator[dict[str, GuardedKernel]]:
    """Both kernels of ``deform_attn``, guarded while the block lasts."""
    kernels = {name: GuardedKernel(getattr(launch, name)) for name in ("forward_kernel", "backward_kernel")}
    with patch.multiple(launch, **kernels):
        yield kernels
