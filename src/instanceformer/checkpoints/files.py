"""Checkpoints as files: what Lightning writes, and safetensors with the configuration inside."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from instanceformer.data.annotations import Category
from instanceformer.files import replacing

METADATA = "instanceformer"
"""Key of the options and categories, as one JSON object, in the metadata of a safetensors file."""

PREFIX = "network."
"""What the LightningModule puts before the names of the network's weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A network that can be used: its architecture, its weights and what its classes mean.

    Attributes:
        options: arguments of InstanceFormer by name.
        weights: state dict of InstanceFormer.
        categories: id and name of every class, in the order of the class indices; empty where nobody knows them.
        name: what messages call it, such as the path of its file.

    Raises:
        ValueError: there are categories, but not one for each class.
    """

    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    categories: tuple[Category, ...] = ()
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

    def to_lightning(self) -> dict[str, Any]:
        """All that ``read`` needs, and that ``validate``, ``test`` and ``predict`` need of a ``--ckpt_path``."""
        return {
            "pytorch-lightning_version": version("lightning"),
            "state_dict": {f"{PREFIX}{name}": weight for name, weight in self.weights.items()},
            **describe(self.options, self.categories),
        }


def check_finite(name: str, weight: Tensor, where: str) -> None:
    """Refuse a weight that is no real number.

    Raises:
        ValueError: it is complex, quantized, NaN or infinite.
    """
    if weight.is_complex() or weight.is_quantized or weight.layout != torch.strided:
        raise ValueError(f"{where}: found {name} of {weight.dtype}, {weight.layout}, expected plain real numbers")
    if not weight.float().isfinite().all():
        raise ValueError(f"{where}: found NaN or infinity in {name}, expected finite weights; take an earlier file")


def describe(options: Mapping[str, Any], categories: tuple[Category, ...]) -> dict[str, Any]:
    """The entries of a checkpoint that say whose weights it holds, of plain values."""
    return {"network_options": dict(options), "categories": [vars(category) for category in categories]}


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint that ``fit`` or ``convert`` wrote, of either format. Nothing in a file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds no network of this package.
    """
    content = load(path)
    if not is_own(content):
        found = ", ".join(list(map(str, content))[:5]) or "nothing"
        raise ValueError(
            f"{path}: found no 'network_options' but {found}; expected a checkpoint that `instanceformer fit` or "
            "`instanceformer convert` wrote; turn weights of the authors' release, Deformable-DETR or SeqFormer into "
            "one by `instanceformer convert`"
        )
    try:
        weights = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
        categories = tuple(Category(int(c["id"]), str(c["name"])) for c in content.get("categories", ()))
        return Checkpoint(dict(content["network_options"]), weights, categories, str(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a checkpoint that is not whole ({error!r}); write or copy it again") from error


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write ``.ckpt``, which Lightning reads too, or ``.safetensors``; it has its name only when it is complete.

    Raises:
        ValueError: the name ends in neither.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".ckpt":
            torch.save(checkpoint.to_lightning(), temporary)
        else:
            weights = {name: weight.contiguous() for name, weight in checkpoint.weights.items()}
            metadata = {"format": "pt", METADATA: json.dumps(describe(checkpoint.options, checkpoint.categories))}
            temporary.write_bytes(safetensors.torch.save(weights, metadata))  # save_file makes a file of the user alone


def check_suffix(path: Path) -> None:
    """Refuse a name that ``write`` has no format for."""
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"{path}: found suffix {path.suffix!r}, expected .ckpt or .safetensors")


def is_own(content: Mapping[str, Any]) -> bool:
    """Whether a loaded file says which network of this package it holds."""
    return "network_options" in content and "state_dict" in content


def load(path: str | Path) -> Mapping[str, Any]:
    """Load a file of tensors, on the CPU, in the form that a Lightning checkpoint of it would have.

    ``weights_only``, so that no code of the file runs. The one class beyond tensors and plain values that is let
    through is argparse's Namespace, a bag of values, since Deformable-DETR and its descendants save their arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds other objects or no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        foreign = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{path}: found an object of {foreign[1]}, which is not loaded, since to make it would run code of the "
                "file; expected tensors and plain values; save its state dict alone where you trust it"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: found a damaged file, or none of torch.save ({reason}); expected a whole file of a state dict; "
            "copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected a dictionary of tensors")
    return content


def _load_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        if METADATA not in metadata:
            return weights
        description = json.loads(metadata[METADATA])
        return {"state_dict": {f"{PREFIX}{name}": weight for name, weight in weights.items()}, **description}
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: a damaged safetensors file ({error}); copy or write it again") from error
