"""Multi-scale deformable attention on the CPU, as products with a sparse matrix.

The levels of one image and head are laid out one after another on a *canvas* with borders of zeros. A sampling point is
then four cells of the canvas, each with a coefficient, and the output of a query and head is the sum of its 4 * L * P
cells times their coefficients: one row of a sparse matrix A times the canvas. A point outside a level is moved into the
border, where it and its gradients read zeros, so no bounds need to be checked.

A head is one block of the canvas and of the rows of A, so the block stays in the cache while it is in use. Several
heads are processed at a time, as many as a limit on the temporaries allows.

Shapes here: heads of a chunk m <= M, points of all levels K = L * P. All coordinates are stored as planes, x before y.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import scipy.sparse
import torch
from torch import Tensor

_BORDER = 2  # in cells: the four neighbors of a point moved into it are all zero
_CHUNK = 2**20  # points processed at once; their indices and coefficients take 32 MB

with warnings.catch_warnings():
    # torch warns once per process that its CSR tensors are in beta, which is of no use to callers of this operator.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1), dtype=torch.float32)


@dataclass(frozen=True)
class _Canvas:
    """Where each level lies on the canvas.

    Each row of a level is preceded by two cells of zeros, which also end the previous row; two rows of zeros lie above
    and below the level.

    Attributes:
        length: number of cells.
        cells: (S,) int64, the cell of each position of ``value``.
        sizes: (2, 1, 1, 1, K), width and height of the level of each point.
        stride: (K,) int32, cells from one row to the next.
        start: (K,) int32, the cell at which the level of each point begins.
        corners: (4, K) int32, steps from a cell to itself and to its neighbors right, below, and below right.
    """

    length: int
    cells: Tensor
    sizes: Tensor
    stride: Tensor
    start: Tensor
    corners: Tensor

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], points: int, dtype: torch.dtype) -> _Canvas:
        # While compiling, a cache would pass tensors of one trace on to another.
        build = _build_canvas if torch.compiler.is_compiling() else _cached_canvas
        return build(tuple((height, width) for height, width in shapes), points, dtype)

    def paint(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Lay (B, S, m, D) out as (B * m * length, D)."""
        batch, _, heads, channels = value.shape
        canvas = value.new_zeros(batch, heads, self.length, channels, dtype=dtype)
        canvas[:, :, self.cells] = value.transpose(1, 2).to(dtype)
        return canvas.view(-1, channels)


def _build_canvas(shapes: tuple[tuple[int, int], ...], points: int, dtype: torch.dtype) -> _Canvas:
    cells, starts, strides, length = [], [], [], 0
    for height, width in shapes:
        stride = width + _BORDER
        rows = length + torch.arange(_BORDER, _BORDER + height).unsqueeze(1) * stride
        cells.append((rows + torch.arange(_BORDER, _BORDER + width)).flatten())
        starts += [length] * points
        strides += [stride] * points
        length += (height + 2 * _BORDER) * stride + _BORDER
    # Repeated as lists rather than by torch: the compiler vectorizes reads of a plain tensor.
    widths, heights = ([shape[axis] for shape in shapes for _ in range(points)] for axis in (1, 0))
    sizes = torch.tensor([widths, heights], dtype=dtype)
    stride_of, start_of = torch.tensor([strides, starts], dtype=torch.int32)
    corners = torch.stack((0 * stride_of, 0 * stride_of + 1, stride_of, stride_of + 1))
    return _Canvas(length, torch.cat(cells), sizes.view(2, 1, 1, 1, -1), stride_of, start_of, corners)


_cached_canvas = lru_cache(maxsize=64)(_build_canvas)


