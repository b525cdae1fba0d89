"""The options of the network."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from instanceformer.model.backbone import Norm
from instanceformer.model.identity import IdentityRule
from instanceformer.model.pyramid import STRIDES

Location = Literal["none", "paper", "additive", "refined"]
LocationSource = Literal["content", "position"]
TemporalIndex = Literal["age", "place"]
Upsampling = Literal["centred", "aligned"]
ClassHistory = Literal["all", "held"]
FreeQueries = Literal["propagate", "renew"]
MaskStride = Literal[4, 8]

LARGEST = {
    "num_classes": 100_000,
    "num_queries": 100_000,
    "dim": 8192,
    "num_heads": 1024,
    "num_levels": len(STRIDES),
    "num_points": 1024,
    "encoder_layers": 100,
    "decoder_layers": 100,
    "feedforward_dim": 100_000,
    "memory_frames": 1000,
    "memory_tokens": 100_000,
}
"""Upper bound of every option that is a count, so that a damaged file cannot ask for unlimited memory."""

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class NetworkOptions:
    """Everything that determines the architecture and how state is propagated; the defaults are the paper's network.

    Attributes:
        num_classes: classes K; each has its own sigmoid, there is no background class.
        backbone: a torchvision ResNet or Swin by name; ``timm/NAME``, a model of timm with features at strides 4 to 32,
            or a ViT with patches of 16 pixels; or ``small``, a narrow ResNet.
        backbone_norm: for a backbone with batch norm: ``frozen`` for pretrained weights, ``batch`` for random ones.
        num_queries: queries N, the maximum number of instances in a video.
        dim: channels C.
        num_heads: attention heads.
        num_levels: feature levels, 3 to 5, the finest at stride 8.
        num_points: sampling points per head and level.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        feedforward_dim: hidden channels of the feed-forward networks.
        dropout: dropout probability in [0, 1].
        cross_position: whether the decoder's deformable attention sees a query's position embedding as well as its
            content, as in Deformable-DETR; false, as in the authors' release.
        mask_stride: stride of the mask features: 8 as in the paper, or 4 with the backbone's finest level.
        mask_upsampling: from stride 8 to 4: ``centred``, or ``aligned`` as in the authors' release.
        propagate_queries: whether a query starts the next frame from its final content (representation propagation);
            false: every frame starts from the learned content.
        location: how reference points are propagated (equation 1), see LocationPropagation.
        location_from: what a query's reference point is predicted from: its ``content`` (the paper), or its
            ``position`` embedding, as in Deformable-DETR and the authors' release.
        class_prior: whether class logits are smoothed over the last ``memory_frames`` frames (equation 2).
        class_history: which earlier frames of a query the class prior sees: ``all`` (the paper), including those before
            the query held an instance, whose low logits outvote the current ones when an instance enters; or ``held``,
            only those since it began to hold one. With ``free_queries: renew`` both are the same.
        memory: whether the decoder attends to tokens of earlier frames (equations 3 and 4).
        memory_frames: d, number of earlier frames that the memory and the class prior see.
        memory_tokens: k, maximum number of instances remembered per frame.
        temporal_index: what tells frames in memory apart: their ``age`` (the paper), or their ``place`` in the queue,
            as in the authors' release.
        min_confidence: score in [0, 1) from which a query begins to hold an instance at inference. 0 (the paper): all
            queries hold one, and the k most confident enter the memory whatever their score.
        max_overlap: box IoU in (0, 1]. At inference, a query that holds nothing is a duplicate, and does not begin to
            hold an instance, if it overlaps by more with a query that reaches ``min_confidence`` in the same frame and
            either is more confident or holds an instance. 1 (the paper): there are no duplicates.
        free_queries: where a query that holds nothing starts the next frame: ``propagate`` (the paper), from its final
            content like any other; ``renew``, from its learned content and reference, ready for whatever enters.
        identity: beyond the paper, see ``model.identity``. ``hide``: a query that is no longer on its instance is
            hidden and starts afresh, and the frame does not change what is known about the instance; ``recover``: in
            addition, a free query that shows a hidden instance takes its place. ``none``: the paper.

    Raises:
        ValueError: an option is out of range or contradicts another.
    """

    num_classes: int = 40
    backbone: str = "resnet50"
    backbone_norm: Norm = "frozen"
    num_queries: int = 300
    dim: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 1024
    dropout: float = 0.1
    cross_position: bool = True
    mask_stride: MaskStride = 8
    mask_upsampling: Upsampling = "centred"
    propagate_queries: bool = True
    location: Location = "paper"
    location_from: LocationSource = "content"
    class_prior: bool = True
    class_history: ClassHistory = "all"
    memory: bool = True
    memory_frames: int = 4
    memory_tokens: int = 10
    temporal_index: TemporalIndex = "age"
    min_confidence: float = 0.0
    max_overlap: float = 1.0
    free_queries: FreeQueries = "propagate"
    identity: IdentityRule = "none"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(NetworkOptions).items():
            value = getattr(self, name)
            if hint in KINDS:
                check_type(name, value, hint)
            elif value not in CHOICES[name] or type(value) is not type(CHOICES[name][0]):
                raise ValueError(
                    f"{name}: found {reprlib.repr(value)}, expected {' or '.join(map(str, CHOICES[name]))}"
                )
        for name, most in LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1 and at most {most}")
        if self.memory_tokens > self.num_queries:
            raise ValueError(
                f"memory_tokens: found {self.memory_tokens}, expected at most num_queries={self.num_queries}"
            )
        if self.num_levels < 3:
            raise ValueError(f"num_levels: found {self.num_levels}, expected 3 to {len(STRIDES)}")
        if self.dim % 8 or self.dim % self.num_heads:
            raise ValueError(f"dim: found {self.dim}, expected a multiple of 8 and of num_heads={self.num_heads}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: found {self.dropout}, expected a probability in [0, 1]")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence: found {self.min_confidence}, expected a score in [0, 1)")
        if not 0 < self.max_overlap <= 1:
            raise ValueError(f"max_overlap: found {self.max_overlap}, expected an IoU in (0, 1]")
        for name in ("free_queries", "class_history", "identity"):
            if self.min_confidence == 0 and getattr(self, name) != getattr(NetworkOptions, name):
                raise ValueError(
                    f"{name}: found {getattr(self, name)} with min_confidence=0, by which every query holds an "
                    "instance at inference from its first frame on, expected a min_confidence above 0, for instance 0.3"
                )


CHOICES = {name: get_args(hint) for name, hint in get_type_hints(NetworkOptions).items() if hint not in KINDS}
"""The values of every option that is a choice."""


def check_type(name: str, value: object, kind: type) -> None:
    """Check the type of an option's value: an int passes as a float, a bool only as a bool.

    Args:
        name: of the option, for the message.
        value: to check.
        kind: one of KINDS.

    Raises:
        ValueError: the value is of another type.
    """
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(
            f"{name}: found {reprlib.repr(value)} of type {type(value).__name__}, expected {KINDS[kind]} "
            f"({kind.__name__})"
        )
