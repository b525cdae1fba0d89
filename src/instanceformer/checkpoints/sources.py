"""The names of other projects' weights, and ours for the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ENCODER_LAYER = {
    "self_attn": "self_attention",
    "norm1": "norm_attention",
    "linear1": "feedforward.0",
    "linear2": "feedforward.3",
    "norm2": "norm_feedforward",
}
_MASKS = {
    "controller.layers.0": "mask_head.controller.0",
    "controller.layers.1": "mask_head.controller.2",
    "controller.layers.2": "mask_head.controller.4",
    "mask_head.lay3": "mask_head.merge.0",
    "mask_head.lay4": "mask_head.merge.1",
    "mask_head.dcn": "mask_head.merge.2",
    "mask_head.lay1": "mask_head.reduce",
    "mask_head.lay2": "mask_head.output",
}
_CLIP_STREAM = "SeqFormer's stream of the whole clip; ours is the stream of one frame, which it calls box"


@dataclass(frozen=True, eq=False)  # there are three of them, told apart by identity
class Source:
    """A family of state dicts of another project, described by the names of its modules.

    Attributes:
        title: what messages call it.
        marker: a module that this source has and those after it in SOURCES lack, relative to ``prefix``.
        prefix: prefix of every name except the mask head's.
        decoder_layer: their name of each module in a decoder layer, and ours.
        others: their full name of each module that not every source has, and ours.
        dropped_of_layer: modules of an encoder or decoder layer that have no counterpart here, and why.
        options: options under which our network computes what the source does.
        left_new: parts of the names of our parameters that the source has nothing for.
    """

    title: str
    marker: str
    prefix: str
    decoder_layer: Mapping[str, str]
    others: Mapping[str, str] = field(default_factory=dict)
    dropped_of_layer: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    left_new: frozenset[str] = frozenset()

    def mapped(self, encoder_layers: int, decoder_layers: int) -> dict[str, str]:
        """Every module of the source that has a counterpart here: its full name and ours."""
        modules = {
            "backbone.0.body": "backbone.body",
            "input_proj": "projection.levels",
            "transformer.level_embed": "encoder.level_embedding",
            "transformer.reference_points": "location.reference",
            "query_embed": "query",  # position and content in one
            "class_embed": "decoder.class_heads",
        }
        for i in range(decoder_layers):
            for j in range(3):
                modules[f"bbox_embed.{i}.layers.{j}"] = f"decoder.box_heads.{i}.{2 * j}"
        for part, layers, names in (
            ("encoder", encoder_layers, _ENCODER_LAYER),
            ("decoder", decoder_layers, self.decoder_layer),
        ):
            for i in range(layers):
                for theirs, ours in names.items():
                    modules[f"transformer.{part}.layers.{i}.{theirs}"] = f"{part}.layers.{i}.{ours}"
        return {f"{self.prefix}{theirs}": ours for theirs, ours in modules.items()} | dict(self.others)

    def dropped(self, encoder_layers: int, decoder_layers: int) -> dict[str, str]:
        """Every module of the source that has no counterpart here: its full name and why."""
        modules = {
            "transformer.decoder.bbox_embed": "a second name of bbox_embed",
            "temporal_class_embed": "no effect in the release, whose class weights sum to one over time",
        }
        for part, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
            for i in range(layers):
                for theirs, reason in self.dropped_of_layer.items():
                    if theirs.startswith(part):
                        modules[f"transformer.{part}.layers.{i}.{theirs.removeprefix(f'{part}.')}"] = reason
        return {f"{self.prefix}{theirs}": reason for theirs, reason in modules.items()}


SEQFORMER = Source(
    title="SeqFormer",
    marker="transformer.decoder.layers.0.time_attention_weights",
    prefix="detr.",
    decoder_layer={
        "self_attn_box": "self_attention",
        "norm2_box": "norm_self",
        "cross_attn.sampling_offsets": "cross_attention.sampling_offsets",
        "cross_attn.attention_weights": "cross_attention.attention_weights",
        "cross_attn.value_proj": "cross_attention.value_proj",
        "cross_attn.output_proj_box": "cross_attention.output_proj",
        "norm1_box": "norm_cross",
        "linear1_box": "feedforward.0",
        "linear2_box": "feedforward.3",
        "norm3_box": "norm_feedforward",
    },
    others=_MASKS,
    dropped_of_layer={
        "encoder.self_attn.output_proj_box": "not used by SeqFormer's encoder",
        **{
            f"decoder.{module}": _CLIP_STREAM
            for module in ("self_attn", "norm2", "cross_attn.output_proj", "norm1", "linear1", "linear2", "norm3")
        },
        "decoder.time_attention_weights": "weighs the frames of a clip, where ours sees one frame at a time",
    },
    options={"location_from": "position", "mask_upsampling": "aligned"},
    left_new=frozenset({"memory", "memory_attention", "class_prior"}),
)

RELEASE = Source(
    title="InstanceFormer, the authors' release",
    marker="transformer.decoder.layers.0.norm1_box",
    prefix="detr.",
    decoder_layer={
        "self_attn": "self_attention",
        "norm2": "norm_self",
        "cross_attn": "cross_attention",
        "norm1_box": "norm_cross",
        "cross_attn_mem": "memory_attention.attention",
        "norm2_mem": "memory_attention.norm",
        "linear1_box": "feedforward.0",
        "linear2_box": "feedforward.3",
        "norm3_box": "norm_feedforward",
    },
    others={**_MASKS, "detr.transformer.mem_token_proj": "memory.projection"},
    options={
        "location_from": "position",
        "cross_position": False,
        "class_prior": False,
        "temporal_index": "place",
        "mask_upsampling": "aligned",
    },
)

DEFORMABLE_DETR = Source(
    title="Deformable-DETR",
    marker="transformer.decoder.layers.0.norm1",
    prefix="",
    decoder_layer={
        "self_attn": "self_attention",
        "norm2": "norm_self",
        "cross_attn": "cross_attention",
        "norm1": "norm_cross",
        "linear1": "feedforward.0",
        "linear2": "feedforward.3",
        "norm3": "norm_feedforward",
    },
    options={"location_from": "position"},
    left_new=frozenset({"memory", "memory_attention", "class_prior", "mask_head"}),
)

SOURCES = (SEQFORMER, RELEASE, DEFORMABLE_DETR)