@dataclass(frozen=True)
class _Points:
    """Sampling points in cells, ``origin + scale * coordinates``; only ``coordinates`` is of full size.

    Attributes:
        origin: (), or (2, B, 1, Q, K) float64.
        scale: () or (2, 1, 1, 1, K) or (2, B, 1, Q, K).
        coordinates: (B, Q, M, L, P, 2), the caller's locations or offsets.
    """

    origin: Tensor
    scale: Tensor
    coordinates: Tensor

    @classmethod
    def of(cls, canvas: _Canvas, coordinates: Tensor, reference: Tensor | None) -> _Points:
        if reference is None:
            return cls(canvas.sizes.new_full((), _BORDER - 0.5), canvas.sizes, coordinates)
        points = coordinates.shape[4]
        planes = reference.to(canvas.sizes.dtype).repeat_interleave(points, dim=2).movedim(-1, 0).unsqueeze(2)
        # The center of pixel i, at i + 0.5, is cell _BORDER + i.
        origin = planes[:2].double() * canvas.sizes + (_BORDER - 0.5)
        scale = planes[2:] * canvas.sizes * (0.5 / points) if len(planes) == 4 else canvas.sizes.new_ones(())
        return cls(origin, scale, coordinates)

    def planes(self, heads: slice) -> Tensor:
        """A copy of the coordinates of some heads, (2, B, m, Q, K) and contiguous."""
        chunk = self.coordinates[:, :, heads]
        by_head = chunk.flatten(3, 4).transpose(1, 2).contiguous()  # moving heads first halves the time
        return by_head.movedim(-1, 0).to(self.scale.dtype, copy=True, memory_format=torch.contiguous_format)

    def split(self, canvas: _Canvas, heads: slice) -> tuple[Tensor, Tensor]:
        """Each point's cell and its distance beyond it, for some heads: (2, B, m, Q, K) int32 and floating point.

        The origin's whole cells are kept separate, so that a fraction is rounded like a number of a few cells.
        """
        planes = self.planes(heads)
        limit = canvas.sizes + _BORDER
        if torch.compiler.is_compiling():  # the compiler would round the product; float64 costs little
            position = _inside(self.origin + planes.double() * self.scale, limit)
            cell = position.to(torch.int32)
            return cell, (position - cell).to(planes.dtype)
        whole = self.origin.floor()
        rest = (self.origin - whole).to(planes.dtype)
        if self.scale.ndim:
            cell = torch.addcmul(rest, planes, self.scale).floor_()
            fraction = torch.sub(rest, cell).addcmul_(planes, self.scale).clamp_(0, 1)  # rounded once
        else:
            position = planes.add_(rest)
            cell = position.floor()
            fraction = position.sub_(cell)
        cell = _inside(cell.add_(whole.to(cell.dtype)), limit)
        return cell.to(torch.int32), fraction.nan_to_num_(nan=0.0)


def _inside(position: Tensor, limit: Tensor) -> Tensor:
    """Clamp to [0, limit], and move NaN to 0, in the border; may overwrite its argument."""
    if torch.compiler.is_compiling():  # the compiler does not vectorize nan_to_num
        return torch.where(position > 0, position, 0).minimum(limit)  # NaN is not > 0
    return position.clamp_(limit.new_zeros(()), limit).nan_to_num_(nan=0.0)


@dataclass(frozen=True)
class _Matrix:
    """The rows of the sparse matrix A for some heads; n = B * m * Q.

    Attributes:
        index: (n * 4 * K) int32, column of each entry of A.
        coefficients: (n * 4 * K), the entries.
        starts: (n + 1,) int32, where each row begins in these two.
        right: (B, m, Q, K), how far a point lies to the right of its left cells, in [0, 1].
        below: (B, m, Q, K), how far it lies below its upper cells, in [0, 1].
    """

    index: Tensor
    coefficients: Tensor
    starts: Tensor
    right: Tensor
    below: Tensor

    @classmethod
    def of(cls, canvas: _Canvas, points: _Points, weights: Tensor, heads: slice) -> _Matrix:
        """Build the rows; ``weights``, (B, m, Q, K), are already those of ``heads``."""
        batch, count, queries, total = weights.shape
        (column, row), (right, below) = points.split(canvas, heads)

        image = torch.arange(batch * count, dtype=torch.int32).view(batch, count, 1, 1) * canvas.length
        first = column + row * canvas.stride + (canvas.start + image)
        lower = weights * below
        upper = weights - lower
        if torch.compiler.is_compiling():
            # The compiler writes a stack of all four in one loop over the points.
            upper_right, lower_right = upper * right, lower * right
            index = torch.stack((first, first + 1, first + canvas.stride, first + (canvas.stride + 1)), dim=3)
            coefficients = torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right), dim=3)
        else:
            index = first.unsqueeze(3) + canvas.corners
            coefficients = weights.new_empty(batch, count, queries, 4, total)
            above_left, above_right, below_left, below_right = coefficients.unbind(3)
            torch.mul(upper, right, out=above_right)
            torch.sub(upper, above_right, out=above_left)
            torch.mul(lower, right, out=below_right)
            torch.sub(lower, below_right, out=below_left)
        starts = torch.arange(batch * count * queries + 1, dtype=torch.int32) * (4 * total)
        return cls(index.view(-1), coefficients.view(-1), starts, right, below)


