"""A checkpoint, that is a network's options, weights and classes: checked, written, reused in another network."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from instanceformer.data.annotations import Category
from instanceformer.data.catalog import find_namesakes
from instanceformer.files import replacing
from instanceformer.model.options import check_type

METADATA = "instanceformer"
"""Key of the options and categories, as one JSON object, in the metadata of a safetensors file."""

PREFIX = "network."
"""Prefix of the network's weights in the LightningModule's state dict."""

SHAPING = (
    "num_classes",
    "backbone",
    "backbone_norm",
    "num_queries",
    "dim",
    "num_heads",
    "num_levels",
    "num_points",
    "encoder_layers",
    "decoder_layers",
    "feedforward_dim",
    "mask_stride",
    "location",
    "class_prior",
    "memory",
    "identity",
)
"""The options of InstanceFormer on which the names or shapes of its weights depend."""

BEFORE = {"identity": "none"}
"""Those of them that older checkpoints lack, with the values that these imply."""


@dataclass(frozen=True)
class FrameSize:
    """The size in pixels at which a network sees frames.

    Attributes:
        size: shorter side, a training's ``data.eval_size``; less where the longer side would exceed ``max_size``.
        max_size: upper limit of the longer side, a training's ``data.max_size``.

    Raises:
        ValueError: one is not a whole number of at least 1, or ``size`` is above 2**14.
    """

    size: int
    max_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_type(f"frame_size.{name}", value, int)
            if value < 1:
                raise ValueError(f"frame_size.{name}: found {value}, expected at least 1 pixel")
        if self.size > 2**14:
            raise ValueError(f"frame_size.size: found {self.size}, expected at most {2**14} pixels")


PAPER_SIZE = FrameSize(360, 768)
"""The size at which the paper evaluates."""


@dataclass(frozen=True)
class Checkpoint:
    """All that it takes to use a network: architecture, weights, what its classes mean and how it was evaluated.

    Attributes:
        options: arguments of InstanceFormer by name.
        weights: state dict of InstanceFormer.
        categories: id and name of every class, in the order of the class indices; empty if unknown.
        frame_size: the size at which its training evaluated it; None if unknown.
        inference: the InferenceOptions, by name, with which its training evaluated it; None if unknown.
        segmenter: the SegmenterOptions, by name, with which it is to be used online; None if nothing was said.
        name: what messages call it, such as the path of its file.

    Raises:
        ValueError: there are categories, but not one for each class.
    """

    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    categories: tuple[Category, ...] = ()
    frame_size: FrameSize | None = None
    inference: Mapping[str, Any] | None = None
    name: str = "checkpoint"
    segmenter: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        classes = self.options.get("num_classes")
        if self.categories and len(self.categories) != classes:
            raise ValueError(f"categories: found {len(self.categories)}, expected one for each of {classes} classes")

    def check_weights(self, expected: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit a network, or that a training left as NaN or infinite.

        Args:
            expected: state dict of the network.

        Raises:
            ValueError: the first thing that is wrong.
        """
        lacking = [name for name in expected if name not in self.weights]
        unknown = [name for name in self.weights if name not in expected]
        for names, what in ((lacking, "lacks"), (unknown, "has too many")):
            if names:
                raise ValueError(
                    f"{self.name}: {what} {len(names)} weights, such as {', '.join(names[:3])}; expected those of the "
                    f"network that its options describe, {len(expected)}"
                )
        for name, weight in self.weights.items():
            if not isinstance(weight, Tensor) or weight.shape != expected[name].shape:
                found = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
                raise ValueError(f"{self.name}: found {found} for {name}, expected {tuple(expected[name].shape)}")
            check_finite(name, weight, self.name)

    def check_network(self, options: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit a network built from other options, and say which options differ.

        Args:
            options: of the network.
            expected: its state dict.

        Raises:
            ValueError: names or shapes differ; or as in ``check_weights``.
        """
        shapes = {name: getattr(weight, "shape", None) for name, weight in self.weights.items()}
        made = {**BEFORE, **self.options}
        unlike = [name for name in SHAPING if name in made and made[name] != options[name]]
        if unlike and shapes != {name: weight.shape for name, weight in expected.items()}:
            differences = [
                f"made for {self._classes()}, found {options[name]} in model.network.num_classes"
                if name == "num_classes"
                else f"made with {name}={_shown(made[name])}, found {_shown(options[name])}"
                for name in unlike
            ]
            flags = " ".join(f"--model.network.{name}={_shown(made[name])}" for name in unlike)
            raise ValueError(f"{self.name}: {'; '.join(differences)}; give the options it was trained with: {flags}")
        self.check_weights(expected)

    def check_categories(self, categories: Sequence[Category]) -> None:
        """Refuse data with other classes, and warn if the checkpoint does not say what its classes are.

        Args:
            categories: of the data, in the order of the class indices.

        Raises:
            ValueError: names differ, or the ids are the same in another order.
        """
        names = [category.name for category in categories]
        if not self.categories:
            warnings.warn(
                f"{self.name}: does not say what its classes are; they are taken for the data's, in this order: "
                f"{few(names)}",
                stacklevel=2,
            )
            return
        ours, theirs = ([category.id for category in x] for x in (categories, self.categories))
        reordered = ours != theirs and sorted(ours) == sorted(theirs)
        if reordered or names != [category.name for category in self.categories]:
            unlike = [
                f"class {i}: made for {known.name!r} (id {known.id}), found {category.name!r} (id {category.id})"
                for i, (known, category) in enumerate(zip(self.categories, categories, strict=False))
                if known.name != category.name or (reordered and known.id != category.id)
            ]
            raise ValueError(
                f"{self.name}: made for {self._classes()}, found {len(names)} in the data ({few(names)}); "
                f"{', '.join([*unlike[:1], 'expected the same names in the same order'])}; use data with its "
                "categories, or train on these, from its weights by --model.init_from"
            )

    def _classes(self) -> str:
        names = few([category.name for category in self.categories])
        return f"{_shown(self.options.get('num_classes'))} classes" + (f" ({names})" if names else "")

    def to_lightning(self) -> dict[str, Any]:
        """All that ``read`` needs, and that ``validate``, ``test`` and ``predict`` need from a ``--ckpt_path``."""
        return {
            "pytorch-lightning_version": version("lightning"),
            "state_dict": {f"{PREFIX}{name}": weight for name, weight in self.weights.items()},
            **self.description(),
        }

    def description(self) -> dict[str, Any]:
        """All but the weights, as plain values."""
        return describe(self.options, self.categories, self.frame_size, self.inference, self.segmenter)


def few(names: Sequence[str]) -> str:
    """The first few names, as messages show them."""
    return ", ".join([*(name[:60] for name in names[:5]), *(["..."] if len(names) > 5 else [])])


def _shown(value: object) -> str:
    """A value as the command line takes it, cut off after 60 characters."""
    return str(value).lower() if isinstance(value, bool) else str(value)[:60]


def check_finite(name: str, weight: Tensor, owner: str) -> None:
    """Refuse a weight that is not a plain tensor of finite real numbers.

    Raises:
        ValueError: it is complex, quantized or sparse, has NaN or infinity, or stores fewer numbers than its shape has.
    """
    if weight.is_complex() or weight.is_quantized or weight.layout != torch.strided:
        raise ValueError(f"{owner}: found {name} of {weight.dtype}, {weight.layout}, expected plain real numbers")
    if weight.untyped_storage().nbytes() < weight.numel() * weight.itemsize:
        raise ValueError(f"{owner}: found fewer numbers for {name} than its shape {tuple(weight.shape)} has")
    if not weight.float().isfinite().all():
        raise ValueError(f"{owner}: found NaN or infinity in {name}, expected finite weights; take an earlier file")


def describe(
    options: Mapping[str, Any],
    categories: tuple[Category, ...],
    frame_size: FrameSize | None = None,
    inference: Mapping[str, Any] | None = None,
    segmenter: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The entries of a checkpoint that describe its network, as plain values; see Checkpoint."""
    description = {"network_options": dict(options), "categories": [vars(category) for category in categories]}
    if frame_size is not None:
        description["frame_size"] = vars(frame_size)
    if inference is not None:
        description["inference"] = dict(inference)
    if segmenter is not None:
        description["segmenter"] = dict(segmenter)
    return description


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a ``.ckpt``, which Lightning reads too, or ``.safetensors``; it appears under its name once complete.

    Raises:
        ValueError: the name ends in neither.
        OSError: the file cannot be written; an earlier one is unchanged.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".ckpt":
            torch.save(checkpoint.to_lightning(), temporary)
        else:
            weights = {name: weight.contiguous() for name, weight in checkpoint.weights.items()}
            metadata = {"format": "pt", METADATA: json.dumps(checkpoint.description())}
            temporary.write_bytes(safetensors.torch.save(weights, metadata))  # save_file: for its owner only


def check_suffix(path: Path) -> None:
    """Refuse a name that ``write`` has no format for, with a ValueError."""
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"{path}: found suffix {path.suffix!r}, expected .ckpt or .safetensors")


