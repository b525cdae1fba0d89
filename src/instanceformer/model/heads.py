"""The heads that turn a query into a class, a box and a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instanceformer.model.attention import xavier_
from instanceformer.model.encoder import FrameFeatures
from instanceformer.model.pyramid import Pyramid

HIDDEN = 8
"""Channels of the mask features and of the dynamic layers applied to them."""

COORDINATE_SCALE = 64.0
"""Pixels per unit of the relative coordinates that enter the dynamic layers."""

PARAMETERS = (2 + HIDDEN) * HIDDEN + HIDDEN * HIDDEN + HIDDEN + HIDDEN + HIDDEN + 1
"""Size of one query's dynamic layers, 169: weights (10 x 8, 8 x 8, 8 x 1), then biases (8, 8, 1)."""


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: (..., dim) to (..., output)."""

    def __init__(self, dim: int, output: int, layers: int = 3) -> None:
        hidden = [module for _ in range(layers - 1) for module in (nn.Linear(dim, dim), nn.ReLU())]
        super().__init__(*hidden, nn.Linear(dim, output))


def class_head(dim: int, num_classes: int, prior: float = 0.01) -> nn.Linear:
    """(..., C) to (..., K) logits that start at probability ``prior``, as focal loss requires (Lin et al.)."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def box_head(dim: int, first: bool) -> MLP:
    """(..., C) to (..., 4) changes of a box in logit space, initially zero; with ``first``, boxes start out small."""
    head = MLP(dim, 4)
    last = cast("nn.Linear", head[-1])
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if first:
        nn.init.constant_(last.bias[2:], -2.0)
    return head


