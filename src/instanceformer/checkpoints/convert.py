"""Converts weights of the authors' release, Deformable-DETR and SeqFormer to checkpoints of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from instanceformer.checkpoints.checkpoint import (
    PAPER_SIZE,
    Checkpoint,
    check_finite,
    check_suffix,
    class_indices,
    write,
)
from instanceformer.checkpoints.hub import CardOptions, save
from instanceformer.checkpoints.loading import WEIGHTS, find, from_content, is_own, load
from instanceformer.checkpoints.sources import RELEASE, SOURCES, Source
from instanceformer.data.annotations import Category
from instanceformer.data.catalog import CATALOG, DatasetName
from instanceformer.files import locking
from instanceformer.model.heads import COORDINATE_SCALE, HIDDEN
from instanceformer.model.network import InstanceFormer
from instanceformer.model.options import NetworkOptions

RULES = {"multiplicative": "paper", "additive": "additive", "none": "none"}
"""The release's ways to propagate reference points, and the same rules as values of our option ``location``."""

RESNETS = {
    (2, 2, 2, 2, 64, 64): "resnet18",
    (3, 4, 6, 3, 64, 64): "resnet34",
    (3, 4, 6, 3, 64, 64, 256): "resnet50",
    (3, 4, 23, 3, 64, 64, 256): "resnet101",
    (3, 8, 36, 3, 64, 64, 256): "resnet152",
    (3, 4, 6, 3, 128, 4, 256): "resnext50_32x4d",
    (3, 4, 23, 3, 256, 8, 256): "resnext101_32x8d",
    (3, 4, 23, 3, 256, 4, 256): "resnext101_64x4d",
}
"""Numbers of blocks in the four stages; then, in the first block, output channels of the first convolution, input
channels per group of the second and, in a bottleneck, output channels of the third."""

DATASETS: dict[int, tuple[DatasetName, ...]] = {27: ("ovis",), 42: ("ytvis19", "ytvis21"), 91: ("coco",)}
"""The datasets that a number of class channels can stand for."""


