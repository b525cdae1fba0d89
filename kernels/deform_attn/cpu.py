"""Multi-scale deformable attention on the CPU, as products with a sparse matrix.

The levels of one image and head are laid one below the other on a *canvas* with a border of zeros. A sampling point
then is four cells of the canvas, each with a coefficient, and the output of a query and head is the sum of its
4 * L * P cells times their coefficients: one row of a sparse matrix A times the canvas. A point outside a level moves
into the border, so that no bounds are checked, and what it and its gradients read is zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.sparse
import torch
from torch import Tensor

_BORDER = 2  # cells: the four neighbours of a point moved into it are all zero

with warnings.catch_warnings():
    # torch says once per process that its CSR tensors are in beta; that is of no use to whoever calls this op.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1), dtype=torch.float32)


@dataclass(frozen=True)
class _Canvas:
    """Where each level lies on the canvas: ``tops`` are the rows at which the levels' borders begin."""

    shapes: Sequence[tuple[int, int]]
    tops: list[int]
    height: int
    width: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]]) -> _Canvas:
        tops = [0]
        for height, _ in shapes:
            tops.append(tops[-1] + height + _BORDER)  # the border below one level is the border above the next
        return cls(shapes, tops[:-1], tops[-1] + _BORDER, max(width for _, width in shapes) + 2 * _BORDER)

    def paint(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Lay (B, S, M, D) out as (B * M * height * width, D)."""
        batch, _, heads, channels = value.shape
        cells = value.new_zeros(batch, heads, self.height, self.width, channels, dtype=dtype)
        for target, source in zip(self._levels(cells), self._split(value), strict=True):
            target.copy_(source)
        return cells.view(-1, channels)

    def read(self, cells: Tensor, value: Tensor) -> Tensor:
        """Take the levels from a canvas, the inverse of ``paint``; shape and dtype as ``value``."""
        result = torch.empty_like(value, memory_format=torch.contiguous_format)
        batch, _, heads, channels = value.shape
        cells = cells.view(batch, heads, self.height, self.width, channels)
        for source, target in zip(self._levels(cells), self._split(result), strict=True):
            target.copy_(source)
        return result

    def _levels(self, cells: Tensor) -> list[Tensor]:
        return [
            cells[:, :, top + _BORDER : top + _BORDER + height, _BORDER : _BORDER + width]
            for top, (height, width) in zip(self.tops, self.shapes, strict=True)
        ]

    def _split(self, value: Tensor) -> list[Tensor]:
        levels = torch.split(value, [height * width for height, width in self.shapes], dim=1)
        return [
            torch.unflatten(level, 1, shape).movedim(3, 1) for level, shape in zip(levels, self.shapes, strict=True)
        ]


@dataclass(frozen=True)
class _Points:
    """Sampling points on the canvas; n = B * Q * M.

    Attributes:
        index: (n, 4, L * P) int32, the cells above left, above right, below left and below right of each point.
        right: (n, L * P), how far the point lies to the right of the left cells, in [0, 1).
        below: (n, L * P), how far it lies below the upper cells, in [0, 1).
    """

    index: Tensor
    right: Tensor
    below: Tensor

    @classmethod
    def on(cls, canvas: _Canvas, locations: Tensor, dtype: torch.dtype) -> _Points:
        batch, queries, heads, levels, points, _ = locations.shape
        entries = max(4 * locations[..., 0].numel(), batch * heads * canvas.height * canvas.width)
        if entries > torch.iinfo(torch.int32).max:
            raise ValueError(f"the CPU path got {entries} cells to index with 32 bits; pass fewer images at once")
        planes = locations.reshape(-1, levels * points, 2).movedim(-1, 0).to(dtype)  # x and y
        sizes = torch.tensor(canvas.shapes, dtype=dtype).fliplr().t().repeat_interleave(points, dim=1).unsqueeze(1)
        offset = torch.full((), _BORDER - 0.5, dtype=dtype)  # the centre of pixel i, at i + 0.5, is cell _BORDER + i
        position = torch.addcmul(offset, planes, sizes, out=torch.empty(planes.shape, dtype=dtype))
        position.clamp_(torch.zeros((), dtype=dtype), sizes + _BORDER)
        if position.sum().isnan():  # rare, and a look is cheaper than another pass
            position.nan_to_num_(nan=0.0)
        cell = position.to(torch.int32)
        position.frac_()

        index = torch.add(cell[0], cell[1], alpha=canvas.width)
        corner = torch.tensor([0, 1, canvas.width, canvas.width + 1], dtype=torch.int32)
        top = torch.tensor(canvas.tops, dtype=torch.int32).repeat_interleave(points) * canvas.width
        image = torch.arange(batch * heads, dtype=torch.int32) * (canvas.height * canvas.width)
        start = image.view(batch, 1, heads, 1, 1) + corner.view(4, 1) + top
        index = index.view(batch, queries, heads, 1, levels * points) + start
        return cls(index.view(-1, 4, levels * points), position[0], position[1])

    def coefficients(self, weights: Tensor) -> Tensor:
        """Share each point's weight (n, L * P) out among its four cells: (n, 4, L * P)."""
        result = weights.new_empty(self.index.shape)
        above_left, above_right, below_left, below_right = result.unbind(1)
        below = weights * self.below
        above = weights - below
        torch.mul(above, self.right, out=above_right)
        torch.sub(above, above_right, out=above_left)
        torch.mul(below, self.right, out=below_right)
        torch.sub(below, below_right, out=below_left)
        return result


def forward(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute ``ms_deform_attn``; arguments and result are its own, unchecked."""
    batch, queries, heads = weights.shape[:3]
    channels = value.shape[3]
    if not weights.numel() or not value.numel():
        return value.new_zeros(batch, queries, heads * channels)
    dtype = torch.promote_types(value.dtype, torch.float32)
    canvas = _Canvas.of(spatial_shapes)
    points = _Points.on(canvas, locations, dtype)
    coefficients = points.coefficients(weights.reshape(points.right.shape).to(dtype))
    starts = torch.arange(0, points.index.numel(), points.index[0].numel(), dtype=torch.int32)
    output = torch.embedding_bag(
        canvas.paint(value, dtype),
        points.index.view(-1),
        starts,
        mode=0,  # sum
        per_sample_weights=coefficients.view(-1),
    )[0]
    return output.view(batch, queries, heads * channels).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``forward``'s value, locations and weights from its output's ``grad``."""
    if not weights.numel() or not value.numel():
        return value.new_zeros(value.shape), locations.new_zeros(locations.shape), weights.new_zeros(weights.shape)
    dtype = torch.promote_types(value.dtype, torch.float32)
    canvas = _Canvas.of(spatial_shapes)
    points = _Points.on(canvas, locations, dtype)
    flat_weights = weights.reshape(points.right.shape).to(dtype)
    coefficients = points.coefficients(flat_weights)
    cells = canvas.paint(value, dtype)
    grad = grad.reshape(-1, value.shape[3]).to(dtype)

    rows, columns = len(grad), len(cells)
    starts = torch.arange(0, points.index.numel() + 1, points.index[0].numel(), dtype=torch.int32)
    # The gradient of the canvas is A^T grad. torch would sort to transpose A; SciPy multiplies by it as it is.
    transposed = scipy.sparse.csc_matrix(
        (coefficients.view(-1).numpy(), points.index.view(-1).numpy(), starts.numpy()),
        shape=(columns, rows),
        copy=False,
    )
    value_grad = canvas.read(torch.from_numpy(transposed @ grad.numpy()), value)

    # The gradient of a coefficient is the dot product of its cell and its row of grad, and takes its place.
    matrix = torch.sparse_csr_tensor(starts, points.index.view(-1), coefficients.view(-1), (rows, columns))
    dots = torch.sparse.sampled_addmm(matrix, grad, cells.t(), beta=0.0, out=matrix).values().view(points.index.shape)
    above, above_step, below, below_step = dots.unbind(1)
    above_step -= above  # from left to right
    below_step -= below
    above.addcmul_(points.right, above_step)
    below.addcmul_(points.right, below_step)
    weights_grad = torch.lerp(above, below, points.below)
    down_step = below.sub_(above)
    # One step to the right or down is 1 / width or 1 / height of the level.
    heights, widths = torch.tensor(spatial_shapes, dtype=dtype).repeat_interleave(weights.shape[4], dim=0).unbind(1)
    locations_grad = grad.new_empty(*points.right.shape, 2)
    torch.mul(down_step.mul_(heights), flat_weights, out=locations_grad[..., 1])
    torch.mul(above_step.lerp_(below_step, points.below).mul_(widths), flat_weights, out=locations_grad[..., 0])
    return (
        value_grad,
        locations_grad.view(locations.shape).to(locations.dtype),
        weights_grad.view(weights.shape).to(weights.dtype),
    )
