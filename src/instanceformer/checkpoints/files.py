"""Checkpoints as files: what Lightning writes, and safetensors with the configuration inside."""

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

from instanceformer.checkpoints.loading import METADATA, PREFIX, DamagedError, find_newest, load
from instanceformer.data.annotations import Category
from instanceformer.files import replacing
from instanceformer.model.options import check_type

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
"""Those of them that older checkpoints do not say, and what they were."""


@dataclass(frozen=True)
class FrameSize:
    """At which size a network sees frames, in pixels.

    Attributes:
        size: shorter side, ``data.eval_size`` of a training; less where the longer side would exceed ``max_size``.
        max_size: most that the longer side may have, ``data.max_size`` of a training.
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
"""At which the paper evaluates."""


@dataclass(frozen=True)
class Checkpoint:
    """A network that can be used: its architecture, its weights, what its classes mean and how it was evaluated.

    Attributes:
        options: arguments of InstanceFormer by name.
        weights: state dict of InstanceFormer.
        categories: id and name of every class, in the order of the class indices; empty where nobody knows them.
        frame_size: at which its training evaluated it; None where nobody knows it.
        inference: InferenceOptions by name, with which its training evaluated it; None where nobody knows them.
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

    def __post_init__(self) -> None:
        classes = self.options.get("num_classes")
        if self.categories and len(self.categories) != classes:
            raise ValueError(f"categories: found {len(self.categories)}, expected one for each of {classes} classes")

    def check_weights(self, expected: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit a network, or that a training left as NaN or infinite.

        Args:
            expected: state dict of the network.

        Raises:
            ValueError: the first of what is wrong.
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
        """Refuse weights that do not fit a network that was built from other options, and say from which.

        Args:
            options: of the network.
            expected: its state dict.

        Raises:
            ValueError: names or shapes are others; or as in ``check_weights``.
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
        """Refuse data whose classes are others, and warn where the checkpoint does not say what its classes are.

        Args:
            categories: of the data, in the order of the class indices.

        Raises:
            ValueError: names differ, or the ids are the same in another order.
        """
        names = [category.name for category in categories]
        if not self.categories:
            warnings.warn(
                f"{self.name}: does not say what its classes are; they are taken for the data's, in this order: "
                f"{_few(names)}",
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
                f"{self.name}: made for {self._classes()}, found {len(names)} in the data ({_few(names)}); "
                f"{', '.join([*unlike[:1], 'expected the same names in the same order'])}; use data with its "
                "categories, or train on these, from its weights by --model.init_from"
            )

    def _classes(self) -> str:
        names = _few([category.name for category in self.categories])
        return f"{_shown(self.options.get('num_classes'))} classes" + (f" ({names})" if names else "")

    def to_lightning(self) -> dict[str, Any]:
        """All that ``read`` needs, and that ``validate``, ``test`` and ``predict`` need of a ``--ckpt_path``."""
        return {
            "pytorch-lightning_version": version("lightning"),
            "state_dict": {f"{PREFIX}{name}": weight for name, weight in self.weights.items()},
            **describe(self.options, self.categories, self.frame_size, self.inference),
        }


def _few(names: Sequence[str]) -> str:
    """The first names, as messages show them."""
    return ", ".join([*(name[:60] for name in names[:5]), *(["..."] if len(names) > 5 else [])])


def _shown(value: object) -> str:
    """A value as the command line takes it, no longer than a line."""
    return str(value).lower() if isinstance(value, bool) else str(value)[:60]


def check_finite(name: str, weight: Tensor, where: str) -> None:
    """Refuse a weight that is no real number.

    Raises:
        ValueError: it is complex, quantized, NaN, infinite, or repeats a few numbers to seem large.
    """
    if weight.is_complex() or weight.is_quantized or weight.layout != torch.strided:
        raise ValueError(f"{where}: found {name} of {weight.dtype}, {weight.layout}, expected plain real numbers")
    if weight.untyped_storage().nbytes() < weight.numel() * weight.itemsize:
        raise ValueError(f"{where}: found fewer numbers for {name} than its shape {tuple(weight.shape)} has")
    if not weight.float().isfinite().all():
        raise ValueError(f"{where}: found NaN or infinity in {name}, expected finite weights; take an earlier file")


def describe(
    options: Mapping[str, Any],
    categories: tuple[Category, ...],
    frame_size: FrameSize | None = None,
    inference: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The entries of a checkpoint that say whose weights it holds, of plain values; see Checkpoint."""
    description = {"network_options": dict(options), "categories": [vars(category) for category in categories]}
    if frame_size is not None:
        description["frame_size"] = vars(frame_size)
    if inference is not None:
        description["inference"] = dict(inference)
    return description


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint that ``fit`` or ``convert`` wrote, of either format. Nothing in a file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds no network of this package.
    """
    return from_content(load(path), str(path))


def load_for_trainer(path: str | Path) -> dict[str, Any]:
    """What Lightning's trainer takes as the content of a checkpoint, of either format.

    A file of weights alone has no ``optimizer_states``, ``loops`` and so on: no training can be resumed from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in ``read``; of a damaged file the message names the newest sound one beside it, if there is one.
    """
    path = Path(path)
    try:
        content = load(path)
    except DamagedError as error:
        newest, _ = find_newest(path.parent)
        if newest is None:
            raise
        raise DamagedError(f"{error}; the newest sound one beside it is {newest}") from error
    from_content(content, str(path))
    return {"pytorch-lightning_version": version("lightning"), **content}


def is_own(content: Mapping[str, Any]) -> bool:
    """Whether a loaded file says which network of this package it holds."""
    return "network_options" in content and "state_dict" in content


def from_content(content: Mapping[str, Any], name: str) -> Checkpoint:
    """The checkpoint in what ``load`` or Lightning loaded.

    Args:
        content: of the file.
        name: of the checkpoint, such as the file's path.

    Raises:
        ValueError: it holds no network of this package, or something of another type than it should.
    """
    if not is_own(content):
        found = ", ".join(str(key)[:60] for key in list(content)[:5]) or "nothing"
        raise ValueError(
            f"{name}: found no 'network_options' but {found}; expected a checkpoint that `instanceformer fit` or "
            "`instanceformer convert` wrote; turn weights of the authors' release, Deformable-DETR or SeqFormer into "
            "one by `instanceformer convert`"
        )
    try:
        size, inference = (content.get(key) for key in ("frame_size", "inference"))
        state = _mapping("state_dict", content["state_dict"])
        return Checkpoint(
            options=dict(_mapping("network_options", content["network_options"])),
            weights={key.removeprefix(PREFIX): x for key, x in state.items() if key.startswith(PREFIX)},
            categories=_categories(content.get("categories", [])),
            frame_size=None if size is None else FrameSize(**_mapping("frame_size", size, "size", "max_size")),
            inference=None if inference is None else dict(_mapping("inference", inference)),
            name=name,
        )
    except ValueError as error:
        raise ValueError(f"{name}: a checkpoint that is not whole; {error}; write or copy it again") from error


def _mapping(name: str, value: object, *keys: str) -> Mapping[str, Any]:
    """The value, if it is a dictionary by name, of these keys if there are any."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: found {type(value).__name__}, expected a dictionary of values by name")
    if keys and set(keys) != set(value):
        raise ValueError(f"{name}: found {_few(list(value)) or 'nothing'}, expected {' and '.join(keys)}")
    return value