@dataclass(frozen=True)
class SourceOptions:
    """What weights do not say about their network; the defaults are those of the authors' release.

    The first three apply to the authors' release only; other sources get the paper's memory and location rule.

    Attributes:
        location: how reference points are propagated.
        tokens: queries remembered from each frame; without effect for weights trained without memory.
        support: the release's ``memory_support``: frames that the memory spans, the current one included.
        heads: attention heads.
        dataset: whose category ids the class channels are. null: told by their number, 27 for OVIS, 91 for COCO, 42 for
            YouTube-VIS 2019 or 2021, which cannot be told apart, so that the checkpoint lacks class names.
        all_channels: keep every class channel, so that class index c is category id c. If false, the classes are the
            categories of the dataset in ascending order of id, as in the data module, and channels without a category
            are dropped; the memory then lacks their scores, so that outputs differ slightly from the source's.
    """

    location: Literal["multiplicative", "additive", "none"] = "multiplicative"
    tokens: int = 10
    support: int = 4
    heads: int = 8
    dataset: DatasetName | None = None
    all_channels: bool = False

    def __post_init__(self) -> None:
        if self.support < 2:
            raise ValueError(f"support: found {self.support}, expected at least 2, the current frame and one before it")
        for name in ("tokens", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Conversion:
    """A checkpoint made from a state dict, and what became of every entry of both.

    Attributes:
        source: title of the source.
        checkpoint: the result.
        mapped: entries of the source that the checkpoint has.
        dropped: entries of the source that it does not have, with the reason.
        left_new: parameters of ours that the source has nothing for; they have the values of an untrained network.
        classes: what became of the class channels.
    """

    source: str
    checkpoint: Checkpoint
    mapped: tuple[str, ...]
    dropped: Mapping[str, str]
    left_new: tuple[str, ...]
    classes: str

    def __str__(self) -> str:
        options = {**self.checkpoint.options, "num_classes": NetworkOptions.num_classes}
        defaults = vars(NetworkOptions())
        unlike = [f"{name}={value}" for name, value in options.items() if value != defaults[name]]
        lines = [
            self.source,
            f"  network: {', '.join(unlike) or 'every option at its default'}",
            f"  classes: {self.classes}",
            f"  mapped: {len(self.mapped)} entries",
        ]
        for reason in dict.fromkeys(self.dropped.values()):
            names = [name for name, why in self.dropped.items() if why == reason]
            lines.append(f"  dropped: {len(names)} entries such as {names[0]}: {reason}")
        if self.left_new:
            modules = sorted({_module(name) for name in self.left_new})
            lines.append(f"  left new: {len(self.left_new)} parameters of {', '.join(modules)}")
        return "\n".join(lines)


def convert_file(
    source: Path,
    output: Path,
    options: SourceOptions = SourceOptions(),
    overwrite: bool = False,
    card: CardOptions = CardOptions(),
) -> str:
    """Convert the weights of another project to a checkpoint, or a checkpoint of this package to another format.

    Args:
        source: a ``.pth`` whose ``model`` entry is a state dict, a plain state dict, or a checkpoint of this package.
        output: ``.ckpt`` or ``.safetensors``; without a suffix a folder to share, see ``hub.save``.
        options: for weights of another project.
        overwrite: whether to replace an output that exists.
        card: of the folder.

    Returns:
        A report of a few lines.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: the output exists and is not to be replaced, or is the source.
        BlockingIOError: another process is writing the output.
        ValueError: the source is damaged or of no known kind, options are given for a checkpoint of this package, or
            the output has another suffix.
    """
    if output.suffix:
        check_suffix(output)
        if card != CardOptions():
            raise ValueError(f"{output}: found a file, expected a folder, since options of a model card are given")
    source = find(source) if source.is_dir() else source
    content = load(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locking(output):
        file = output if output.suffix else output / WEIGHTS
        if file.exists() and (not overwrite or file.samefile(find(source))):
            raise FileExistsError(
                f"{file} exists; give another output, or --overwrite to replace one of an earlier run"
            )
        checkpoint, report = _make(source, content, options)
        if output.suffix:
            write(checkpoint, output)
        else:
            save(checkpoint, output, card)
    return f"{report}\n  written to {output}"


def _make(source: Path, content: Mapping[str, Any], options: SourceOptions) -> tuple[Checkpoint, str]:
    """The checkpoint made from a file's content, and a report."""
    if is_own(content):
        if options != SourceOptions():
            raise ValueError(f"{source}: found a checkpoint of this package, which says its own options; give none")
        checkpoint = from_content(content, str(source))
        InstanceFormer.from_checkpoint(checkpoint)  # refuses an incomplete one
        return checkpoint, f"{source}: a checkpoint of this package"
    try:
        conversion = convert(content.get("model", content), options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return conversion.checkpoint, str(conversion)


def convert(weights: Mapping[str, Any], options: SourceOptions = SourceOptions()) -> Conversion:
    """Give another project's weights our names, our layout and the options under which our network computes the same.

    Args:
        weights: a state dict of the authors' release, of Deformable-DETR with box refinement, or of SeqFormer.
        options: what the weights do not say.

    Raises:
        ValueError: the source is unknown, entries are missing or have no counterpart here, or shapes do not agree.
    """
    source = _recognize(weights)
    layers = tuple(_count_layers(weights, source, part) for part in ("encoder", "decoder"))
    mapped, dropped, unknown = _sort(weights, source.mapped(*layers), source.dropped(*layers))
    if unknown:
        raise ValueError(
            f"found {len(unknown)} entries that {source.title} has no place for here, such as "
            f"{', '.join(unknown[:3])}; expected a model with a ResNet, box refinement and one stage"
        )
    if f"{source.prefix}transformer.decoder.bbox_embed.0.layers.0.weight" not in weights:
        raise ValueError(
            f"found {source.title} without transformer.decoder.bbox_embed, that is without iterative box refinement; "
            "expected a model trained with --with_box_refine, since ours refines boxes in every layer"
        )
    for name in mapped:
        check_finite(name, weights[name], source.title)
    architecture = _architecture(weights, source, layers, options)
    outputs = _shape(weights, source, "class_embed.0.weight", 2)[0]
    channels, categories, classes = _classes(outputs, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same source always gives the same file
        network = InstanceFormer(len(channels), **architecture)

    expected = network.state_dict()
    ours: dict[str, Tensor] = {}
    for name, target in mapped.items():
        for new, x in _translate(name, target, weights[name], channels, outputs).items():
            if new not in expected or x.shape != expected[new].shape:
                wanted = f"shape {tuple(expected[new].shape)}" if new in expected else "no such entry"
                raise ValueError(f"{name}: found shape {tuple(x.shape)} for our {new}, expected {wanted}")
            ours[new] = x.to(expected[new].dtype)
    left_new = tuple(name for name in expected if name not in ours)
    lacking = [name for name in left_new if not source.left_new & set(name.split("."))]
    if lacking:
        raise ValueError(
            f"found nothing in {source.title} for {len(lacking)} of our parameters, such as {', '.join(lacking[:3])}; "
            "expected a whole state dict"
        )
    checkpoint = Checkpoint(vars(network.options), {**expected, **ours}, categories, PAPER_SIZE)
    return Conversion(source.title, checkpoint, tuple(mapped), dropped, left_new, classes)


def _recognize(weights: Mapping[str, Any]) -> Source:
    """The source that a state dict comes from."""
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"found {type(weights).__name__}, expected a state dict, plain or under 'model'")
    for source in SOURCES:
        if f"{source.prefix}{source.marker}.weight" in weights:
            strange = [name for name, x in weights.items() if not isinstance(x, Tensor)]
            if strange:
                raise ValueError(f"{strange[0]}: found {type(weights[strange[0]]).__name__}, expected a tensor")
            return source
    found = ", ".join(list(weights)[:3]) or "nothing"
    raise ValueError(
        f"found {len(weights)} entries such as {found}; expected a state dict, plain or under 'model', without a "
        f"'module.' before its names, of {'; '.join(source.title for source in SOURCES)}"
    )


def _sort(
    weights: Mapping[str, Any], mapped: Mapping[str, str], dropped: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Our names of the entries that have one, the reasons to drop those that have none, and the unknown entries."""
    kept, left, unknown = {}, {}, []
    for name in weights:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        module = next((prefix for prefix in prefixes if prefix in mapped or prefix in dropped), None)
        if module is None:
            unknown.append(name)
        elif parts[-1] == "num_batches_tracked":
            left[name] = "frozen batch norm counts nothing"
        elif module in dropped:
            left[name] = dropped[module]
        else:
            kept[name] = mapped[module] + name[len(module) :]
    return kept, left, unknown


def _count_layers(weights: Mapping[str, Tensor], source: Source, part: str) -> int:
    name = f"{source.prefix}transformer.{part}.layers.%d.norm2.weight"
    return next(i for i in count() if name % i not in weights)


def _architecture(
    weights: Mapping[str, Tensor], source: Source, layers: tuple[int, ...], options: SourceOptions
) -> dict[str, Any]:
    """Our network's options, except the number of classes, from the source, the shapes and ``options``."""
    num_queries, both = _shape(weights, source, "query_embed.weight", 2)
    num_levels = _shape(weights, source, "transformer.level_embed", 2)[0]
    attention = _shape(weights, source, "transformer.encoder.layers.0.self_attn.attention_weights.weight", 2)[0]
    architecture = {
        **source.options,
        "backbone": _resnet(weights, f"{source.prefix}backbone.0.body"),
        "num_queries": num_queries,
        "dim": both // 2,
        "num_heads": options.heads,
        "num_levels": num_levels,
        "num_points": attention // (num_levels * options.heads),
        "encoder_layers": layers[0],
        "decoder_layers": layers[1],
        "feedforward_dim": _shape(weights, source, "transformer.encoder.layers.0.linear1.weight", 2)[0],
    }
    if source is RELEASE:
        architecture |= {
            "location": RULES[options.location],
            "memory": f"{source.prefix}transformer.mem_token_proj.weight" in weights,
            "memory_frames": options.support - 1,
            "memory_tokens": options.tokens,
        }
    return architecture


def _shape(weights: Mapping[str, Tensor], source: Source, name: str, dims: int) -> torch.Size:
    name = f"{source.prefix}{name}"
    if name not in weights:
        raise ValueError(f"found no {name} in {source.title}, expected a whole state dict")
    shape = weights[name].shape
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{name}: found shape {tuple(shape)}, expected {dims} dimensions, none of them empty")
    return shape


def _resnet(weights: Mapping[str, Tensor], body: str) -> str:
    """Name of the ResNet whose weights have names that start with ``body``."""
    blocks = [
        next(i for i in count() if f"{body}.layer{stage}.{i}.conv1.weight" not in weights) for stage in range(1, 5)
    ]
    sides = (("conv1", 0), ("conv2", 1), ("conv3", 0))
    names = ((f"{body}.layer1.0.{conv}.weight", side) for conv, side in sides)
    widths = [weights[name].shape[side] for name, side in names if name in weights and weights[name].ndim == 4]
    shape = (*blocks, *widths)
    if shape not in RESNETS:
        raise ValueError(
            f"backbone: found stages of {blocks} blocks, {widths} channels wide, under {body}, expected "
            f"{', '.join(RESNETS.values())}"
        )
    return RESNETS[shape]


def _classes(channels: int, options: SourceOptions) -> tuple[list[int], tuple[Category, ...], str]:
    """Class channels to keep, their categories if known, and a line for the report."""
    if options.all_channels:
        return list(range(channels)), (), f"all {channels} channels, class index = category id"
    candidates = DATASETS.get(channels, ()) if options.dataset is None else (options.dataset,)
    if not candidates:
        known = ", ".join(f"{number} ({' or '.join(names)})" for number, names in DATASETS.items())
        raise ValueError(f"found {channels} class channels, expected {known}; give a dataset, or keep all channels")
    categories = CATALOG[candidates[0]].categories
    kept = [category.id for category in categories]
    if kept[-1] >= channels:
        raise ValueError(f"found {channels} class channels, but {candidates[0]} has category ids up to {kept[-1]}")
    line = f"{len(kept)} of {channels} channels, the categories of {' or '.join(candidates)} in ascending order of id"
    if len(candidates) > 1:
        return kept, (), f"{line}; without names, since the weights do not say which dataset"
    return kept, categories, line


def _translate(name: str, target: str, x: Tensor, channels: list[int], outputs: int) -> dict[str, Tensor]:
    """Translate entry ``name`` of a source with ``outputs`` class channels into one or two of ours."""
    if target.startswith("decoder.class_heads.") and x.shape[:1] != (outputs,):
        raise ValueError(
            f"{name}: found shape {tuple(x.shape)}, expected the {outputs} class channels of class_embed.0"
        )
    if target == "memory.projection.weight" and x.ndim == 2 and x.shape[1] != x.shape[0] + outputs + 4:
        raise ValueError(f"{name}: found {x.shape[1]} columns, expected {x.shape[0]} + {outputs} classes + 4 of a box")
    try:
        return _in_our_layout(target, x, channels)
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{name}: found shape {tuple(x.shape)}, which does not go with the others ({error})"
        ) from error


def _in_our_layout(target: str, x: Tensor, channels: list[int]) -> dict[str, Tensor]:
    if target == "query.weight":
        position, content = x.chunk(2, dim=1)
        return {"query_position": position.contiguous(), "query_content": content.contiguous()}
    if target.startswith("mask_head.controller.4."):
        return {target: _dynamic_parameters(x)}
    classes = class_indices(target, x.shape, channels)
    return {target: x if classes is None else x[classes]}


def _dynamic_parameters(x: Tensor) -> Tensor:
    """Rows of the controller's last layer, (169, ...): weights stored output by input become input by output.

    Our relative coordinates are theirs divided by COORDINATE_SCALE, so their weights are multiplied by it.
    """
    first, second, rest = x.split(((2 + HIDDEN) * HIDDEN, HIDDEN * HIDDEN, x.shape[0] - (2 + 2 * HIDDEN) * HIDDEN))
    first = first.unflatten(0, (HIDDEN, 2 + HIDDEN)).transpose(0, 1)
    first = torch.cat((first[:2] * COORDINATE_SCALE, first[2:]))
    second = second.unflatten(0, (HIDDEN, HIDDEN)).transpose(0, 1)
    return torch.cat((first.flatten(0, 1), second.flatten(0, 1), rest))


def _module(name: str) -> str:
    """The part of a parameter's name that names its module, without layer numbers."""
    return next(
        (part for part in name.split(".") if part in {"memory", "memory_attention", "mask_head"}), name.split(".")[0]
    )
