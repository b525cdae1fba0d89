"""Which options a network can have."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from instanceformer.model.backbone import Norm
from instanceformer.model.heads import Upsampling
from instanceformer.model.identity import IdentityRule
from instanceformer.model.memory import TemporalIndex
from instanceformer.model.propagation import LocationRule, LocationSource
from instanceformer.model.pyramid import STRIDES

ClassHistory = Literal["all", "held"]
FreeQueries = Literal["propagate", "renew"]
MaskStride = Literal[4, 8]

COUNTS = {
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
"""The options that count something, from 1, and the most that one can be: a file may ask for anything."""

SWITCHES = ("cross_position", "propagate_queries", "class_prior", "memory")
FRACTIONS = ("dropout", "min_confidence", "max_overlap")

CHOICES = {
    "backbone_norm": Norm,
    "mask_stride": MaskStride,
    "mask_upsampling": Upsampling,
    "location": LocationRule,
    "location_from": LocationSource,
    "class_history": ClassHistory,
    "temporal_index": TemporalIndex,
    "free_queries": FreeQueries,
    "identity": IdentityRule,
}
"""The options that have a few values, and these."""

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def check_type(name: str, value: object, kind: type) -> None:
    """Refuse a value of another type; a whole number is a number, but true and false are not.

    Args:
        name: of the option, for the message.
        value: found.
        kind: one of KINDS.

    Raises:
        ValueError: the type is another one.
    """
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(
            f"{name}: found {reprlib.repr(value)} of type {type(value).__name__}, expected {KINDS[kind]} "
            f"({kind.__name__})"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that no network can have, before anything is built.

    Args:
        options: all arguments of InstanceFormer by name.

    Raises:
        ValueError: the first of what is wrong.
    """
    kinds = {str: ("backbone",), int: COUNTS, bool: SWITCHES, float: FRACTIONS}
    for kind, names in kinds.items():
        for name in names:
            check_type(name, options[name], kind)
    for name, most in COUNTS.items():
        if not 1 <= options[name] <= most:
            raise ValueError(f"{name}: found {options[name]}, expected at least 1 and at most {most}")
    if options["memory_tokens"] > options["num_queries"]:
        raise ValueError(
            f"memory_tokens: found {options['memory_tokens']}, expected at most num_queries={options['num_queries']}"
        )
    if options["num_levels"] < 3:
        raise ValueError(f"num_levels: found {options['num_levels']}, expected 3 to {len(STRIDES)}")
    if options["dim"] % 8 or options["dim"] % options["num_heads"]:
        raise ValueError(
            f"dim: found {options['dim']}, expected a multiple of 8 and of num_heads={options['num_heads']}"
        )
    for name, known in CHOICES.items():
        values = get_args(known)
        if options[name] not in values or type(options[name]) is not type(values[0]):
            expected = " or ".join(map(str, values))
            raise ValueError(f"{name}: found {reprlib.repr(options[name])}, expected {expected}")
    if not 0 <= options["dropout"] <= 1:
        raise ValueError(f"dropout: found {options['dropout']}, expected a probability in [0, 1]")
    if not 0 <= options["min_confidence"] < 1:
        raise ValueError(f"min_confidence: found {options['min_confidence']}, expected a score in [0, 1)")
    if not 0 < options["max_overlap"] <= 1:
        raise ValueError(f"max_overlap: found {options['max_overlap']}, expected an IoU in (0, 1]")
    if options["min_confidence"] == 0:
        for name, value in (
            ("free_queries", "renew"),
            ("class_history", "held"),
            ("identity", "hide"),
            ("identity", "recover"),
        ):
            if options[name] == value:
                raise ValueError(
                    f"{name}: found {value} with min_confidence=0, by which every query holds an instance at inference "
                    "from its first frame on, expected a min_confidence above 0, for instance 0.3"
                )
