"""Multi-scale deformable attention on GPUs: the forward and the backward kernel, in Triton.

A program is one warp and owns a block of queries of one head. For each level it places the block's points, one point
per lane, hands every lane the cells and coefficients of its queries through shared memory, and then gathers: a row of
channels is read by as many lanes as it takes at 16 bytes each. ``kernels/README.md`` explains why.

Both kernels compute plain and fused attention, which differ only in where a point's position and weight come from.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _size(sizes, level, L: tl.constexpr):
    """Height and width of a level, as floats. An index into ``sizes`` would have to be constant."""
    height = sizes[0]
    width = sizes[1]
    for other in tl.static_range(1, L):
        height = tl.where(level == other, sizes[2 * other], height)
        width = tl.where(level == other, sizes[2 * other + 1], width)
    return height, width


@triton.jit
def _positions(coordinate_ptr, reference_ptr, stride_r, point, mask, height, width, R: tl.constexpr, P: tl.constexpr):
    """Locate points: they are at center * size + shift, in cells of their level, for both axes.

    Returns the centers, the shifts, the derivatives of positions with respect to the coordinates, and the coordinates.
    """
    given_x = tl.load(coordinate_ptr + 2 * point, mask=mask, other=0.0).to(tl.float32)
    given_y = tl.load(coordinate_ptr + (2 * point + 1), mask=mask, other=0.0).to(tl.float32)
    if R == 0:  # sampling locations
        return given_x, given_y, 0.0, 0.0, width, height, given_x, given_y
    else:
        center_x = tl.load(reference_ptr).to(tl.float32)
        center_y = tl.load(reference_ptr + stride_r).to(tl.float32)
        scale_x = 1.0
        scale_y = 1.0
        if R == 4:  # offsets are in units of half the box's size over P
            scale_x = tl.load(reference_ptr + 2 * stride_r).to(tl.float32) * width * (0.5 / P)
            scale_y = tl.load(reference_ptr + 3 * stride_r).to(tl.float32) * height * (0.5 / P)
        return center_x, center_y, given_x * scale_x, given_y * scale_y, scale_x, scale_y, given_x, given_y


@triton.jit
def _split(center, shift, size):
    """The lower of the two cells that a point lies between, moved so that both exist, and the distance from it.

    The distance is not taken from the point's coordinate, which may be tens of cells and is rounded accordingly.
    """
    coordinate = tl.fma(center, size, -0.5) + shift
    cell = tl.maximum(tl.minimum(tl.floor(coordinate), size - 2), 0.0)  # NaN gets some cell, too
    return cell, tl.fma(center, size, -0.5 - cell) + shift


@triton.jit
def _hat(distance):
    """Linear interpolation: 1 at a cell's center, 0 from one cell away; also 0 for NaN."""
    return tl.maximum(1 - tl.abs(distance), 0.0)


@triton.jit
def _slope(distance):
    """Derivative of ``_hat``; at its kinks, the right-hand one."""
    return tl.where((distance >= -1) & (distance < 0), 1.0, tl.where((distance >= 0) & (distance < 1), -1.0, 0.0))


