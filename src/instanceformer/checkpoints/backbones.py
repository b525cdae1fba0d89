"""Loads weights of torchvision, timm or EfficientNet-PyTorch from a file into a backbone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from instanceformer.checkpoints.checkpoint import check_finite, few
from instanceformer.checkpoints.loading import is_own, load
from instanceformer.model.backbone import TIMM, Backbone, TimmFeatures

_THEIRS = re.compile(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)")
_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_UNEXPANDED_BLOCK = {**_BLOCK, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""EfficientNet-PyTorch's names, and timm's for the same; blocks that do not expand their input have one norm less."""


def load_backbone(backbone: Backbone, path: Path) -> str:
    """Load a backbone's weights from a file, ``.safetensors`` or of torch.save; the classifier is left out.

    Args:
        backbone: loaded in place.
        path: of a state dict, plain or under ``model`` or ``state_dict``, with torchvision's names, timm's, or, for
            ``timm/tf_efficientnet_...``, those of EfficientNet-PyTorch, whose weights are TensorFlow's.

    Returns:
        A report of one line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or would run code, shapes differ, or half of the weights or more are missing.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"model.backbone_weights: found {path}, which is no file; expected none, imagenet or a file of weights"
        )
    content = load(path)
    if is_own(content):
        raise ValueError(
            f"{path}: found a checkpoint of this package, expected weights of a backbone; give it as --model.init_from"
        )
    weights = content.get("state_dict", content.get("model", content))
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path}: found {type(weights).__name__}, expected a state dict")
    weights = {str(name).removeprefix("module."): x for name, x in weights.items() if isinstance(x, Tensor)}
    body = backbone.body.model if isinstance(backbone.body, TimmFeatures) else backbone.body
    expected = {name: x for name, x in body.state_dict().items() if not name.endswith("num_batches_tracked")}
    if "_conv_stem.weight" in weights:
        weights = _from_efficientnet_pytorch(weights, backbone.name, expected, path)
    missing = [name for name in expected if name not in weights]
    if 2 * len(missing) >= len(expected):
        raise ValueError(
            f"{path}: found {few(list(weights)) or 'no tensors'}, nothing for {len(missing)} of {len(expected)} "
            f"weights of {backbone.name}, such as {missing[0]}; expected weights of that model, or give their model as "
            "--model.network.backbone"
        )
    for name in expected.keys() & weights.keys():
        if weights[name].shape != expected[name].shape:
            raise ValueError(
                f"{path}: found shape {tuple(weights[name].shape)} for {name} of {backbone.name}, expected "
                f"{tuple(expected[name].shape)}; give the weights' own model as --model.network.backbone"
            )
        check_finite(name, weights[name], str(path))
    body.load_state_dict({name: x for name, x in weights.items() if name in expected}, strict=False)
    unused = [name for name in weights if name not in expected and not name.endswith("num_batches_tracked")]
    report = f"{path}: {len(expected) - len(missing)} of {len(expected)} weights of {backbone.name} are loaded"
    if missing:
        report += f"; nothing for {len(missing)}, which stay random: {few(missing)}"
    if unused:
        report += f"; left out {len(unused)}: {few(unused)}"
    return report


def _from_efficientnet_pytorch(
    weights: Mapping[str, Tensor], backbone: str, expected: Iterable[str], path: Path
) -> dict[str, Tensor]:
    """The same weights by timm's names, which count the blocks of each stage where theirs count them all.

    Raises:
        ValueError: the backbone pads otherwise than TensorFlow, or has fewer blocks.
    """
    if not backbone.startswith(f"{TIMM}tf_efficientnet"):
        raise ValueError(
            f"{path}: found an EfficientNet with TensorFlow's padding and names, expected weights of {backbone}; give "
            "its model as --model.network.backbone, for instance timm/tf_efficientnet_lite0"
        )
    blocks = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in expected if name.startswith("blocks.")))
    renamed = {}
    for name, x in weights.items():
        match = _THEIRS.fullmatch(name)
        number, module, entry = match.groups() if match else (None, name, "")
        if number is None:
            renamed[f"{_STEM_AND_HEAD.get(module, module)}.{entry}"] = x
        elif int(number) < len(blocks):
            names = _BLOCK if f"_blocks.{number}._expand_conv.weight" in weights else _UNEXPANDED_BLOCK
            renamed[f"{blocks[int(number)]}.{names.get(module, module)}.{entry}"] = x
    return renamed
