"""Rewrites a loaded network so that inference takes less work; there is no second network.

Batch norm is folded into the convolutions before it. On a CPU with oneDNN, convolutions and linear layers then keep
their weights in oneDNN's layout, and sum and activation are computed while the result is in the cache. These are the
private operators that PyTorch's compiler uses (``torch.ops.mkldnn``), without minutes of compilation. Speed on a frame
of 360x640 in processor time, relative to folded batch norm alone (the paper's network, AVX512, median ratio of
alternating frames):

    packed           two threads   one thread
    linear layers    1.48          1.38
    convolutions     0.99          1.13
    both             1.46          1.64

With several threads PyTorch's convolutions use oneDNN anyway; packed ones are kept for one thread and for bfloat16.
"""

from __future__ import annotations

import copy
import ctypes
import operator
import os
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from instanceformer.model.attention import Attention
from instanceformer.model.heads import MLP
from instanceformer.model.network import InstanceFormer

ACTIVATIONS: dict[type, tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
"""oneDNN's name of each activation that a convolution can compute as well, and its bounds."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h


def optimize(network: InstanceFormer, dtype: torch.dtype = torch.float32) -> InstanceFormer:
    """A copy of a network for inference, on the network's device.

    In float32 its outputs equal those of the network up to rounding. The copy is in evaluation mode and without
    gradients; it can neither be saved nor moved to another device.

    Args:
        network: in any mode; left unchanged.
        dtype: float32, or bfloat16 for the large matrix products on a CPU: faster on processors with bfloat16 products
            (AVX512-BF16, AMX), several times slower with AVX512 only. Residual sums, locations, softmax and the heads
            (class, box, mask weights) stay float32. On a GPU, run the float32 network under ``torch.autocast``.

    Raises:
        ValueError: another dtype, bfloat16 without oneDNN support on this device, or an optimized network.
    """
    device = network.query_content.device
    if any(isinstance(module, PackedConv2d | PackedLinear) for module in network.modules()):
        raise ValueError("network: found one that is optimized already, expected one as it was loaded")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: found {dtype}, expected torch.float32 or torch.bfloat16")
    if dtype == torch.bfloat16 and not (packs(device) and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise ValueError(
            f"dtype: found bfloat16 on {device}, where oneDNN has no products of it; expected float32, or a CPU with "
            "AVX512 or AMX; on a GPU run the float32 network under torch.autocast"
        )
    network = copy.deepcopy(network).eval().requires_grad_(False)
    body = trace(network.backbone.body)
    if body is not None:
        body = fold_batch_norm(body)
        if packs(device) and (dtype == torch.float32 or narrows(body)):
            body = pack_convolutions(body, dtype)
        network.backbone.body = body
    if packs(device):
        for part in (
            network.projection,
            network.encoder,
            network.decoder.layers,
            network.decoder.box_heads,
            network.mask_head,
        ):
            pack_layers(part, dtype)
        if network.identity is not None:  # of which the rest stays float32
            appearance = network.identity.appearance
            for name in ("finest", "encoded"):
                setattr(appearance, name, PackedConv2d(getattr(appearance, name), dtype))
    return network


def packs(device: torch.device) -> bool:
    """Whether layers are packed for oneDNN: on CPUs except ARM, where its products fused with ReLU or sum are slow."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and not torch.ops.mkldnn._is_mkldnn_acl_supported()
    )


class _Tracer(fx.Tracer):
    """Keeps convolutions and norms whole, and what timm declares to be untraceable."""

    def __init__(self) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (nn.Conv2d, nn.BatchNorm2d, FrozenBatchNorm2d, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(body: nn.Module) -> fx.GraphModule | None:
    """A backbone's body as a graph of modules; None where its code depends on values, as in timm's Swin and ViT."""
    if isinstance(body, fx.GraphModule):
        return body
    try:
        graph = _Tracer().trace(body)
    except (TraceError, TypeError):
        return None
    return split_padding(fx.GraphModule(body, graph))


def split_padding(body: fx.GraphModule) -> fx.GraphModule:
    """Make each convolution with TensorFlow's padding, which depends on the size, a padding and a plain convolution."""
    from timm.layers import Conv2dSame, pad_same

    modules = dict(body.named_modules())
    for node in body.graph.nodes:
        conv = modules.get(node.target)
        if not isinstance(conv, Conv2dSame):
            continue
        with body.graph.inserting_before(node):
            node.args = (
                body.graph.call_function(pad_same, (*node.args, conv.kernel_size, conv.stride, conv.dilation)),
            )
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups)
        plain = nn.Conv2d(*shape, bias=conv.bias is not None)
        plain.weight, plain.bias = conv.weight, conv.bias
        body.set_submodule(node.target, plain)
    return fx.GraphModule(body, body.graph)


def narrows(body: fx.GraphModule) -> bool:
    """Whether every layer with weights is a convolution that can be packed, so that all can compute in bfloat16."""
    return all(type(m) is nn.Conv2d or not [*m.parameters(recurse=False)] for m in body.modules())


