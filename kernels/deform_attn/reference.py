"""The plain definition of both operators, which every faster path is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute ``ms_deform_attn`` with one ``grid_sample`` a level, on any device, differentiable by autograd.

    Arguments and result are those of ``ms_deform_attn``, unchecked.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    # Nothing beyond one whole map outside can be seen, so that what is not finite may as well lie there.
    locations = sampling_locations.to(dtype).nan_to_num(nan=-1.0).clamp(-1, 2)
    weights = attention_weights.to(dtype)

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


def fused_ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute ``fused_ms_deform_attn`` with ``ms_deform_attn_reference``.

    Arguments and result are those of ``fused_ms_deform_attn``, unchecked.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    reference, offsets = reference.to(dtype), offsets.to(dtype)
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 4:
        scale = reference[:, :, None, :, None, 2:] * (0.5 / offsets.shape[4])
    else:
        sizes = torch.tensor([(width, height) for height, width in spatial_shapes], dtype=dtype, device=offsets.device)
        scale = 1 / sizes[:, None, :]
    # What is not finite may as well lie outside; left out of the product, it leaves no NaN in gradients either.
    finite = (centre + offsets * scale).isfinite()
    centre, offsets, scale = (
        torch.where(finite, x, x.new_full((), y)) for x, y in ((centre, -1), (offsets, 0), (scale, 0))
    )
    weights = logits.flatten(3).softmax(-1, dtype=dtype).view(logits.shape)
    return ms_deform_attn_reference(value, spatial_shapes, centre + offsets * scale, weights)
