"""Launching the kernels of ``triton.py``: block sizes, limits, and the tensors that they write."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deform_attn.triton import backward_kernel, forward_kernel

_WIDE = 2**31  # from this many elements of value per image, offsets take 64 bits
_CELLS = 2**31 - 1  # most cells in an image: they are counted in 32 bits
_FLOAT32_INTEGERS = 2**24  # up to here, float32 represents every integer
_GRID = 65535  # most programs along the second and third axes of a grid

# What a lane holds of a program's block of queries x channels. Larger blocks take fewer instructions and more
# registers. On an H200, forward at an encoder's size takes 4 to 20 % longer with half or twice as many bytes.
FORWARD_BYTES = 16
BACKWARD_ELEMENTS = 4
_TABLE = 4  # most entries per lane of a block's table of queries x points
# Registers per lane for tables of one entry per lane. On an A100 these suffice without spills, though the compiler
# would take up to 72; on later GPUs they would not.
FORWARD_REGISTERS_A100 = 64


@dataclass(frozen=True)
class Device:
    """What a launch depends on: lanes per warp, compute capability (NVIDIA only), and whether Triton interprets."""

    lanes: int
    capability: tuple[int, int] | None
    interprets: bool = False

    @classmethod
    @cache
    def of(cls, device: torch.device) -> Device:
        """Describe a GPU, or the CPU, on which Triton's interpreter takes warps of any size."""
        if device.type == "cpu":
            return cls(32, None, interprets=True)
        lanes = torch.cuda.get_device_properties(device).warp_size
        return cls(lanes, None if torch.version.hip else torch.cuda.get_device_capability(device))


def launch_arguments(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    weights: Tensor,
    reference: Tensor | None,
    device: Device,
    *,
    backward: bool,
) -> Mapping[str, Any]:
    """A kernel's arguments by name, except its tensors; computed once for all tensors of the same sizes."""
    sizes, axes = value.shape[1:], 0
    stride: tuple[int, ...] = (0, 0, 0, 0)
    if reference is not None:
        axes, stride = reference.shape[3], reference.stride()
    wide = sizes.numel() >= _WIDE
    elements = BACKWARD_ELEMENTS if backward else FORWARD_BYTES // value.element_size()
    shapes = tuple(spatial_shapes)
    return _launch_arguments(sizes, shapes, weights.shape, axes, stride, wide, device, elements, backward)


