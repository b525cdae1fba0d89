"""Random inputs of both functions, and what a backend makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from deform_attn import fused_ms_deform_attn, ms_deform_attn
from deform_attn.op import Backend

Shapes = tuple[tuple[int, int], ...]
Variant = Literal["plain", "points", "boxes"]

VARIANTS: tuple[Variant, ...] = ("plain", "points", "boxes")
PYRAMID: Shapes = ((7, 13), (4, 6), (3, 2), (1, 1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the Triton kernels run, compiled or interpreted

# Relative to the largest entry of what is expected, which is computed in float64 of the same inputs.
TOLERANCE = {
    torch.float64: 1e-12,  # some hundred roundings of 2e-16, in another order
    # The same of 6e-8; and positions of some ten cells are exact to 1e-6 of a cell, which turns up in differences of
    # neighbors that may be larger than what is interpolated.
    torch.float32: 1e-5,
    # Computed in float32 and rounded once, and softmax's gradient from an output that was rounded: two units.
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


def skip_where_nan_spreads(backend: str) -> None:
    """Before triton 3.8 its interpreter takes the larger of NaN and 0 for NaN, where GPUs take it for 0."""
    if backend == "triton" and DEVICE == "cpu" and Version(version("triton")) < Version("3.8"):
        pytest.skip("NaN spreads in triton's interpreter before 3.8, not on a GPU")


@dataclass(frozen=True)
class Case:
    """Arguments of ``ms_deform_attn`` or of ``fused_ms_deform_attn``, by their names, in their order."""

    shapes: Shapes
    tensors: dict[str, Tensor]

    def run(self, backend: Backend) -> Tensor:
        function = fused_ms_deform_attn if len(self.tensors) == 4 else ms_deform_attn
        value, *others = self.tensors.values()
        return function(value, self.shapes, *others, backend=backend)

    def results(self, backend: Backend) -> dict[str, Tensor]:
        """The output and all gradients, for one fixed random gradient of the output."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        output = Case(self.shapes, leaves).run(backend)
        rng = torch.Generator().manual_seed(8)
        grad = torch.randn(output.shape, generator=rng, dtype=torch.float64).to(output)
        grads = torch.autograd.grad(output, tuple(leaves.values()), grad)
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    def replace(self, **tensors: Tensor) -> Case:
        return replace(self, tensors={**self.tensors, **tensors})

    def to(self, to: str | torch.dtype) -> Case:
        return replace(self, tensors={name: tensor.to(to) for name, tensor in self.tensors.items()})


def make_case(
    variant: Variant = "plain",
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    channels: int = 8,
    shapes: Shapes = PYRAMID,
    points: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Some of the points lie outside the maps. Half precision is for the value, and for offsets and logits."""
    rng = torch.Generator().manual_seed(7)

    def random(*size: int) -> Tensor:
        return torch.rand(size, generator=rng, dtype=torch.float64)

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (batch, queries, heads, len(shapes), points)
    value = (random(batch, sum(height * width for height, width in shapes), heads, channels) * 4 - 2).to(dtype)
    if variant == "plain":
        locations, weights = random(*shape, 2) * 1.3 - 0.15, random(*shape) * 2 - 1
        return Case(
            shapes,
            {"value": value, "sampling_locations": locations.to(exact), "attention_weights": weights.to(exact)},
        )
    reference = random(batch, queries, len(shapes), 2)
    if variant == "boxes":
        reference = torch.cat((reference, random(batch, queries, len(shapes), 2) / 2 + 0.1), dim=-1)
    offsets, logits = random(*shape, 2) * 6 - 3, random(*shape) * 4 - 2
    return Case(
        shapes,
        {
            "value": value,
            "reference_points": reference.to(exact),
            "sampling_offsets": offsets.to(dtype),
            "attention_logits": logits.to(dtype),
        },
    )


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), name
        scale = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        torch.testing.assert_close(
            actual[name].to(tensor),
            tensor,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_right(case: Case, backend: Backend) -> None:
    """Compare with the definition in float64."""
    if backend == "triton":
        case = case.to(DEVICE)
    actual = case.results(backend)
    for name, tensor in case.tensors.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
    dtype = case.tensors["value"].dtype
    assert actual["output"].dtype == dtype
    assert_same(actual, case.to(torch.float64).results("reference"), TOLERANCE[dtype])