def fold_batch_norm(body: fx.GraphModule) -> fx.GraphModule:
    """Fold each batch norm, frozen or not, into the convolution before it, whose weights are overwritten.

    The activation that a norm of timm includes stays, as a module of its own.
    """
    modules = dict(body.named_modules())
    for node in body.graph.nodes:
        conv, after = modules.get(node.target), _only_user(node)
        norm = None if after is None else modules.get(str(after.target))
        if after is None or not isinstance(conv, nn.Conv2d) or not isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
            continue
        mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        after.replace_all_uses_with(node)
        if not isinstance(getattr(norm, "act", nn.Identity()), nn.Identity):
            with body.graph.inserting_after(node):
                act = body.graph.call_module(f"{after.target}.act", (node,))
            node.replace_all_uses_with(act, delete_user_cb=lambda user, act=act: user is not act)
        body.graph.erase_node(after)
    return fx.GraphModule(body, body.graph)


def pack_convolutions(body: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """Replace each convolution, with the sum or activation after it, or a sum and a ReLU, by a PackedConv2d."""
    modules = dict(body.named_modules())
    for node in body.graph.nodes:
        conv = modules.get(node.target)
        if type(conv) is not nn.Conv2d:  # subclasses pad or standardize their weights
            continue
        inputs, end = [*node.args], node
        after = _only_user(end)
        if after is not None and after.target in (operator.add, operator.iadd):
            inputs += [summand for summand in after.args if summand is not end]
            end, after = after, _only_user(after)
        act = None if after is None else modules.get(str(after.target))
        if after is not None and (isinstance(act, nn.ReLU) if len(inputs) > 1 else type(act) in ACTIVATIONS):
            end = after
        else:
            act = None
        body.add_submodule(f"packed.{node.name}", PackedConv2d(conv, dtype, act))
        with body.graph.inserting_after(end):
            packed = body.graph.call_module(f"packed.{node.name}", tuple(inputs))
        end.replace_all_uses_with(packed)
    body.graph.eliminate_dead_code()
    return fx.GraphModule(body, body.graph)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def pack_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Pack the linear layers and convolutions of a module in place; those applied to queries only stay float32."""
    if isinstance(module, Attention | MLP):
        dtype = torch.float32
    children = list(module.named_children())
    for i, (name, child) in enumerate(children):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, PackedConv2d(child, dtype))
        elif isinstance(child, nn.Linear):
            relu = isinstance(module, nn.Sequential) and isinstance(module[(i + 1) % len(module)], nn.ReLU)
            setattr(module, name, PackedLinear(child.weight, child.bias, dtype, relu))
            if relu:
                setattr(module, children[i + 1][0], nn.Identity())
        else:
            pack_layers(child, dtype)
            if isinstance(child, Attention):
                setattr(module, name, PackedAttention(child))


class PackedLinear(nn.Module):
    """A linear layer in oneDNN, with an optional ReLU: (..., inputs) of any dtype to (..., outputs) of ``dtype``."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, relu: bool = False) -> None:
        super().__init__()
        self.dtype, self.activation = dtype, "relu" if relu else "none"
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        self.bias = bias.detach().to(dtype)

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias if bias else None, self.activation, [], ""
        )
        return y


class PackedAttention(Attention):
    """Attention with packed projections; that of a parameter, the positions of the queries, is computed once."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.heads, self.dropout, self.out_proj = attention.heads, 0.0, attention.out_proj
        self.in_proj = PackedLinear(attention.in_proj_weight, attention.in_proj_bias, torch.float32)
        self.projected: tuple[Tensor, bool, Tensor] | None = None

    def project(self, x: Tensor, bias: bool = True) -> tuple[Tensor, ...]:
        """As in Attention."""
        if self.projected is not None and self.projected[0] is x and self.projected[1] == bias:
            return self.projected[2].chunk(3, dim=-1)
        y: Tensor = self.in_proj(x, bias)
        if isinstance(x, nn.Parameter):
            self.projected = x, bias, y
        return y.chunk(3, dim=-1)


class PackedConv2d(nn.Module):
    """act(conv(x) + other) in oneDNN, with optional sum and activation, in ``dtype`` and channels last.

    The fastest layout depends on the input's size and the number of threads: if they change, weights are packed again.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, act: nn.Module | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.activation, self.bounds = ("none", []) if act is None else ACTIVATIONS[type(act)]
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight = conv.weight.detach().to(dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.packed_for = (torch.Size(), 0)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """(X, inputs, H, W) and an optional (X, outputs, h, w) summand, to (X, outputs, h, w)."""
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if self.packed_for != (x.shape, torch.get_num_threads()):
            self.packed_for = (x.shape, torch.get_num_threads())
            plain = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(plain, *self.geometry, x.shape)
        convolve, weights = torch.ops.mkldnn._convolution_pointwise, (self.weight, self.bias, *self.geometry)
        y: Tensor
        if other is None:
            y = convolve(x, *weights, self.activation, self.bounds, "")
        else:
            relu = None if self.activation == "none" else self.activation
            y = convolve.binary(x, other.to(self.dtype), *weights, "add", 1.0, relu, [], None)
        return y


def keep_memory() -> None:
    """Make glibc keep freed memory in this process, and PyTorch ask for huge pages.

    Otherwise a frame's large tensors are returned to the system and faulted in again, page by page, in the next frame.
    Where the network sees 720x1280 pixels, a frame's processor time falls from 2.70 to 2.24 s; at 360x640 it is the
    same, 0.62 and 0.63 s (two threads, medians of five alternating processes each). Call this before the process's
    first tensor; the process stays at its peak size. It does nothing if an environment variable configures the
    allocator; without glibc it only asks for huge pages.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)