@triton.jit
def _column(table, k: tl.constexpr):
    """Column k of a (queries, points) table; the number of points is a power of two."""
    if table.shape[1] == 1:
        return tl.reshape(table, [table.shape[0]])
    else:
        even, odd = tl.split(tl.reshape(table, [table.shape[0], table.shape[1] // 2, 2]))
        if k % 2 == 0:
            return _column(even, k // 2)
        else:
            return _column(odd, k // 2)


@triton.jit
def _gather_row(
    total,
    row_ptr,
    right,
    cell,
    left_weight,
    right_weight,
    mask,
    P: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add to ``total`` each point's two neighbors in one row of cells, weighted."""
    for k in tl.static_range(P):
        offset = _column(cell, k)[:, None]
        if WIDE:
            offset = offset.to(tl.int64)
        pointer = row_ptr + offset * STEP
        total += _column(left_weight, k)[:, None] * tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        total += _column(right_weight, k)[:, None] * tl.load(pointer + right, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _softmax(logit_ptr, block, here, LP: tl.constexpr, ALL: tl.constexpr, STRIDE: tl.constexpr):
    """``largest`` and ``scale``, which turn logits into weights: exp(logit - largest) * scale."""
    k = tl.arange(0, ALL)[None, :]
    logits = tl.load(logit_ptr + (block * STRIDE + k), mask=here & (k < LP), other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, axis=1)[:, None]
    return largest, 1 / tl.sum(tl.exp(logits - largest), axis=1)[:, None]


@triton.jit(do_not_specialize=["Q", "S", "levels", "stride_b", "stride_q", "stride_l", "stride_r"])
def forward_kernel(
    output_ptr,  # (B, Q, M, D)
    value_ptr,  # (B, S, M, D)
    coordinate_ptr,  # (B, Q, M, L, P, 2) locations, or offsets if fused
    weight_ptr,  # (B, Q, M, L, P) weights, or logits if fused
    reference_ptr,  # (B, Q, L, R) if fused
    sizes,  # height and width of every level, as floats: Triton would recompile for integers that are multiples of 16
    Q,
    S,
    levels,  # L again, at run time: a loop of known length would be unrolled
    stride_b,
    stride_q,
    stride_l,
    stride_r,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,  # 0: plain; 2: fused, around points; 4: fused, in boxes
    BLOCK: tl.constexpr,
    POINTS: tl.constexpr,  # P, rounded up to a power of two; more if the table would have fewer entries than lanes
    ALL: tl.constexpr,  # L * P, rounded up to a power of two
    CHANNELS: tl.constexpr,  # D, rounded up to a power of two
    THIN: tl.constexpr,  # some level is one cell wide or high
    WIDE: tl.constexpr,  # offsets into value take 64 bits
):
    """Compute ``ms_deform_attn``, or ``fused_ms_deform_attn`` if R > 0, for a block of queries of one head."""
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    block = tl.arange(0, BLOCK)[:, None]
    here = block < Q - start
    first = (image * Q + start) * M + head  # index of the block's first pair of query and head

    k = tl.arange(0, POINTS)[None, :]
    d = tl.arange(0, CHANNELS)[None, :]
    known = here & (k < P)
    row_ptr = value_ptr + (image * S * M + head) * D + d
    coordinate_ptr += first * (L * P * 2)
    weight_ptr += first * (L * P)
    if R > 0:
        reference_ptr += image * stride_b + start * stride_q.to(tl.int64)
        reference_ptr = reference_ptr + tl.minimum(block, Q - start - 1) * stride_q
        largest, scale = _softmax(weight_ptr, block, here, L * P, ALL, M * L * P)

    total = tl.zeros([BLOCK, CHANNELS], tl.float32)
    cells = 0
    for level in range(levels):
        height, width = _size(sizes, level, L)
        point = block * (M * L * P) + k + level * P
        center_x, center_y, shift_x, shift_y, _, _, _, _ = _positions(
            coordinate_ptr, reference_ptr + level * stride_l, stride_r, point, known, height, width, R, P
        )
        column, x = _split(center_x, shift_x, width)
        row, y = _split(center_y, shift_y, height)
        if R == 0:
            weight = tl.load(weight_ptr + point, mask=known, other=0.0).to(tl.float32)
        else:
            weight = tl.load(weight_ptr + point, mask=known, other=float("-inf")).to(tl.float32)
            weight = tl.exp(weight - largest) * scale
        left_weight = _hat(x)
        right_weight = _hat(x - 1)
        above = _hat(y) * weight
        below = _hat(y - 1) * weight
        across = width.to(tl.int32)
        cell = row.to(tl.int32) * across + column.to(tl.int32) + cells
        right = M * D
        down = across.to(tl.int64 if WIDE else tl.int32) * (M * D)
        if THIN:  # where there is no second cell, read the first one, with weight zero
            right = tl.where(width > 1, right, 0)
            right_weight = tl.where(width > 1, right_weight, 0.0)
            down = tl.where(height > 1, down, 0)
            below = tl.where(height > 1, below, 0.0)
        total = _gather_row(
            total, row_ptr, right, cell, above * left_weight, above * right_weight, d < D, P, M * D, WIDE
        )
        total = _gather_row(
            total, row_ptr + down, right, cell, below * left_weight, below * right_weight, d < D, P, M * D, WIDE
        )
        cells += across * height.to(tl.int32)

    tl.store(output_ptr + first * D + block * (M * D) + d, total.to(output_ptr.dtype.element_ty), mask=here & (d < D))


@triton.jit
def _scatter_corner(
    value_ptr, value_grad_ptr, cell, coefficient, grad, mask, P: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr
):
    """Add one corner of each point to the gradient of value; return the dot products of these cells with ``grad``."""
    k = tl.arange(0, cell.shape[1])[None, :]
    dots = tl.zeros(cell.shape, tl.float32)
    for point in tl.static_range(P):
        offset = _column(cell, point)[:, None]
        if WIDE:
            offset = offset.to(tl.int64)
        offset = offset * STEP
        share = _column(coefficient, point)[:, None]
        value = tl.load(value_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.atomic_add(value_grad_ptr + offset, share * grad, mask=(share != 0) & mask, sem="relaxed")
        dots = tl.where(k == point, tl.sum(value * grad, axis=1)[:, None], dots)
    return dots


@triton.jit(do_not_specialize=["Q", "S", "levels", "corners", "stride_b", "stride_q", "stride_l", "stride_r"])
def backward_kernel(
    value_grad_ptr,  # (B, S, M, D) float32, zeros
    coordinate_grad_ptr,  # as coordinate, float32
    weight_grad_ptr,  # as weight, float32
    reference_grad_ptr,  # (B, Q, L, R) float32, zeros, if fused
    grad_ptr,  # (B, Q, M, D)
    value_ptr,
    coordinate_ptr,
    weight_ptr,
    reference_ptr,
    sizes,
    Q,
    S,
    levels,
    corners,  # 4, at run time like ``levels``
    stride_b,
    stride_q,
    stride_l,
    stride_r,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    POINTS: tl.constexpr,
    ALL: tl.constexpr,
    CHANNELS: tl.constexpr,
    THIN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute all gradients of what ``forward_kernel`` computes; arguments not explained here are as there."""
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    block = tl.arange(0, BLOCK)[:, None]
    here = block < Q - start
    first = (image * Q + start) * M + head

    k = tl.arange(0, POINTS)[None, :]
    d = tl.arange(0, CHANNELS)[None, :]
    known = here & (k < P)
    row_ptr = value_ptr + (image * S * M + head) * D + d
    row_grad_ptr = value_grad_ptr + (image * S * M + head) * D + d
    coordinate_ptr += first * (L * P * 2)
    coordinate_grad_ptr += first * (L * P * 2)
    weight_ptr += first * (L * P)
    weight_grad_ptr += first * (L * P)
    channel = block * (M * D) + d
    grad = tl.load(grad_ptr + first * D + channel, mask=here & (d < D), other=0.0).to(tl.float32)
    if R > 0:
        reference_ptr += image * stride_b + start * stride_q.to(tl.int64)
        reference_ptr = reference_ptr + tl.minimum(block, Q - start - 1) * stride_q
        reference_grad_ptr += (image * Q + start) * (L * R)
        largest, scale = _softmax(weight_ptr, block, here, L * P, ALL, M * L * P)
        mean = tl.zeros([BLOCK, POINTS], tl.float32)

    cells = 0
    for level in range(levels):
        height, width = _size(sizes, level, L)
        point = block * (M * L * P) + k + level * P
        center_x, center_y, shift_x, shift_y, scale_x, scale_y, given_x, given_y = _positions(
            coordinate_ptr, reference_ptr + level * stride_l, stride_r, point, known, height, width, R, P
        )
        column, x = _split(center_x, shift_x, width)
        row, y = _split(center_y, shift_y, height)
        if R == 0:
            weight = tl.load(weight_ptr + point, mask=known, other=0.0).to(tl.float32)
        else:
            weight = tl.load(weight_ptr + point, mask=known, other=float("-inf")).to(tl.float32)
            weight = tl.where(known, tl.exp(weight - largest) * scale, 0.0)
        across = width.to(tl.int32)
        cell = row.to(tl.int32) * across + column.to(tl.int32) + cells

        weight_grad = tl.zeros([BLOCK, POINTS], tl.float32)
        x_grad = tl.zeros([BLOCK, POINTS], tl.float32)
        y_grad = tl.zeros([BLOCK, POINTS], tl.float32)
        for corner in range(corners):
            right = corner % 2
            below = corner // 2
            across_weight = _hat(x - right)
            across_slope = _slope(x - right)
            down_weight = _hat(y - below)
            down_slope = _slope(y - below)
            if THIN:  # where there is no second cell, read the first one, with weight zero
                exists = tl.where((right < width) & (below < height), 1.0, 0.0)
                across_weight *= exists
                across_slope *= exists
                right = tl.where(width > 1, right, 0)
                below = tl.where(height > 1, below, 0)
            step = (below * across + right).to(tl.int64 if WIDE else tl.int32) * (M * D)
            share = weight * across_weight * down_weight
            dots = _scatter_corner(row_ptr + step, row_grad_ptr + step, cell, share, grad, d < D, P, M * D, WIDE)
            weight_grad += across_weight * down_weight * dots
            x_grad += across_slope * down_weight * dots
            y_grad += across_weight * down_slope * dots
        x_grad *= weight
        y_grad *= weight
        if R > 0:
            mean += weight * weight_grad
            pointer = reference_grad_ptr + block * (L * R) + level * R
            tl.atomic_add(pointer, tl.sum(x_grad, axis=1)[:, None] * width, mask=here, sem="relaxed")
            tl.atomic_add(pointer + 1, tl.sum(y_grad, axis=1)[:, None] * height, mask=here, sem="relaxed")
            if R == 4:
                size_grad = tl.sum(tl.where(x_grad != 0, x_grad * given_x, 0.0), axis=1)[:, None] * (width * (0.5 / P))
                tl.atomic_add(pointer + 2, size_grad, mask=here, sem="relaxed")
                size_grad = tl.sum(tl.where(y_grad != 0, y_grad * given_y, 0.0), axis=1)[:, None] * (height * (0.5 / P))
                tl.atomic_add(pointer + 3, size_grad, mask=here, sem="relaxed")
        tl.store(weight_grad_ptr + point, weight_grad, mask=known)
        # A point that is not finite has no gradient, even if it is its factor that is infinite.
        tl.store(coordinate_grad_ptr + 2 * point, tl.where(x_grad != 0, x_grad * scale_x, 0.0), mask=known)
        tl.store(coordinate_grad_ptr + (2 * point + 1), tl.where(y_grad != 0, y_grad * scale_y, 0.0), mask=known)
        cells += across * height.to(tl.int32)

    if R > 0:  # from gradients of weights to gradients of logits
        tl.debug_barrier()  # from here on, lanes can read what other lanes have stored
        k = tl.arange(0, ALL)[None, :]
        point = block * (M * L * P) + k
        known = here & (k < L * P)
        weight = tl.exp(tl.load(weight_ptr + point, mask=known, other=float("-inf")).to(tl.float32) - largest) * scale
        weight_grad = tl.load(weight_grad_ptr + point, mask=known, other=0.0)
        tl.store(weight_grad_ptr + point, weight * (weight_grad - tl.sum(mean, axis=1)[:, None]), mask=known)
