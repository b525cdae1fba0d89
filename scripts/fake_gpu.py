"""A GPU that is not there: its tensors have shapes and dtypes but no data, and what it would have to do is counted.

Tensors on ``cuda`` are PyTorch's fake ones, so that dispatch, autocast and devices are those of a GPU.

- kernels: an operator that is no view and no allocation is one; some that are known to be more are listed in
  ``KERNELS``, and operators of lists of tensors are cut up as PyTorch does. Copies between host and device are apart.
- backward: autograd's nodes are called one by one, because its engine asks for the device. What was summed up where
  gradients meet is a kernel.
- the operator for deformable attention is what ``deform_attn.launch`` does: the kernel, and in the backward pass what
  fills its outputs and casts them.
- synchronizations: where the host waits for the device, as ``torch.cuda.set_sync_debug_mode`` finds them: results that
  are brought to the host, sizes that depend on data, copies to the device that were not asked to be non-blocking.
  Data from the device is made up: all ones.
"""

from __future__ import annotations

import heapq
import math
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import instanceformer

PACKAGE = Path(instanceformer.__file__).parent
GPU = torch.device("cuda", 0)
FAKE = FakeTensorMode(allow_non_fake_inputs=True)

FREE = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh"),
    *("set_", "resize_", "device", "record_stream", "_reshape_alias", "_local_scalar_dense", "is_same_size"),
}
"""Operators that launch nothing."""

KERNELS = {
    "native_layer_norm_backward": 2,  # of the input; of weight and bias
    "native_group_norm": 3,  # moments; scale and shift; the map
    "native_group_norm_backward": 5,
    "_scaled_dot_product_efficient_attention_backward": 3,  # sums of gradient times output; the kernel; casts
    "topk": 2,
    "sort": 3,
    "nonzero": 4,
    "baddbmm": 2,  # what is added is copied into the result before
    "masked_fill": 2,  # a copy, then the filling
    "slice_backward": 2,  # zeros, then a copy
    "select_backward": 2,
    "constant_pad_nd": 2,
    "logsumexp": 7,
    "eye": 2,
}
"""Operators of more than one kernel; those that depend on their arguments are in ``kernels_of``."""

WAITS = {"nonzero", "_local_scalar_dense", "masked_select", "equal", "_unique2", "bincount"}
"""Operators for which the host waits."""

MAX_TENSORS, MAX_BLOCKS, CHUNK = (110, 64, 48, 36, 30), 320, 65536
"""What one launch of an operator of lists takes: tensors, by the number of lists; blocks, of so many elements."""


@dataclass
class Counts:
    """What was counted, by place in the source: kernels, copies between host and device, waits of the host."""

    kernels: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)


