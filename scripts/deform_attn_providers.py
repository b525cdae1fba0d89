"""What computes multi-scale deformable attention, and what it is given, for the scripts that time it."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deform_attn import fused_ms_deform_attn, ms_deform_attn
from deform_attn.op import Backend

OperatorName = Literal["plain", "fused"]
Kind = Literal["ours", "reference", "peer"]
Operator = Callable[..., Tensor]  # plain: of value, locations, weights; fused: of value, reference, offsets, logits

PASSES = ("forward", "backward", "forward + backward")
OPERATORS: tuple[OperatorName, ...] = ("plain", "fused")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Size:
    """One group of rows; an encoder's queries are the pixels of its maps."""

    name: str
    batch: int
    queries: int
    heads: int
    channels: int
    shapes: tuple[tuple[int, int], ...]
    points: int = 4


# The maps of a 360x640 and an 800x1333 frame as convolutions of stride 8, 16, 32 and 64 with padding give them: each
# side is divided by the stride and rounded up.
SHAPES_360 = ((45, 80), (23, 40), (12, 20), (6, 10))
SHAPES_800 = ((100, 167), (50, 84), (25, 42), (13, 21))
DEMO_SHAPES = ((12, 20), (6, 10), (3, 5), (2, 3))
SIZES = (
    Size("encoder-800x1333", 1, 22223, 8, 32, SHAPES_800),
    Size("encoder-360x640", 1, 4820, 8, 32, SHAPES_360),
    Size("encoder-demo", 12, 321, 6, 16, DEMO_SHAPES),
    Size("decoder-800x1333", 1, 300, 8, 32, SHAPES_800),
    Size("decoder-360x640", 1, 300, 8, 32, SHAPES_360),
    Size("decoder-demo", 12, 25, 6, 16, DEMO_SHAPES),
)


@dataclass(frozen=True)
class Maps:
    """The sizes of the levels, as pairs and as the tensors that most packages take: (height, width) and starts."""

    shapes: tuple[tuple[int, int], ...]
    sizes: Tensor
    starts: Tensor

    @classmethod
    def of(cls, shapes: tuple[tuple[int, int], ...], device: torch.device) -> Maps:
        """Maps of these sizes."""
        sizes = torch.tensor(shapes)
        areas = sizes.prod(1)
        return cls(shapes, sizes.to(device), (areas.cumsum(0) - areas).to(device))


@dataclass(frozen=True)
class Provider:
    """One implementation; ``bind`` makes the operator for given maps."""

    name: str
    kind: Kind
    bind: Callable[[Maps], Operator]
    has_backward: bool = True


@dataclass(frozen=True)
class Peer:
    """Another package: its module, its name in the package index, and its plain operator for given maps."""

    module: str
    package: str
    bind: Callable[[Maps], Operator]


