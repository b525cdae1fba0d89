"""A computation as one CUDA graph, which the host launches at once instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from instanceformer.constants import recorded

T = TypeVar("T")

WARM_UP = 3
"""Calls before the capture, in which kernels are compiled and chosen, and constants made."""


def captured(function: Callable[[], T], written: Sequence[Tensor]) -> Callable[[], T]:
    """The function as a CUDA graph: a call replays its kernels on the tensors that they used in the capture.

    It must not wait for the GPU, and nothing in it may depend on values. What it reads is kept in place and overwritten
    by its caller between calls.

    Args:
        function: called a few times before it is captured.
        written: the tensors that it changes, all on one GPU; they are left as they were found.

    Returns:
        A function that returns the same tensors in every call, with new values.

    Raises:
        RuntimeError: the function waits for the GPU.
    """
    before = [x.clone() for x in written]
    with torch.cuda.device(written[0].device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            try:
                for _ in range(WARM_UP):
                    function()
            finally:
                torch._foreach_copy_(list(written), before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with recorded() as constants, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()

    def replay(_alive: object = constants) -> T:
        graph.replay()
        return result

    return replay
