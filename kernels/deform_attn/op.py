"""The public functions, their input checks, the choice of backend, and the torch.library operator behind both."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from deform_attn import cpu
from deform_attn.reference import ms_deform_attn_reference

Backend = Literal["auto", "triton", "cpu", "reference"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Sample feature maps of several sizes at each query's points, and return their weighted sum.

    The core of multi-scale deformable attention: Deformable DETR (Zhu et al., 2021), equation 3, without its linear
    maps. Sampling is bilinear with ``align_corners=False``; everything outside a map counts as zero, and so does a
    point whose location is NaN or infinite. The output and all gradients are computed in float32, or in float64 if
    ``value`` is float64: under autocast, pass locations and weights in float32 along with a half-precision ``value``.
    All backends except "reference" can be differentiated only once.

    Args:
        value: (B, S, M, D) floating point; the maps of all levels, each flattened row by row, one after the other.
            Must be finite: on a GPU, a cell that is not can show at points beside it or beyond the border next to it.
        spatial_shapes: (height, width) of each of the L levels, as integers; S is the sum of their products.
        sampling_locations: (B, Q, M, L, P, 2) floating point, (x, y) as fractions of each level's width and height.
        attention_weights: (B, Q, M, L, P) floating point.
        backend: "triton" is the kernel for GPUs, of float32, float16 and bfloat16 values with 8 to 128 channels D;
            "cpu" the fast path for tensors on the CPU; "reference" the plain definition by ``grid_sample``, on any
            device; "auto" is the fastest that supports ``value``.

    Returns:
        (B, Q, M * D), dtype of ``value``.

    Raises:
        TypeError: a tensor is not floating point, ``spatial_shapes`` holds anything but integers, or the backend does
            not support the dtype of ``value``.
        ValueError: shapes or devices do not fit together, or the backend is unknown or does not support the device or
            the number of channels.
    """
    tensors = {"value": value, "sampling_locations": sampling_locations, "attention_weights": attention_weights}
    _check(tensors, spatial_shapes, "sampling_locations", "attention_weights")
    return _dispatch(value, spatial_shapes, sampling_locations, attention_weights, None, backend)


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Compute ``ms_deform_attn`` from the outputs of a network's linear maps: offsets and logits.

    Around points, locations are reference + offset / (width, height) of the level; around boxes, center + offset *
    (width, height) of the box * 0.5 / P (Deformable DETR, section 4.1 and appendix A.4). Weights are the softmax of the
    logits over all L * P points of a query and head. The kernels compute both where they use them, so neither is ever
    stored in memory. Offsets and logits may be in half precision; the arithmetic is that of ``ms_deform_attn``.

    Args:
        value: (B, S, M, D) floating point; the maps of all levels, each flattened row by row, one after the other.
        spatial_shapes: (height, width) of each of the L levels, as integers; S is the sum of their products.
        reference_points: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (x, y of the center, width, height),
            floating point, as fractions of each level's width and height. May be an expanded tensor, also along L.
        sampling_offsets: (B, Q, M, L, P, 2) floating point, (x, y): around points in cells, around boxes in units of
            half the box's size over P.
        attention_logits: (B, Q, M, L, P) floating point.
        backend: as in ``ms_deform_attn``.

    Returns:
        (B, Q, M * D), dtype of ``value``.

    Raises:
        TypeError, ValueError: as in ``ms_deform_attn``.
    """
    tensors = {
        "value": value,
        "reference_points": reference_points,
        "sampling_offsets": sampling_offsets,
        "attention_logits": attention_logits,
    }
    _check(tensors, spatial_shapes, "sampling_offsets", "attention_logits")
    expected = (*sampling_offsets.shape[:2], len(spatial_shapes))
    if reference_points.shape not in ((*expected, 2), (*expected, 4)):
        raise ValueError(
            f"reference_points has shape {tuple(reference_points.shape)}; expected {(*expected, 2)} for points or "
            f"{(*expected, 4)} for boxes, with B and Q as in sampling_offsets"
        )
    return _dispatch(value, spatial_shapes, sampling_offsets, attention_logits, reference_points, backend)


def _check(
    tensors: dict[str, Tensor], spatial_shapes: Sequence[tuple[int, int]], coordinates_name: str, weights_name: str
) -> None:
    value, coordinates, weights = (tensors[name] for name in ("value", coordinates_name, weights_name))
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
    shape = coordinates.shape
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (batch, heads, len(spatial_shapes), 2):
        raise ValueError(
            f"{coordinates_name} has shape {tuple(shape)}; expected (B, Q, M, L, P, 2) "
            f"with B = {batch}, M = {heads} as in value and L = {len(spatial_shapes)} as in spatial_shapes"
        )
    if weights.shape != shape[:-1]:
        raise ValueError(
            f"{weights_name} has shape {tuple(weights.shape)}; "
            f"expected {tuple(shape[:-1])}, as {coordinates_name} without its last axis"
        )


def _choose(backend: str, value: Tensor) -> Literal["triton", "cpu", "reference"]:
    """The backend to use: the fastest that supports the value if "auto", else the one requested, if it does."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(map(repr, get_args(Backend)))}")
    device, channels = value.device, value.shape[3]
    on_gpu = device.type == "cuda"  # PyTorch's name for both CUDA and ROCm
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        fits = on_gpu and _HAS_TRITON and value.dtype != torch.float64 and 8 <= channels <= 128
        return "triton" if fits else "reference"
    if backend == "reference":
        return "reference"
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend 'cpu' got tensors on {device}; move them to the CPU or use backend 'auto'")
        return "cpu"
    if not _HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton; install it or use backend 'auto'")
    if not on_gpu and not (device.type == "cpu" and _interprets()):
        raise ValueError(f"backend 'triton' got tensors on {device}; move them to a GPU or use backend 'auto'")
    if value.dtype == torch.float64:
        raise TypeError("backend 'triton' got a float64 value; use float32 or half precision, or backend 'auto'")
    if not 8 <= channels <= 128:
        raise ValueError(f"backend 'triton' got D = {channels} channels; expected 8 to 128, or backend 'auto'")
    return "triton"


