"""The plain definition of the operator, which every faster path is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    coordinates: Tensor,
    weights: Tensor,
    reference: Tensor | None,
) -> Tensor:
    """Compute ``ms_deform_attn``, or ``fused_ms_deform_attn`` if there is a reference, by ``grid_sample``.

    Runs on any device and is differentiable by autograd. Arguments and result are those of ``cpu.forward``.
    """
    batch, _, heads, channels = value.shape
    queries = coordinates.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    locations = coordinates.to(dtype)
    if reference is None:
        weights = weights.to(dtype)
    else:
        locations = sampling_points(spatial_shapes, reference.to(dtype), locations)
        weights = weights.flatten(3).softmax(-1, dtype=dtype).view(weights.shape)
    # A point a whole map's size outside reads only zeros, so points that are not finite can be put there.
    locations = locations.nan_to_num(nan=-1.0).clamp(-1, 2)

    levels = torch.split(value.to(dtype), [height * width for height, width in spatial_shapes], dim=1)
    output = value.new_zeros(batch * heads, channels, queries, dtype=dtype)
    for level, (height, width) in enumerate(spatial_shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B * M, Q, P, 2)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        output = output + (
            sampled * weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        ).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


def sampling_points(spatial_shapes: Sequence[tuple[int, int]], reference: Tensor, offsets: Tensor) -> Tensor:
    """(B, Q, M, L, P, 2) locations (x, y), as fractions of each level; arguments as in ``fused_ms_deform_attn``."""
    center = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 4:
        scale = reference[:, :, None, :, None, 2:] * (0.5 / offsets.shape[4])
    else:
        sizes = [(width, height) for height, width in spatial_shapes]
        scale = 1 / torch.tensor(sizes, dtype=offsets.dtype, device=offsets.device)[:, None, :]
    # Points that are not finite are put outside; replacing the factors, not the sum, keeps NaN out of gradients too.
    finite = (center + offsets * scale).isfinite()
    center, offsets, scale = (
        torch.where(finite, x, x.new_full((), y)) for x, y in ((center, -1), (offsets, 0), (scale, 0))
    )
    return center + offsets * scale
