"""Variants that compute what the authors' release computes, where it departs from the paper.

Each class here is one of the paper's with a method or two replaced; ``parts`` and ``location_propagation`` choose
between them. Weights have the same names and shapes, so a network can be switched from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from instanceformer.model.attention import pixel_position
from instanceformer.model.decoder import DecoderLayer
from instanceformer.model.heads import MaskHead
from instanceformer.model.memory import Memory
from instanceformer.model.options import Location, LocationSource, NetworkOptions
from instanceformer.model.propagation import LocationPropagation


class ReleaseLocation(LocationPropagation):
    """Equation 1 with another input, or another operation.

    The paper's input is "the current object query". With source ``position``, as in the release and Deformable-DETR,
    W_ref sees the query's position embedding, which never changes. The rule ``additive`` is
    sigmoid(sigmoid(W_ref q) + ref_{t-1}).
    """

    def __init__(self, dim: int, rule: Location, source: LocationSource) -> None:
        super().__init__(dim, "paper" if rule == "additive" else rule)
        self.is_additive, self.source = rule == "additive", source

    def start(self, queries: Tensor, position: Tensor) -> Tensor:
        return super().start(position.expand_as(queries) if self.source == "position" else queries, position)

    def move(self, queries: Tensor, start: Tensor, previous: Tensor) -> Tensor:
        return (start + previous).sigmoid() if self.is_additive else super().move(queries, start, previous)


class ReleaseDecoderLayer(DecoderLayer):
    """Deformable attention predicts where to look from a query's content alone, without its position embedding."""

    def located(self, queries: Tensor, position: Tensor) -> Tensor:
        return queries


class ReleaseMemory(Memory):
    """The temporal index encodes a frame's place in the queue; the paper's encodes its age, t - f.

    Place 0 is the oldest frame that left a token. Places are encoded like the pixels of a column of height d. Until the
    queue is full, the same age has a different code in every frame.
    """

    def frame_codes(self, filled: Tensor, dim: int) -> Tensor:
        ages = torch.arange(1, filled.shape[1] + 1, device=filled.device)
        column = torch.ones(1, len(ages), 1, dtype=torch.bool, device=filled.device)
        oldest = (filled.any(dim=-1) * ages).amax(dim=1, keepdim=True)
        return pixel_position(column, dim)[0, :, 0][(oldest - ages).clamp(min=0)]


class ReleaseMaskHead(MaskHead):
    """Upsampling as in CondInst, which puts logits a quarter of a cell, two pixels, further right and down."""

    def upsample(self, masks: Tensor) -> Tensor:
        """Cell i lands on 2 i + 1, and 2 i is the mean of cells i - 1 and i."""
        height, width = masks.shape[-2:]
        masks = F.pad(masks, (1, 0, 1, 0), mode="replicate")
        size = (2 * height + 1, 2 * width + 1)
        return F.interpolate(masks, size, mode="bilinear", align_corners=True)[..., 1:, 1:]


@dataclass(frozen=True)
class Parts:
    """The classes that a network is built from."""

    decoder_layer: type[DecoderLayer]
    memory: type[Memory]
    mask_head: type[MaskHead]


def parts(options: NetworkOptions) -> Parts:
    """The paper's classes, or the release's where an option requires them."""
    return Parts(
        decoder_layer=DecoderLayer if options.cross_position else ReleaseDecoderLayer,
        memory=Memory if options.temporal_index == "age" else ReleaseMemory,
        mask_head=MaskHead if options.mask_upsampling == "centred" else ReleaseMaskHead,
    )


def location_propagation(options: NetworkOptions) -> LocationPropagation:
    """Equation 1, the paper's or the release's."""
    if options.location == "additive" or options.location_from == "position":
        return ReleaseLocation(options.dim, options.location, options.location_from)
    return LocationPropagation(options.dim, options.location)
