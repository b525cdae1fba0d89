"""The feature pyramid of clips of different sizes: grids, what is padding, and where every cell lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from instanceformer.constants import constant
from instanceformer.model.attention import Levels, Shapes
from instanceformer.model.position import pixel_position

STRIDES = (8, 16, 32, 64, 128)
"""Stride in pixels of every feature level, finest first; three come from the backbone, the rest are added to it."""

Sizes = tuple[tuple[int, int], ...]
"""(height, width) in pixels of each clip of a batch, without its padding."""


@dataclass(frozen=True)
class Pyramid:
    """What the levels of a batch look like; B clips, L levels, S cells in all.

    Attributes:
        grid: (height, width) of the mask logits: a quarter of the padded frames' size, rounded up.
        levels: grids of the L levels, and which of their cells are padding.
        valid: (B, H_l, W_l) bool at stride 4 and of each level, false where padded.
        valid_ratios: (B, L, 2) float32, fraction (x, y) of each level that is not padding.
        sizes: (B, 2) float32, (width, height) in pixels of the clips without padding.
        position: (B, S, C) float32 sine position of every cell in its level.
        centres: (B, S, L, 2) float32, see ``cell_centres``.
    """

    grid: tuple[int, int]
    levels: Levels
    valid: tuple[Tensor, ...]
    valid_ratios: Tensor
    sizes: Tensor
    position: Tensor
    centres: Tensor


@constant
def build_pyramid(
    sizes: Sizes, padded_size: tuple[int, int], num_levels: int, dim: int, device: torch.device
) -> Pyramid:
    """The pyramid of a batch.

    Args:
        sizes: of the clips.
        padded_size: (height, width) in pixels of the batch.
        num_levels: L.
        dim: channels C.
        device: of the tensors.
    """
    strides = (4, *STRIDES[:num_levels])
    grid, *shapes = [tuple(math.ceil(side / stride) for side in padded_size) for stride in strides]
    valid, ratios = [], []
    for stride, (height, width) in zip(strides, (grid, *shapes), strict=True):
        extents = torch.tensor([(math.ceil(h / stride), math.ceil(w / stride)) for h, w in sizes])
        rows, columns = torch.arange(height) < extents[:, :1], torch.arange(width) < extents[:, 1:]
        valid.append((rows[:, :, None] & columns[:, None, :]).to(device, non_blocking=device.type == "cuda"))
        ratios.append((extents.flip(-1) / torch.tensor((width, height))).to(device, non_blocking=device.type == "cuda"))
    valid_ratios = torch.stack(ratios[1:], dim=1)
    padded = None
    if any(size != padded_size for size in sizes):
        padded = ~torch.cat([v.flatten(1) for v in valid[1:]], dim=1)
    return Pyramid(
        grid=cast("tuple[int, int]", grid),
        levels=Levels(cast("Shapes", tuple(shapes)), padded),
        valid=tuple(valid),
        valid_ratios=valid_ratios,
        sizes=torch.tensor([(float(w), float(h)) for h, w in sizes]).to(device, non_blocking=device.type == "cuda"),
        position=torch.cat([pixel_position(v, dim).flatten(1, 2) for v in valid[1:]], dim=1),
        centres=cell_centres(cast("Shapes", tuple(shapes)), valid_ratios),
    )


def cell_centres(shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Centre of every cell of every level, seen from every level.

    Args:
        shapes: (height, width) of the L levels.
        valid_ratios: (B, L, 2) float32.

    Returns:
        (B, S, L, 2) float32, (x, y) as fractions of each padded level; beyond 1 outside the valid part.
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, dtype=torch.float32, device=valid_ratios.device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=valid_ratios.device) + 0.5) / width
        grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(0, 1)
        centres.append(grid / valid_ratios[:, level, None])
    return torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]


def valid_sizes(padding: Tensor) -> Sizes:
    """(height, width) in pixels of what is not padding, for each clip of (B, H, W).

    Raises:
        ValueError: padding is not a margin on the right and at the bottom.
    """
    valid = ~padding
    heights, widths = valid.any(dim=2).sum(dim=1), valid.any(dim=1).sum(dim=1)
    area = valid.sum(dim=(1, 2))
    found = torch.stack((heights, widths, area, valid[:, 0, 0]), dim=1).tolist()
    for clip, (height, width, pixels, corner) in enumerate(found):
        if pixels == 0 or pixels != height * width or not corner:
            raise ValueError(
                f"padding of clip {clip}: found {pixels} valid pixels in {height} rows and {width} columns, expected a "
                "rectangle at the top left; pad on the right and at the bottom only"
            )
    return tuple((height, width) for height, width, _, _ in found)