def _categories(found: object) -> tuple[Category, ...]:
    if not isinstance(found, list | tuple):
        raise ValueError(f"categories: found {type(found).__name__}, expected a list")
    categories = []
    for i, entry in enumerate(found):
        values = _mapping(f"categories[{i}]", entry, "id", "name")
        check_type(f"categories[{i}].id", values["id"], int)
        check_type(f"categories[{i}].name", values["name"], str)
        if abs(values["id"]) >= 2**63 or len(values["name"]) > 1000:
            raise ValueError(f"categories[{i}]: found an id or a name that is too long, expected 64 bits, 1000 letters")
        categories.append(Category(**values))
    if len({category.id for category in categories}) < len(categories):
        raise ValueError("categories: found an id twice, expected one for each class")
    return tuple(categories)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``.ckpt``, which Lightning reads too, or ``.safetensors``; it has its name only when it is complete.

    Raises:
        ValueError: the name ends in neither.
        OSError: it cannot be written; what was there before stays.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".ckpt":
            torch.save(checkpoint.to_lightning(), temporary)
        else:
            weights = {name: weight.contiguous() for name, weight in checkpoint.weights.items()}
            description = describe(
                checkpoint.options, checkpoint.categories, checkpoint.frame_size, checkpoint.inference
            )
            metadata = {"format": "pt", METADATA: json.dumps(description)}
            temporary.write_bytes(safetensors.torch.save(weights, metadata))  # save_file makes a file of the user alone


def check_suffix(path: Path) -> None:
    """Refuse a name that ``write`` has no format for."""
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"{path}: found suffix {path.suffix!r}, expected .ckpt or .safetensors")