class MaskHead(nn.Module):
    """Masks by dynamic convolution: each query supplies the weights of three 1x1 layers (Tian et al., CondInst).

    The pixel side merges the encoder's output from stride 32 up to ``stride``. The instance side, the controller, turns
    a query into 169 numbers: the parameters of layers 10 -> 8 -> 8 -> 1, whose inputs are the coordinates of a pixel
    relative to the query's location and the 8 mask features.

    Args:
        dim: channels C of queries and tokens.
        stride: 8, the paper's, whose logits are upsampled twofold; or 4, which adds the backbone's C2 and resolves
            smaller objects.
        lateral: channels of C2, used at stride 4 only.
    """

    def __init__(self, dim: int, stride: int, lateral: int) -> None:
        super().__init__()
        self.stride = stride
        self.merge = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(3))
        self.lateral = nn.Conv2d(lateral, dim, 1) if stride == 4 else None
        self.reduce = nn.Conv2d(dim, dim // 4, 3, padding=1)
        self.output = nn.Conv2d(dim // 4, HIDDEN, 3, padding=1)
        self.controller = MLP(dim, PARAMETERS)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(cast("Tensor", module.bias))
            elif isinstance(module, nn.Linear):
                xavier_(module)
        self.to(memory_format=torch.channels_last)  # like the backbone

    def encode(self, levels: Sequence[Tensor], finest: Tensor, pyramid: Pyramid) -> Tensor:
        """The pixel side.

        Args:
            levels: (X, C, H_l, W_l) encoder output at strides 8, 16, 32 and possibly coarser ones.
            finest: (X, channels, H/4, W/4) the backbone's C2.
            pyramid: of the X frames.

        Returns:
            (X, 8, H/stride, W/stride)
        """
        x = levels[2]
        for conv, scale in zip(self.merge, (3, 2, 1), strict=True):
            if scale < 3:
                x = levels[scale - 1] + upsample_nearest(x, levels[scale - 1].shape[-2:])
            x = F.relu(conv(pyramid.blanked(x, scale)))
        scale = 1
        if self.lateral is not None:
            scale = 0
            x = self.lateral(finest) + upsample_nearest(x, finest.shape[-2:])
        x = F.relu(self.reduce(pyramid.blanked(x, scale)))
        return F.relu(self.output(pyramid.blanked(x, scale)))

    def coarse(self, features: FrameFeatures, queries: Tensor, centers: Tensor) -> Tensor:
        """Like ``forward``, but (B, n, h, w) logits at the stride of the mask features."""
        parameters = self.controller(queries)
        with torch.autocast(queries.device.type, enabled=False):
            pixels = centers.float() * features.pyramid.sizes[:, None]
            return dynamic_layers(features.mask_features.float(), parameters.float(), pixels, self.stride)

    def forward(self, features: FrameFeatures, queries: Tensor, centers: Tensor) -> Tensor:
        """The instance side, in float32, at stride 4.

        Args:
            features: of one frame.
            queries: (B, n, C).
            centers: (B, n, 2) origin of the relative coordinates, (x, y) as fractions of the clip's own size.

        Returns:
            (B, n, *pyramid.grid) logits.
        """
        masks = self.coarse(features, queries, centers)
        if self.stride == 4:
            return masks
        with torch.autocast(queries.device.type, enabled=False):
            if features.pyramid.is_padded:
                masks = repeat_border(masks, features.pyramid.sizes, self.stride)
            height, width = features.pyramid.grid
            return self.upsample(masks)[..., :height, :width]

    def upsample(self, masks: Tensor) -> Tensor:
        """Double the height and width of (B, n, h, w), bilinearly between cell centers."""
        return F.interpolate(masks, scale_factor=2.0, mode="bilinear", align_corners=False)


def dynamic_layers(features: Tensor, parameters: Tensor, centers: Tensor, stride: int) -> Tensor:
    """Apply each query's three layers to every pixel.

    The first layer is linear in the relative coordinates (center - pixel), so the center's part is folded into its bias
    and the pixels' part is two planes that all queries share: one matrix product, no copy of the features.

    Args:
        features: (B, 8, h, w).
        parameters: (B, n, 169), each weight as a matrix of (input, output).
        centers: (B, n, 2) in pixels.
        stride: pixels between neighboring features.

    Returns:
        (B, n, h, w) logits.
    """
    batch, _, height, width = features.shape
    n = parameters.shape[1]
    y = (torch.arange(height, device=features.device) + 0.5) * (-stride / COORDINATE_SCALE)
    x = (torch.arange(width, device=features.device) + 0.5) * (-stride / COORDINATE_SCALE)
    pixels = torch.stack((x.expand(height, width), y[:, None].expand(height, width)))
    planes = torch.cat((pixels.expand(batch, -1, -1, -1), features), dim=1).flatten(2)

    w1, w2, w3, b1, b2, b3 = parameters.split(
        ((2 + HIDDEN) * HIDDEN, HIDDEN * HIDDEN, HIDDEN, HIDDEN, HIDDEN, 1), dim=-1
    )
    w1 = w1.unflatten(-1, (2 + HIDDEN, HIDDEN))
    b1 = b1 + ((centers / COORDINATE_SCALE)[..., None] * w1[..., :2, :]).sum(dim=-2)
    hidden = torch.baddbmm(b1.flatten(1)[..., None], w1.transpose(-1, -2).flatten(1, 2), planes)
    hidden = F.relu(hidden, inplace=True).reshape(batch * n, HIDDEN, height * width)
    w2 = w2.reshape(batch * n, HIDDEN, HIDDEN).transpose(-1, -2)
    hidden = F.relu(torch.baddbmm(b2.reshape(batch * n, HIDDEN, 1), w2, hidden), inplace=True)
    masks = torch.baddbmm(b3.reshape(batch * n, 1, 1), w3.reshape(batch * n, 1, HIDDEN), hidden)
    return masks.view(batch, n, height, width)


def upsample_nearest(x: Tensor, size: torch.Size) -> Tensor:
    """Double a feature map and crop it to ``size``: cell i becomes cells 2i and 2i + 1, whatever the padding."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")[..., : size[0], : size[1]]


def repeat_border(masks: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """Repeat the last valid row and column of (B, n, h, w) in the padding, as interpolation does beyond a border."""
    for dim, size in ((-1, sizes[:, 0]), (-2, sizes[:, 1])):
        last = (size / stride).ceil().long() - 1
        index = torch.minimum(torch.arange(masks.shape[dim], device=masks.device), last[:, None])[:, None]
        index = index[:, :, None, :] if dim == -1 else index[..., None]
        masks = masks.gather(dim, index.expand_as(masks))
    return masks