def _chunks(weights: Tensor) -> list[slice]:
    """Split the heads of ``weights``, (B, Q, M, L, P), into chunks of about ``_CHUNK`` points."""
    if torch.compiler.is_compiling():
        return [slice(None)]  # one loop; a split that depends on the number of queries would recompile for each
    heads = weights.shape[2]
    step = max(1, _CHUNK * heads // weights.numel())
    return [slice(start, start + step) for start in range(0, heads, step)]


def _prepare(value: Tensor, shapes: Sequence[tuple[int, int]], weights: Tensor) -> _Canvas:
    canvas = _Canvas.of(shapes, weights.shape[4], torch.promote_types(value.dtype, torch.float32))
    entries = max(4 * weights.numel(), value.shape[0] * value.shape[2] * canvas.length)
    if entries > torch.iinfo(torch.int32).max:
        raise ValueError(f"the CPU path got {entries} cells to index with 32 bits; pass fewer images at once")
    return canvas


def _by_head(tensor: Tensor, heads: slice, dtype: torch.dtype) -> Tensor:
    """(B, Q, M, ...) to (B, m, Q, rest)."""
    return tensor[:, :, heads].flatten(3).transpose(1, 2).to(dtype)


def _is_empty(value: Tensor, weights: Tensor) -> bool:
    return not (weights.numel() and value.numel())


def forward(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    reference: Tensor | None,
) -> Tensor:
    """Compute ``ms_deform_attn``, or ``fused_ms_deform_attn`` if there is a reference.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (height, width) of each of the L levels.
        coordinates: (B, Q, M, L, P, 2) locations, or offsets if there is a reference.
        weights: (B, Q, M, L, P), or their logits if there is a reference.
        reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes.

    Returns:
        (B, Q, M * D), dtype of ``value``.
    """
    batch, queries, heads_total = weights.shape[:3]
    channels = value.shape[3]
    if _is_empty(value, weights):
        return value.new_zeros(batch, queries, heads_total * channels)
    canvas = _prepare(value, spatial_shapes, weights)
    dtype = canvas.sizes.dtype
    points = _Points.of(canvas, coordinates, reference)
    if reference is not None:
        weights = _softmax(weights, dtype)
    output = value.new_empty(batch, queries, heads_total, channels)
    for heads in _chunks(weights):
        matrix = _Matrix.of(canvas, points, _by_head(weights, heads, dtype), heads)
        rows = torch.embedding_bag(
            canvas.paint(value[:, :, heads], dtype),
            matrix.index,
            matrix.starts,
            mode=0,  # sum
            per_sample_weights=matrix.coefficients,
            include_last_offset=True,
        )[0]
        output[:, :, heads] = rows.view(batch, -1, queries, channels).transpose(1, 2)
    return output.flatten(2)


def _softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.flatten(3).softmax(-1, dtype=dtype).view(logits.shape)


@dataclass(frozen=True)
class _Gradients:
    """Gradients of value, points and weights; those of a constant origin or scale are not computed and stay zero."""

    value: Tensor
    coordinates: Tensor
    weights: Tensor
    origin: Tensor
    scale: Tensor


def _sample_backward(grad: Tensor, value: Tensor, canvas: _Canvas, points: _Points, weights: Tensor) -> _Gradients:
    batch, queries = weights.shape[:2]
    channels = value.shape[3]
    dtype = canvas.sizes.dtype
    result = _Gradients(
        value.new_empty(value.shape),
        points.coordinates.new_empty(points.coordinates.shape),
        weights.new_empty(weights.shape),
        torch.zeros_like(points.origin),
        torch.zeros_like(points.scale),
    )
    # A point that is not finite has no gradient, even if it is its scale that is not finite.
    scale = points.scale.nan_to_num(0.0, 0.0, 0.0)
    grad = grad.unflatten(2, value.shape[2:])
    for heads in _chunks(weights):
        head_weights = _by_head(weights, heads, dtype)
        matrix = _Matrix.of(canvas, points, head_weights, heads)
        cells = canvas.paint(value[:, :, heads], dtype)
        rows = _by_head(grad, heads, dtype).reshape(-1, channels)
        # The gradient of the canvas is A^T rows. torch would sort A to transpose it; SciPy multiplies by it as it is.
        transposed = scipy.sparse.csc_matrix(
            (matrix.coefficients.numpy(), matrix.index.numpy(), matrix.starts.numpy()),
            shape=(len(cells), len(rows)),
            copy=False,
        )
        cells_grad = torch.from_numpy(transposed @ rows.numpy()).view(batch, -1, canvas.length, channels)
        result.value[:, :, heads] = cells_grad.transpose(1, 2)[:, canvas.cells]

        # The gradient of a coefficient is the dot product of its cell and its row of grad, and overwrites it.
        csr = torch.sparse_csr_tensor(matrix.starts, matrix.index, matrix.coefficients, (len(rows), len(cells)))
        dots = torch.sparse.sampled_addmm(csr, rows, cells.t(), beta=0.0, out=csr).values()
        above, above_step, below, below_step = dots.view(batch, -1, queries, 4, head_weights.shape[3]).unbind(3)
        above_step -= above  # from left to right
        below_step -= below
        above.addcmul_(matrix.right, above_step)
        below.addcmul_(matrix.right, below_step)
        result.weights[:, :, heads] = (
            torch.lerp(above, below, matrix.below).transpose(1, 2).view_as(result.weights[:, :, heads])
        )
        planes_grad = torch.stack((above_step.lerp_(below_step, matrix.below), below.sub_(above)))
        planes_grad *= head_weights
        if points.origin.ndim:
            result.origin.add_(planes_grad.sum(2, keepdim=True))
            if points.scale.ndim:
                planes = points.planes(heads).nan_to_num_(0.0, 0.0, 0.0)
                result.scale.add_((planes_grad * planes).sum(2, keepdim=True))
        planes_grad *= scale
        result.coordinates[:, :, heads] = planes_grad.permute(1, 3, 2, 4, 0).unflatten(3, weights.shape[3:])
    return result


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
    no_reference = weights.new_zeros(0)
    if _is_empty(value, weights):
        inputs = value, coordinates, weights, no_reference if reference is None else reference
        zeros = [tensor.new_zeros(tensor.shape) for tensor in inputs]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    canvas = _prepare(value, spatial_shapes, weights)
    points = _Points.of(canvas, coordinates, reference)
    if reference is None:
        result = _sample_backward(grad, value, canvas, points, weights)
        return result.value, result.coordinates, result.weights, no_reference
    logits, weights = weights, _softmax(weights, canvas.sizes.dtype)
    result = _sample_backward(grad, value, canvas, points, weights)
    # Already summed over heads: sum over the points of each level, and convert from cells to fractions.
    planes = [result.origin * canvas.sizes]
    if reference.shape[3] == 4:
        planes.append(result.scale * canvas.sizes * (0.5 / logits.shape[4]))
    reference_grad = torch.cat(planes).squeeze(2).unflatten(3, logits.shape[3:]).sum(-1).movedim(0, -1)
    product = result.weights.mul_(weights).flatten(3)
    logits_grad = torch.addcmul(product, weights.flatten(3), product.sum(-1, keepdim=True), value=-1)
    return (
        result.value,
        result.coordinates,
        logits_grad.view(logits.shape).to(logits.dtype),
        reference_grad.to(reference.dtype).contiguous(),
    )