class FakeGpu(TorchDispatchMode):
    """Runs what is on the GPU with fake tensors, and what is on the host as it is; counts into ``counts``.

    Args:
        by: what is counted by: ``file``, ``line`` or ``operator``.
        stages: names of the parts of a step that are functions outside the package, by their code.
    """

    def __init__(self, by: str, stages: Mapping[CodeType, str]) -> None:
        super().__init__()
        self.by, self.counts, self.made_up_rows = by, Counts(), 10
        self.stages = {attention.__code__: "attention kernel", **stages}
        self._places: list[tuple[int, str]] = []  # autograd's count of nodes, place
        self._place: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        to = kwargs.get("device")
        on_gpu = any(isinstance(x, FakeTensor) for x in tensors)
        if not on_gpu and (to is None or torch.device(to).type != "cuda"):
            return func(*args, **kwargs)
        place = self._where()
        operator = f"{name} {place}" if self.by == "operator" else place
        crosses = name in ("_to_copy", "copy_") and (
            any(not isinstance(x, FakeTensor) for x in tensors) or (to is not None and torch.device(to).type == "cpu")
        )
        if crosses:
            self.counts.copies[operator] += 1
            to_host = isinstance(tensors[-1], FakeTensor)
            if not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self.counts.waits[operator] += 1
            if to_host:
                made_up = torch.ones(tensors[-1].shape, dtype=kwargs.get("dtype") or tensors[-1].dtype)
                return made_up if name == "_to_copy" else args[0].copy_(made_up)
        elif name == "_local_scalar_dense":
            self.counts.waits[operator] += 1
            return tensors[0].dtype.is_floating_point or True if tensors[0].dtype == torch.bool else 1
        elif name not in FREE and not func.is_view:
            self.counts.kernels[operator] += kernels_of(name, args, tensors)
        indices = [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []
        if name in WAITS or any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, FakeTensor) for x in indices):
            self.counts.waits[operator] += 1
        with FAKE:
            if name == "nonzero":
                return torch.zeros(self.made_up_rows, tensors[0].ndim, dtype=torch.int64, device=GPU)
            args, kwargs = tree_map_only(
                Tensor, lambda x: x if isinstance(x, FakeTensor) else FAKE.from_tensor(x), (args, kwargs)
            )
            if name in ("index", "index_put", "index_put_"):
                args = (args[0], [y for x in args[1] for y in self._made_up_indices(x)], *args[2:])
            return func(*args, **kwargs)

    def synchronize(self) -> None:
        """The host waits, as for a stream."""
        self.counts.waits[self._where()] += 1

    def _made_up_indices(self, index: Tensor | None) -> list[Tensor | None]:
        """Positions in place of a mask."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        return [torch.zeros(self.made_up_rows, dtype=torch.int64, device=GPU) for _ in range(index.ndim)]

    def backward(self, loss: Tensor) -> None:
        """Add gradients to what ``loss`` depends on, as autograd's engine does."""
        assert loss.grad_fn is not None
        waiting: dict[Any, int] = defaultdict(int)  # for so many gradients
        reached, stack = {loss.grad_fn}, [loss.grad_fn]
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is not None:
                    waiting[node] += 1
                    if node not in reached:
                        reached.add(node)
                        stack.append(node)
        gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict, {loss.grad_fn: {0: torch.ones_like(loss)}})
        ready: list[tuple[int, int, Any]] = [(0, 0, loss.grad_fn)]
        with torch.no_grad():
            while ready:
                node = heapq.heappop(ready)[-1]
                self._place = self._place_of(node)
                inputs = gradients.pop(node, {})
                outputs = self._call(node, [inputs.get(i) for i in range(len(node._input_metadata))])
                for (following, i), gradient in zip(node.next_functions, outputs, strict=False):
                    if following is None:
                        continue
                    if gradient is not None:
                        expected = following._input_metadata[i]
                        gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                        known = gradients[following].get(i)
                        gradients[following][i] = gradient if known is None else known + gradient
                    waiting[following] -= 1
                    if waiting[following] == 0:
                        heapq.heappush(ready, (-following._sequence_nr(), id(following), following))
        self._place = None

    def _call(self, node: Any, inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if all(x is None for x in inputs):
            return [None] * len(node.next_functions)
        if hasattr(node, "variable"):
            variable, gradient = node.variable, inputs[0]
            assert gradient is not None
            if variable.grad is not None:
                variable.grad += gradient
            else:
                variable.grad = gradient if gradient.stride() == variable.stride() else gradient.clone()
            return []
        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        outputs = call(*inputs)
        if not isinstance(outputs, tuple):
            return (outputs,)
        if call is not node:  # what it gives for arguments that are no tensors is left out
            return [x for i, x in enumerate(outputs) if i not in (1, 5)]
        return outputs

    def _place_of(self, node: Any) -> str:
        index = bisect_right(self._places, node._sequence_nr(), key=lambda entry: entry[0])
        return "gradients added up" if hasattr(node, "variable") else f"{self._places[index - 1][1]}, backward"

    def _where(self) -> str:
        """The place in the package, or the stage, from which an operator is called."""
        if self._place is not None:
            return self._place
        frame: FrameType | None = sys._getframe(1)
        place = "elsewhere"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            stage = self.stages.get(frame.f_code)
            if stage is not None or path.is_relative_to(PACKAGE):
                place = (stage or path.name) + (f":{frame.f_lineno}" if self.by == "line" else "")
                break
            frame = frame.f_back
        number = torch.autograd._get_sequence_nr() - 1
        if not self._places or self._places[-1] != (number, place):
            self._places.append((number, place))
        return place


def kernels_of(name: str, args: Any, tensors: Sequence[Tensor]) -> int:
    """How many kernels an operator launches; see the module's docstring."""
    if name.startswith(("_foreach", "_fused")):
        lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
        if name.startswith("_fused"):
            lists = lists[:4]  # the last one has the counts of steps
        return launches([x.numel() for x in lists[0]], len(lists))
    if name == "convolution":
        return 1 + (args[2] is not None)
    if name == "convolution_backward":
        return sum(args[10])
    if name in ("index_put", "index_put_"):
        return 8 if len(args) > 3 and args[3] else 1  # by sorting
    if name == "ms_deform_attn":  # of value, coordinates, weights and perhaps a reference
        return 1 + sum(not x.is_contiguous() for x in tensors[:3])
    if name == "ms_deform_attn_backward":  # which begins with the gradient
        return len(("value", "reference", "kernel")) + sum(x.dtype != torch.float32 for x in tensors[1:])
    return KERNELS.get(name, 1)


def launches(sizes: Iterable[int], lists: int) -> int:
    """Launches of an operator of lists of tensors with so many elements."""
    count, tensors, blocks = 1, 0, 0
    for size in sizes:
        for _ in range(math.ceil(size / CHUNK)):
            if blocks == MAX_BLOCKS:
                count, tensors, blocks = count + 1, 0, 0
            blocks += 1
        tensors += 1
        if tensors == MAX_TENSORS[lists - 1]:
            count, tensors, blocks = count + 1, 0, 0
    return count


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """The kernel that a GPU takes for attention with a mask; autocast narrows the mask, as it does all it is given."""
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query,
        key,
        value,
        None if attn_mask is None else attn_mask.to(query.dtype),
        compute_log_sumexp=torch.is_grad_enabled(),
        dropout_p=dropout_p,
        is_causal=is_causal,
    )[0]
    return output


@contextmanager
def a_gpu_that_is_not_there(gpu: FakeGpu) -> Iterator[FakeGpu]:
    """Run the block on it; PyTorch asks for no driver."""
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda._lazy_init", lambda: None))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_: True))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda x: x))
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch.cuda.current_stream", lambda *_: gpu))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        yield stack.enter_context(gpu)


def on_gpu(module: nn.Module) -> nn.Module:
    """The module, its parameters and buffers moved in place."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach().to(GPU), parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(GPU)
    return module