def bind_torch_ms_deform_attn(maps: Maps) -> Operator:
    from torch_ms_deform_attn import ms_deform_attn as peer

    def operator(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        # It takes one dtype only and computes half precision in float32; locations should not lose their precision.
        output: Tensor = peer(value.to(locations.dtype), maps.sizes, maps.starts, locations, weights)
        return output.to(value.dtype)

    return operator


PEERS = (Peer("torch_ms_deform_attn", "torch-ms-deform-attn", bind_torch_ms_deform_attn),)


def bind_plain(backend: Backend) -> Callable[[Maps], Operator]:
    def bind(maps: Maps) -> Operator:
        return lambda value, locations, weights: ms_deform_attn(value, maps.shapes, locations, weights, backend=backend)

    return bind


def bind_fused(backend: Backend) -> Callable[[Maps], Operator]:
    def bind(maps: Maps) -> Operator:
        return lambda value, reference, offsets, logits: fused_ms_deform_attn(
            value, maps.shapes, reference, offsets, logits, backend=backend
        )

    return bind


def composed(bind: Callable[[Maps], Operator]) -> Callable[[Maps], Operator]:
    """The fused operator as a network computes it without one."""

    def bind_composition(maps: Maps) -> Operator:
        plain = bind(maps)
        sizes = maps.sizes.flip(1)[:, None]  # (L, 1, 2): width, height

        def operator(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            locations = reference[:, :, None, :, None] + offsets / sizes
            return plain(value, locations, logits.flatten(3).softmax(-1).view_as(logits))

        return operator

    return bind_composition


def compiled(bind: Callable[[Maps], Operator]) -> Callable[[Maps], Operator]:
    def bind_compiled(maps: Maps) -> Operator:
        torch.compiler.reset()  # else the sizes before would make this one dynamic, and soon be too many
        return torch.compile(bind(maps), dynamic=False)

    return bind_compiled


def providers(operator: OperatorName, device: torch.device, peers: Sequence[Peer]) -> list[Provider]:
    backend: Backend = "cpu" if device.type == "cpu" else "triton"
    bind = bind_plain if operator == "plain" else bind_fused
    result = [Provider(backend, "ours", bind(backend))]
    if backend == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        result.append(Provider("cpu compiled", "ours", compiled(bind("cpu")), has_backward=False))
    if operator == "fused":
        result.append(Provider(f"{backend} composed", "ours", composed(bind_plain(backend))))
    result.append(Provider("reference", "reference", bind("reference")))
    if backend == "triton":
        result.append(Provider("reference compiled", "reference", compiled(bind("reference"))))
    wrap = composed if operator == "fused" else lambda bind: bind
    return result + [Provider(peer.module, "peer", wrap(peer.bind)) for peer in peers]


@dataclass(frozen=True)
class Inputs:
    """The same sampling points for both operators, as locations and weights and as offsets and logits."""

    value: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor

    @classmethod
    def of(cls, size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random inputs, always the same for a size."""
        rng = torch.Generator().manual_seed(0)
        length = sum(height * width for height, width in size.shapes)
        shape = (size.batch, size.queries, size.heads, len(size.shapes), size.points)
        # As in a network, each query looks around a place of its own, by about a twentieth of the image.
        centers = torch.rand(1, size.queries, 1, 1, 1, 2, generator=rng)
        sizes = torch.tensor([(width, height) for height, width in size.shapes])[:, None]
        cells = (centers + 0.05 * torch.randn(*shape, 2, generator=rng)) * sizes - 0.5
        # The gradient of a location jumps where a point crosses the center of a cell. Rounding must not decide on which
        # side it is, or the gradients of two correct providers differ; so points keep away from there.
        cells = cells.floor() + cells.remainder(1).clamp(1e-3, 1 - 1e-3)
        locations = (cells + 0.5) / sizes
        logits = torch.randn(shape, generator=rng)
        value = torch.randn(size.batch, length, size.heads, size.channels, generator=rng)
        grad = torch.randn(size.batch, size.queries, size.heads * size.channels, generator=rng)
        reference = centers.to(device).reshape(1, -1, 1, 2).expand(size.batch, -1, len(size.shapes), -1)
        return cls(
            value.to(device, dtype).requires_grad_(),
            reference,
            ((locations - centers) * sizes).to(device).requires_grad_(),
            logits.to(device).requires_grad_(),
            locations.to(device).requires_grad_(),
            logits.flatten(3).softmax(-1).view(shape).to(device).requires_grad_(),
            grad.to(device, dtype),
        )

    def of_operator(self, operator: OperatorName) -> tuple[Tensor, ...]:
        """The arguments of that operator."""
        if operator == "plain":
            return self.value, self.locations, self.weights
        return self.value, self.reference, self.offsets, self.logits


@dataclass(frozen=True)
class Results:
    """The output and, unless only that was asked for, the gradients of the inputs that have one."""

    output: Tensor
    gradients: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, operator: Operator, inputs: Sequence[Tensor], grad: Tensor | None) -> Results:
        """Results of an operator; without ``grad`` the output alone."""
        with torch.set_grad_enabled(grad is not None):
            output = operator(*inputs)
        if grad is None:
            return cls(output)
        return cls(output.detach(), torch.autograd.grad(output, leaves(inputs), grad))

    def error(self, truth: Results) -> float:
        """The largest relative error of all these tensors, each relative to its largest value."""
        worst = 0.0
        # The truth may have gradients that these results lack.
        for ours, theirs in zip((self.output, *self.gradients), (truth.output, *truth.gradients), strict=False):
            error = float((ours.double() - theirs).abs().amax() / theirs.abs().amax())
            worst = max(worst, error) if not math.isnan(error) else math.inf
        return worst


def leaves(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor.requires_grad)


def error_limit(dtype: torch.dtype) -> float:
    """The largest relative error of a right result, where ``value`` has this dtype."""
    return 1e-4 if dtype == torch.float32 else 2e-2


def true_results(operator: OperatorName, maps: Maps, inputs: Sequence[Tensor], grad: Tensor) -> Results:
    bind = bind_plain if operator == "plain" else bind_fused
    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    return Results.of(bind("reference")(maps), doubles, grad.double())


def runner(name: str, operator: Operator, inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """What is to be timed for the pass of that name."""
    differentiated = leaves(inputs)

    def forward() -> None:
        with torch.no_grad():
            operator(*inputs)

    def both() -> None:
        torch.autograd.grad(operator(*inputs), differentiated, grad)

    if name == "forward":
        return forward
    if name == "forward + backward":
        return both
    output = operator(*inputs)
    return lambda: torch.autograd.grad(output, differentiated, grad, retain_graph=True)


def usable_peers(device: torch.device) -> list[Peer]:
    """The peers that are installed and run on the device; says which do not run."""
    usable = []
    tiny = Size("tiny", 1, 2, 1, 8, ((2, 2),))
    for peer in PEERS:
        if importlib.util.find_spec(peer.module) is None:
            continue
        try:
            peer.bind(Maps.of(tiny.shapes, device))(*Inputs.of(tiny, device, torch.float32).of_operator("plain"))
        except Exception as error:  # whatever another package raises where it was built without this device
            print(f"{peer.module} is installed, but does not run on {device}: {error}")
        else:
            usable.append(peer)
    return usable
