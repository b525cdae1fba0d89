"""The feature pyramid of clips of different sizes: grids, padding, and the position of every cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from instanceformer.constants import constant
from instanceformer.model.attention import Levels, Shapes, pixel_position

STRIDES = (8, 16, 32, 64, 128)
"""Stride in pixels of every feature level, finest first; the backbone provides three, the projection adds the rest."""

Sizes = tuple[tuple[int, int], ...]
"""(height, width) in pixels of each clip of a batch, without its padding."""


@dataclass(frozen=True)
class Pyramid:
    """The levels of a batch of X clips or frames, and which cells are padding; L levels, S cells in all.

    Attributes:
        clips: (height, width) in pixels of each clip without padding.
        sizes: (X, 2) float32, (width, height) in pixels of the clips or frames without padding.
        grid: (height, width) of the mask logits: a quarter of the padded frames' size, rounded up.
        levels: grids of the L levels, and which of their cells are padding.
        valid: (X, H_l, W_l) bool at stride 4 and for each level, false where padded.
        valid_ratios: (X, L, 2) float32, fraction (x, y) of each level that is not padding.
        position: (X, S, C) float32 sine position of every cell in its level.
        centers: (X, S, L, 2) float32, see ``cell_centers``.
    """

    clips: Sizes
    sizes: Tensor
    grid: tuple[int, int]
    levels: Levels
    valid: tuple[Tensor, ...]
    valid_ratios: Tensor
    position: Tensor
    centers: Tensor

    @property
    def is_padded(self) -> bool:
        """Whether any clip is smaller than the batch."""
        return self.levels.padded is not None

    def repeated(self, count: int) -> Pyramid:
        """The pyramid of X = B T frames, from that of B clips of T = ``count`` frames each."""
        if count == 1:
            return self

        def repeat(x: Tensor) -> Tensor:
            return x.repeat_interleave(count, dim=0)

        return Pyramid(
            clips=self.clips,
            sizes=repeat(self.sizes),
            grid=self.grid,
            levels=replace(self.levels, padded=None if self.levels.padded is None else repeat(self.levels.padded)),
            valid=tuple(repeat(x) for x in self.valid),
            valid_ratios=repeat(self.valid_ratios),
            position=repeat(self.position),
            centers=repeat(self.centers),
        )

    def blanked(self, x: Tensor, scale: int) -> Tensor:
        """Zero the padding of (X, C, H, W) features at stride 4 (``scale`` 0) or of a level (``scale`` from 1)."""
        return x * self.valid[scale][:, None].to(x.dtype) if self.is_padded else x

    def unflatten(self, tokens: Tensor) -> list[Tensor]:
        """(X, S, C) tokens as the (X, C, H_l, W_l) features of each level."""
        parts = tokens.split([height * width for height, width in self.levels.shapes], dim=1)
        return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(parts, self.levels.shapes, strict=True)]


def extract_unpadded(frames: Tensor, pyramid: Pyramid, extract: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """Extract features from clips of different sizes without their padding, clips of one size together.

    Args:
        frames: (B, T, 3, H, W).
        pyramid: of the B clips.
        extract: maps (X, 3, h, w) images to features at stride 4 and of each level, (X, C, h, w).

    Returns:
        (B T, C, H_l, W_l) features at stride 4 and of each level, zero where padded.
    """
    batch, count = frames.shape[:2]
    result: list[Tensor] = []
    for h, w in dict.fromkeys(pyramid.clips):
        clips = [clip for clip, size in enumerate(pyramid.clips) if size == (h, w)]
        features = extract(frames[clips, :, :, :h, :w].flatten(0, 1))
        if not result:
            grids = (pyramid.grid, *pyramid.levels.shapes)
            result = [
                frames.new_zeros(batch, count, x.shape[1], *grid) for x, grid in zip(features, grids, strict=True)
            ]
        for level, x in zip(result, features, strict=True):
            level[clips, :, :, : x.shape[-2], : x.shape[-1]] = x.unflatten(0, (len(clips), count)).to(level.dtype)
    return [level.flatten(0, 1) for level in result]


@constant
def build_pyramid(
    sizes: Sizes, padded_size: tuple[int, int], num_levels: int, dim: int, device: torch.device
) -> Pyramid:
    """The pyramid of a batch.

    Args:
        sizes: (height, width) in pixels of each clip without padding.
        padded_size: (height, width) in pixels of the batch.
        num_levels: L.
        dim: channels C of the position.
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
        clips=sizes,
        grid=cast("tuple[int, int]", grid),
        levels=Levels(cast("Shapes", tuple(shapes)), padded),
        valid=tuple(valid),
        valid_ratios=valid_ratios,
        sizes=torch.tensor([(float(w), float(h)) for h, w in sizes]).to(device, non_blocking=device.type == "cuda"),
        position=torch.cat([pixel_position(v, dim).flatten(1, 2) for v in valid[1:]], dim=1),
        centers=cell_centers(cast("Shapes", tuple(shapes)), valid_ratios),
    )


def cell_centers(shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Center of every cell of every level, in the coordinates of every level.

    Args:
        shapes: (height, width) of the L levels.
        valid_ratios: (B, L, 2) float32.

    Returns:
        (B, S, L, 2) float32, (x, y) as fractions of each padded level; can exceed 1 outside the valid part.
    """
    centers = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, dtype=torch.float32, device=valid_ratios.device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=valid_ratios.device) + 0.5) / width
        grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).flatten(0, 1)
        centers.append(grid / valid_ratios[:, level, None])
    return torch.cat(centers, dim=1)[:, :, None] * valid_ratios[:, None]


def valid_sizes(padding: Tensor) -> Sizes:
    """Size of each clip without its (B, H, W) padding, (height, width) in pixels.

    Raises:
        ValueError: padding is elsewhere than on the right and at the bottom, or leaves nothing.
    """
    valid = ~padding
    heights, widths = valid.any(dim=2).sum(dim=1), valid.any(dim=1).sum(dim=1)
    area = valid.sum(dim=(1, 2))
    clips = torch.stack((heights, widths, area, valid[:, 0, 0]), dim=1).tolist()
    for clip, (height, width, pixels, corner) in enumerate(clips):
        if pixels == 0 or pixels != height * width or not corner:
            raise ValueError(
                f"padding of clip {clip}: found {pixels} valid pixels in {height} rows and {width} columns, expected a "
                "rectangle at the top left; pad on the right and at the bottom only"
            )
    return tuple((height, width) for height, width, _, _ in clips)