@lru_cache(maxsize=1024)  # training may see images of many sizes
def _launch_arguments(
    value: torch.Size,
    spatial_shapes: tuple[tuple[int, int], ...],
    weights: torch.Size,
    axes: int,
    stride: tuple[int, ...],
    wide: bool,
    device: Device,
    elements: int,
    backward: bool,
) -> Mapping[str, Any]:
    (length, _, channels), (batch, queries, heads, levels, points) = value, weights
    if max(batch, heads) > _GRID or length > _CELLS or max(map(max, spatial_shapes)) > _FLOAT32_INTEGERS:
        raise ValueError(
            f"the GPU kernels got {batch} images, {heads} heads and levels of {spatial_shapes}; expected at most "
            f"{_GRID} images and heads, {_CELLS} cells and {_FLOAT32_INTEGERS} to a side; pass fewer at once"
        )
    padded = triton.next_power_of_2(channels)
    padded_points = triton.next_power_of_2(points)
    block = max(1, min(elements * device.lanes // padded, _TABLE * device.lanes // padded_points))
    arguments = {
        "sizes": tuple(float(size) for shape in spatial_shapes for size in shape),
        "Q": queries,
        "S": length,
        "levels": levels,
        "stride_b": stride[0],
        "stride_q": stride[1],
        "stride_l": stride[2],
        "stride_r": stride[3],
        "M": heads,
        "D": channels,
        "L": levels,
        "P": points,
        "R": axes,
        "BLOCK": block,
        # The entries of a table with fewer entries than lanes are recomputed by Triton in every lane that reads them.
        "POINTS": max(padded_points, device.lanes // block),
        "ALL": triton.next_power_of_2(levels * points),
        "CHANNELS": padded,
        "THIN": any(min(shape) == 1 for shape in spatial_shapes),
        "WIDE": wide,
        "num_warps": 1,
    }
    if backward:
        arguments["corners"] = 4
    elif device.capability == (8, 0) and block * padded_points <= device.lanes:
        arguments["maxnreg"] = FORWARD_REGISTERS_A100
    if device.interprets:  # before Triton 3.7, with NumPy 2.4, the interpreter's loops need constant bounds
        arguments |= {name: tl.constexpr(arguments[name]) for name in ("levels", "corners") if name in arguments}
    return arguments


def _within_32_bits(reference: Tensor | None) -> Tensor | None:
    """The reference, copied if its elements lie so far apart that the kernels' offsets would overflow."""
    if reference is None:
        return None
    furthest = sum((size - 1) * stride for size, stride in zip(reference.shape, reference.stride(), strict=True))
    return reference if furthest < _WIDE else reference.contiguous()


def forward(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    reference: Tensor | None,
) -> Tensor:
    """Compute ``ms_deform_attn``, or ``fused_ms_deform_attn`` if there is a reference.

    Arguments and result are those of ``cpu.forward``, on a GPU.
    """
    batch, queries, heads = weights.shape[:3]
    channels = value.shape[3]
    if not weights.numel() or not value.numel():
        return value.new_zeros(batch, queries, heads * channels)
    output = value.new_empty(batch, queries, heads * channels)
    coordinates, reference = coordinates.contiguous(), _within_32_bits(reference)
    arguments = launch_arguments(value, spatial_shapes, weights, reference, Device.of(value.device), backward=False)
    with torch.cuda.device_of(value):
        forward_kernel[_grid(weights, arguments["BLOCK"])](
            output,
            value.contiguous(),
            coordinates,
            weights.contiguous(),
            coordinates if reference is None else reference,
            **arguments,
        )
    return output


def backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of ``forward``'s tensors, in their order, from that of its output, (B, Q, M * D).

    Without a reference, the last gradient has no elements.
    """
    inputs = value, coordinates, weights, weights.new_empty(0) if reference is None else reference
    if not weights.numel() or not value.numel():
        zeros = [tensor.new_zeros(tensor.shape) for tensor in inputs]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    _check_deterministic()
    reference = _within_32_bits(reference)
    value_grad, reference_grad = (x.new_zeros(x.shape, dtype=torch.float32) for x in (value, inputs[3]))
    coordinate_grad, weight_grad = (x.new_empty(x.shape, dtype=torch.float32) for x in (coordinates, weights))
    grads = value_grad, coordinate_grad, weight_grad, reference_grad
    arguments = launch_arguments(value, spatial_shapes, weights, reference, Device.of(value.device), backward=True)
    with torch.cuda.device_of(value):
        backward_kernel[_grid(weights, arguments["BLOCK"])](
            *grads,
            grad.contiguous(),
            value.contiguous(),
            coordinates.contiguous(),
            weights.contiguous(),
            coordinates if reference is None else reference,
            **arguments,
        )
    cast = [result.to(tensor.dtype) for result, tensor in zip(grads, inputs, strict=True)]
    return cast[0], cast[1], cast[2], cast[3]


def _grid(weights: Tensor, block: int) -> tuple[int, int, int]:
    batch, queries, heads = weights.shape[:3]
    return triton.cdiv(queries, block), heads, batch


def _check_deterministic() -> None:
    """Raise or warn as PyTorch's own operators do if their sums depend on the order of threads."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "the backward pass of ms_deform_attn on a GPU does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'; use torch.use_deterministic_algorithms(True, warn_only=True) or, "
        "for tensors on the CPU, backend 'cpu', which is deterministic"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
