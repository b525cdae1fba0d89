"""The public function: input checks, choice of backend, and the registration with torch.library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deform_attn import cpu
from deform_attn.reference import ms_deform_attn_reference

Backend = Literal["auto", "cpu", "reference"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Sample feature maps of several sizes at points of each query's choice and sum them up, weighted.

    The core of multi-scale deformable attention: Deformable DETR (Zhu et al., 2021), equation 3, without its linear
    maps. Sampling is bilinear with ``align_corners=False``; what lies outside a map is zero, and so is a point whose
    location is NaN or infinite. The output and all gradients are computed in float32, or in float64 if ``value`` is
    float64: under autocast, pass locations and weights in float32 beside a half-precision ``value``. The "cpu" backend
    is differentiable once.

    Args:
        value: (B, S, M, D) floating point; the maps of all levels, each flattened row by row, one after the other.
        spatial_shapes: (height, width) of each of the L levels, as integers; S is the sum of their products.
        sampling_locations: (B, Q, M, L, P, 2) floating point, (x, y) as fractions of each level's width and height.
        attention_weights: (B, Q, M, L, P) floating point.
        backend: "cpu" is the fast path for tensors on the CPU; "reference" is the plain definition by ``grid_sample``,
            on any device; "auto" takes the fastest that the device of ``value`` has.

    Returns:
        (B, Q, M * D), dtype of ``value``.

    Raises:
        TypeError: If a tensor is not floating point, or ``spatial_shapes`` holds anything but integers.
        ValueError: If shapes or devices do not fit together, or the backend is unknown or does not support the device.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    if backend not in ("auto", "cpu", "reference"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'cpu' or 'reference'")
    on_cpu = value.device.type == "cpu"
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"backend 'cpu' got tensors on {value.device}; move them to the CPU or use backend 'auto'")
    if backend == "reference" or not on_cpu:
        return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)
    sizes = [size for shape in spatial_shapes for size in shape]
    output: Tensor = _ms_deform_attn(value, sizes, sampling_locations, attention_weights)
    return output


def _check(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    tensors = {"value": value, "sampling_locations": sampling_locations, "attention_weights": attention_weights}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a floating-point dtype")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device} and value on {value.device}; move them to one device")
    if not all(isinstance(size, int | torch.SymInt) for shape in spatial_shapes for size in shape):
        raise TypeError(f"spatial_shapes is {spatial_shapes}; expected ((height, width), ...) of Python integers")
    if value.ndim != 4:
        raise ValueError(f"value has shape {tuple(value.shape)}; expected (B, S, M, D)")
    if not spatial_shapes or any(len(shape) != 2 or min(shape) < 1 for shape in spatial_shapes):
        raise ValueError(
            f"spatial_shapes is {spatial_shapes}; expected one (height, width) of at least (1, 1) per level"
        )
    batch, length, heads, _ = value.shape
    total = sum(height * width for height, width in spatial_shapes)
    if length != total:
        raise ValueError(
            f"value has S = {length} positions, but the maps of spatial_shapes {spatial_shapes} have {total}"
        )
    locations = sampling_locations.shape
    if len(locations) != 6 or (locations[0], *locations[2:4], locations[5]) != (batch, heads, len(spatial_shapes), 2):
        raise ValueError(
            f"sampling_locations has shape {tuple(locations)}; expected (B, Q, M, L, P, 2) "
            f"with B = {batch}, M = {heads} as in value and L = {len(spatial_shapes)} as in spatial_shapes"
        )
    if attention_weights.shape != locations[:-1]:
        raise ValueError(
            f"attention_weights has shape {tuple(attention_weights.shape)}; "
            f"expected {tuple(locations[:-1])}, as sampling_locations without its last axis"
        )


# The sizes of the levels cross torch.library as one flat list (H_1, W_1, H_2, ...), for it knows no list of pairs.
# A kernel for another device is added with `register_kernel` on both operators; the rest is shared.
@torch.library.custom_op("deform_attn::ms_deform_attn", mutates_args=(), device_types="cpu")
def _ms_deform_attn(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return cpu.forward(value, _pairs(sizes), locations, weights)


@torch.library.custom_op("deform_attn::ms_deform_attn_backward", mutates_args=(), device_types="cpu")
def _ms_deform_attn_backward(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.backward(grad, value, _pairs(sizes), locations, weights)


@_ms_deform_attn.register_fake
def _fake_forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


@_ms_deform_attn_backward.register_fake
def _fake_backward(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, list[int], Tensor, Tensor], output: Tensor) -> None:
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    value_grad, locations_grad, weights_grad = _ms_deform_attn_backward(grad, value, ctx.sizes, locations, weights)
    return value_grad, None, locations_grad, weights_grad


_ms_deform_attn.register_autograd(_backward, setup_context=_setup_context)


def _pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[0::2], sizes[1::2], strict=True))