def class_indices(name: str, shape: Sequence[int], classes: Sequence[int]) -> tuple[Tensor, ...] | None:
    """Where in a weight of InstanceFormer the values of some classes are, and those of no class in particular.

    Args:
        name: of the weight.
        shape: of the weight, with all of its classes.
        classes: indices of the classes wanted, in the order wanted.

    Returns:
        An index into the weight, to read or write; None if the weight has no class dimension.

    Raises:
        IndexError: the weight has too few dimensions.
    """
    along = [list(range(size)) for size in shape]
    if name.startswith("decoder.class_heads."):
        along[0] = list(classes)
    elif name.startswith("class_prior.temporal."):
        along = [list(classes) for _ in shape]
    elif name == "memory.projection.weight":  # its columns: content, class scores, box (equation 3)
        content, box = range(shape[0]), range(shape[1] - 4, shape[1])
        along[1] = [*content, *(len(content) + index for index in classes), *box]
    else:
        return None
    return torch.meshgrid(*(torch.tensor(x, dtype=torch.int64) for x in along), indexing="ij")


def take_over(
    ours: Mapping[str, Tensor], categories: Sequence[Category], checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], str]:
    """Replace a network's weights with another's where they fit: those of classes by name, all others by shape.

    Args:
        ours: state dict of the network.
        categories: of its classes, in class order.
        checkpoint: of the other network.

    Returns:
        The new state dict, and a line that says what became of the classes and what did not fit.
    """
    namesakes = find_namesakes(categories, checkpoint.categories)
    pairs = [(i, j) for i, j in enumerate(namesakes) if j is not None]
    weights, left_new = dict(ours), []
    for name, x in ours.items():
        y = checkpoint.weights.get(name)
        if y is None or x.ndim != y.ndim:
            left_new.append(name)
            continue
        here, there = (
            class_indices(name, z.shape, [pair[side] for pair in pairs]) or (...,) for side, z in enumerate((x, y))
        )
        if x[here].shape != y[there].shape:
            left_new.append(name)
            continue
        weights[name] = x.clone()
        weights[name][here] = y[there].to(x)
    return weights, f"{_say_classes(categories, checkpoint, namesakes)}{_say_left(left_new)}"


def _say_classes(ours: Sequence[Category], checkpoint: Checkpoint, namesakes: Sequence[int | None]) -> str:
    if not checkpoint.categories:
        return f"all {len(ours)} classes are new, since it does not say what its own are"
    named = zip(ours, namesakes, strict=True)
    taken = [(our, checkpoint.categories[i]) for our, i in named if i is not None]
    new = [our.name for our, i in zip(ours, namesakes, strict=True) if i is None]
    synonyms = [f"{our.name} from {their.name}" for our, their in taken if our.name.lower() != their.name.lower()]
    said = f"{len(taken)} of {len(ours)} classes are taken over by name"
    return said + (f" ({', '.join(synonyms)})" if synonyms else "") + (f"; new: {', '.join(new)}" if new else "")


def _say_left(names: Sequence[str]) -> str:
    return f"; not taken over, since shapes or names differ: {', '.join(sorted(names))}" if names else ""
