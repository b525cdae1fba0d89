"""The weights that have a class dimension: some classes of them, and one network's taken over into another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from instanceformer.checkpoints.files import Checkpoint
from instanceformer.data.annotations import Category
from instanceformer.data.catalog import find_namesakes


def class_indices(name: str, shape: Sequence[int], classes: Sequence[int]) -> tuple[Tensor, ...] | None:
    """Where a weight of InstanceFormer has what belongs to some classes or to none in particular.

    Args:
        name: of the weight.
        shape: of the weight, with all of its classes.
        classes: indices of the classes wanted, in the order wanted.

    Returns:
        What the weight can be indexed with, to read or to write; None where it has no class dimension.

    Raises:
        IndexError: the weight has too few dimensions.
    """
    along = [list(range(size)) for size in shape]
    if name.startswith("decoder.class_heads."):
        along[0] = list(classes)
    elif name.startswith("class_prior.temporal."):
        along = [list(classes) for _ in shape]
    elif name == "memory.projection.weight":  # of content, class scores and box, equation 3
        content, box = range(shape[0]), range(shape[1] - 4, shape[1])
        along[1] = [*content, *(len(content) + index for index in classes), *box]
    else:
        return None
    return torch.meshgrid(*(torch.tensor(x, dtype=torch.int64) for x in along), indexing="ij")


def take_over(
    ours: Mapping[str, Tensor], categories: Sequence[Category], checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], str]:
    """Weights of a network with those of another one put into it as far as they fit: classes by name, else by shape.

    Args:
        ours: state dict of the network.
        categories: of its classes, in class order.
        checkpoint: of the other network.

    Returns:
        The network's state dict anew, and a line of what became of the classes and of what did not fit.
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