def _interprets() -> bool:
    import triton

    interpret: bool = triton.knobs.runtime.interpret
    return interpret


def _dispatch(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    backend: Backend,
) -> Tensor:
    """Call the backend, or the operator that calls it.

    Here and in every backend, ``coordinates`` and ``weights`` are sampling locations and attention weights if there is
    no ``reference``, and offsets and logits if there is one.
    """
    chosen = _choose(backend, value)
    if chosen == "reference":
        return ms_deform_attn_reference(value, spatial_shapes, coordinates, weights, reference)
    if chosen == "cpu" and _inlines(value, coordinates, weights, reference):
        return cpu.forward(value, spatial_shapes, coordinates, weights, reference)
    sizes = [size for shape in spatial_shapes for size in shape]
    output: Tensor = _operator(value, sizes, coordinates, weights, reference, backend)
    return output


def _inlines(*tensors: Tensor | None) -> bool:
    """Whether torch.compile should trace into the CPU path, to fuse its many small steps into a few loops.

    Not if gradients are needed, since those of ``embedding_bag`` are slower than the operator's own; and not in an
    exported program, which should run anywhere.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


# torch.library has no type for a list of pairs, so the sizes of the levels are one flat list (H_1, W_1, H_2, ...).
# The backend is an argument, so that the GPU kernels can be requested on the CPU, where Triton interprets them.
@torch.library.custom_op("deform_attn::ms_deform_attn", mutates_args=())
def _operator(
    value: Tensor, sizes: list[int], coordinates: Tensor, weights: Tensor, reference: Tensor | None, backend: str
) -> Tensor:
    output: Tensor = _implementation(backend, value).forward(value, _pairs(sizes), coordinates, weights, reference)
    return output


@torch.library.custom_op("deform_attn::ms_deform_attn_backward", mutates_args=())
def _operator_backward(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    coordinates: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = _implementation(backend, value).backward(
        grad, value, _pairs(sizes), coordinates, weights, reference
    )
    return grads


def _implementation(backend: str, value: Tensor) -> Any:
    """The module to call; chosen when the operator runs, since an exported program may run elsewhere."""
    chosen = _choose(backend, value)
    if chosen == "cpu":
        return cpu
    if chosen == "reference":
        raise ValueError(
            f"a program exported elsewhere got a value of {value.dtype} with {value.shape[3]} channels on "
            f"{value.device}, for which there is no kernel; export it there, or with backend='reference'"
        )
    from deform_attn import launch  # needs Triton, which may not be installed

    return launch


def _pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[0::2], sizes[1::2], strict=True))


@_operator.register_fake
def _(
    value: Tensor, sizes: list[int], coordinates: Tensor, weights: Tensor, reference: Tensor | None, backend: str
) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


@_operator_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    coordinates: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    reference = weights.new_empty(0) if reference is None else reference
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, coordinates, weights, reference))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, coordinates, weights, reference, ctx.backend = inputs
    ctx.save_for_backward(value, coordinates, weights, reference)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, coordinates, weights, reference = ctx.saved_tensors
    grads = _operator_backward(grad, value, ctx.sizes, coordinates, weights, reference, ctx.backend)
    return grads[0], None, grads[1], grads[2], None if reference is None else grads[3], None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "ms_deform_attn and fused_ms_deform_attn can be differentiated once; for second derivatives use "
        "backend='reference' in the forward pass"
    )


_operator.register_autograd(_backward, setup_context=_setup_context)
_operator_backward.register_autograd(_refuse)
