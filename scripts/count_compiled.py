"""Kernels of the graphs that torch.compile makes of a training step's parts, counted without a GPU.

    python scripts/count_compiled.py

``--model.compile`` puts backbone, projection, encoder and decoder through torch.compile. Here inductor fuses them as it
does on a CPU, under bfloat16 autocast, and what its programs call is counted, forward and backward, times how often a
step of one clip of 4 frames calls each: fused loops, library products and convolutions, deformable attention. No loop
is compiled to machine code, so that it takes a minute or two and what comes out is no number to look at. A GPU's
compiler fuses a little otherwise, and has one kernel for attention where this one has two products and a softmax.

Beside these come the sums of the gradients of a weight over the frames, one kernel each, and what is not compiled:
state, memory, propagation, masks, matching, losses and the optimizer, see ``count_launches.py``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering

from instanceformer import InstanceFormer
from instanceformer.training.losses import LossWeights
from instanceformer.training.module import InstanceFormerModule, cached_autocast
from measure_training_step import make_clips
from timing import table

CALLS = re.compile(r"cpp_fused_\w+\(|extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(")
PARTS = ("backbone", "projection", "encoder", "decoder")


@dataclass(frozen=True)
class Graph:
    """One compiled program.

    Attributes:
        name: part of the network, and which pass.
        calls: in a step.
        fused: kernels that inductor made, each time.
        library: products, convolutions and operators that it calls, each time.
    """

    name: str
    calls: int
    fused: int
    library: int

    @property
    def total(self) -> int:
        """Kernels in a step."""
        return self.calls * (self.fused + self.library)


class NotCompiled:
    """Stands for a loop that would have been compiled; it does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Leave the output as it is."""


def count_graphs(network: InstanceFormer, frames: int, size: tuple[int, int], classes: int) -> list[Graph]:
    """Compile the parts of a network in training mode and count; its weights stay, its gradients mean nothing."""
    codes: list[str] = []
    network.train().compile_parts()
    module = InstanceFormerModule(network)
    batch = make_clips(1, frames, *size, 5, classes)
    with (
        patch.object(AsyncCompile, "cpp_pybinding", lambda *args, **kwargs: NotCompiled()),
        patch.object(GraphLowering, "save_output_code", staticmethod(codes.append)),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), cached_autocast("cpu"):
            loss = module.compute_losses(batch).total(LossWeights())
        loss.backward()
    passes = [*(f"{part}, forward" for part in PARTS), *(f"{part}, backward" for part in reversed(PARTS))]
    if len(codes) != len(passes):
        sys.exit(f"found {len(codes)} programs, expected {len(passes)}, two for each of {', '.join(PARTS)}")
    graphs = []
    for name, code in zip(passes, codes, strict=True):
        kinds = Counter(call.startswith("cpp_fused") for call in CALLS.findall(code[code.index("def call(") :]))
        graphs.append(Graph(name, frames if name.startswith("decoder") else 1, kinds[True], kinds[False]))
    return graphs


def main() -> None:
    network, frames = InstanceFormer(), 4
    graphs = count_graphs(network, frames, (64, 96), 40)
    rows: list[tuple[object, ...]] = [
        (graph.name, graph.calls, graph.fused, graph.library, graph.total) for graph in graphs
    ]
    sums = (frames - 1) * sum(p.requires_grad for p in network.decoder.parameters())
    rows += [("sums over frames", "", "", "", sums), ("all", "", "", "", sum(graph.total for graph in graphs) + sums)]
    print(table(("", "calls", "fused", "library", "in all"), rows))


if __name__ == "__main__":
    main()
