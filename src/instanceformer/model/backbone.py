"""The backbone: any torchvision ResNet or Swin, or a model of timm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["frozen", "batch"]

TIMM = "timm/"
"""Prefix of the names of timm's models."""

RESNET_NODES = {"layer1": "C2", "layer2": "C3", "layer3": "C4", "layer4": "C5"}
SWIN_NODES = {"features.1": "C2", "features.3": "C3", "features.5": "C4", "features.7": "C5"}


class WeightsError(RuntimeError):
    """Pretrained weights that could not be loaded."""


class Backbone(nn.Module):
    """Feature maps C2 to C5 at strides 4, 8, 16 and 32.

    Args:
        name: a torchvision ResNet or Swin, for instance ``resnet50``, ``resnet101``, ``swin_t``; ``timm/NAME``, a model
            of timm (see TimmFeatures); or ``small``, a narrow ResNet for experiments from random weights (see
            SmallResNet).
        norm: for a backbone with batch norm. ``frozen``, for pretrained weights, as in DETR: batch norm is a fixed
            affine map, and all up to C2 is not trained (except in ``small``). ``batch``, for random weights: ordinary
            batch norm, and everything is trained. A backbone without batch norm, such as a Swin, is trained throughout
            and ignores this.

    Attributes:
        channels: channels of C2, C3, C4, C5.
        is_frozen: whether batch norms are fixed, so that images do not affect each other.

    Raises:
        ValueError: there is no such model, or timm is not installed.
    """

    def __init__(self, name: str = "resnet50", norm: Norm = "frozen") -> None:
        super().__init__()
        self.name = name
        self._is_swin = name.startswith("swin")
        norm_layer = FrozenBatchNorm if norm == "frozen" else nn.BatchNorm2d
        self.body: nn.Module
        if name.startswith(TIMM):
            self.body = TimmFeatures(name.removeprefix(TIMM), norm)
        elif self._is_swin and name in models.list_models(models):
            self.body = create_feature_extractor(models.get_model(name, weights=None), SWIN_NODES)
        elif name == "small":
            self.body = create_feature_extractor(SmallResNet(norm_layer), RESNET_NODES)
        elif name.startswith(("resnet", "resnext", "wide_resnet")) and name in models.list_models(models):
            resnet = models.get_model(name, weights=None, norm_layer=norm_layer)
            self.body = create_feature_extractor(resnet, RESNET_NODES)
            if norm == "frozen":
                for stage in ("conv1", "layer1"):
                    self.body.get_submodule(stage).requires_grad_(False)
        else:
            known = [
                n for n in models.list_models(models) if n.startswith(("resnet", "resnext", "wide_resnet", "swin"))
            ]
            raise ValueError(f"backbone: found {name!r}, expected small, timm/NAME or one of {', '.join(known)}")
        self.is_frozen = any(isinstance(module, FrozenBatchNorm) for module in self.modules())
        self.body.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs and on tensor cores
        self.channels = self._count_channels()

    @torch.no_grad()
    def _count_channels(self) -> tuple[int, ...]:
        training = self.training
        self.eval()
        try:
            channels = tuple(feature.shape[1] for feature in self(torch.zeros(1, 3, 64, 64)))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"backbone: found {self.name}, which takes images of one size only ({error}), expected one that takes "
                "any size, for instance timm/swin_tiny_patch4_window7_224 or timm/mvitv2_tiny"
            ) from error
        self.train(training)
        return channels

    def load_imagenet_weights(self, progress: bool = True) -> None:
        """Load the library's ImageNet weights, downloading them if they are not cached.

        torchvision's are its first (``IMAGENET1K_V1``), timm's those of the name's tag or the model's default ones.

        Raises:
            WeightsError: they could not be loaded.
        """
        if isinstance(self.body, TimmFeatures):
            self.body.load_pretrained()
            return
        try:
            weights = models.get_model_weights(self.name)["IMAGENET1K_V1"]
            state = weights.get_state_dict(progress=progress, check_hash=True)
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(
                f"ImageNet weights of {self.name} could not be loaded ({error}). Put the file that torchvision names "
                f"into {torch.hub.get_dir()}/checkpoints, or train from random weights with "
                "--model.backbone_weights none --model.network.backbone_norm batch."
            ) from error
        missing, _ = self.body.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing:
            raise WeightsError(f"ImageNet weights of {self.name} lack {', '.join(missing)}")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract features.

        Args:
            images: (X, 3, H, W) normalized.

        Returns:
            C2 to C5: (X, channels[l], ceil(H / s), ceil(W / s)) for s in 4, 8, 16, 32.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        if not self._is_swin:
            return list(self.body(images).values())
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % 4, 0, -height % 4))  # a Swin drops pixels that do not fill a 4x4 patch
        return [feature.permute(0, 3, 1, 2) for feature in self.body(images).values()]


class TimmFeatures(nn.Module):
    """C2 to C5 of a model of timm.

    A ViT with one stride, 16, gives the features after each quarter of its layers, resized.

    Args:
        name: of the model, with or without a tag of pretrained weights, such as ``convnext_tiny.dinov3_lvd1689m``.
        norm: see Backbone.

    Attributes:
        model: timm's, without what C5 does not need; its weights have timm's names.

    Raises:
        ValueError: timm is not installed, has no such model, or the model gives no features at these strides.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, norm: Norm) -> None:
        super().__init__()
        self.name = name
        self.model = create_timm(name, pretrained=False)
        reductions = [feature["reduction"] for feature in getattr(self.model, "feature_info", [])]
        count = len(reductions)
        self.is_plain = set(reductions) == {16}
        if self.is_plain:
            self.indices = [count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        elif {4, 8, 16, 32} <= set(reductions) and hasattr(self.model, "forward_intermediates"):
            self.indices = [count - 1 - reductions[::-1].index(stride) for stride in (4, 8, 16, 32)]
        else:
            raise ValueError(
                f"backbone: found {TIMM}{name} with features at strides {reductions or 'unknown'}, expected 4, 8, 16 "
                "and 32, or a ViT with 16"
            )
        finest = self.model.feature_info[self.indices[0]]["module"]
        self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        if norm == "frozen" and freeze_norms(self.model):
            names = [name for name, _ in self.model.named_parameters()]  # in the order of their use
            last = max(i for i, name in enumerate(names) if name.startswith(f"{finest}."))
            for parameter in [*self.model.parameters()][: last + 1]:
                parameter.requires_grad_(False)
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        ours, theirs = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), self.model.pretrained_cfg
        mean, std = (torch.tensor([x, theirs[key]]) for x, key in zip(ours, ("mean", "std"), strict=True))
        self.register_buffer("scale", (std[0] / std[1])[:, None, None], persistent=False)
        self.register_buffer("shift", ((mean[0] - mean[1]) / std[1])[:, None, None], persistent=False)

    def load_pretrained(self) -> None:
        """Load timm's pretrained weights; see ``Backbone.load_imagenet_weights``."""
        try:
            state = create_timm(self.name, pretrained=True).state_dict()
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"pretrained weights of {TIMM}{self.name} could not be loaded ({str(error).splitlines()[0]}). Give a "
                "file of them as --model.backbone_weights, or train from random weights with --model.backbone_weights "
                "none --model.network.backbone_norm batch."
            ) from error
        own = self.model.state_dict()
        self.model.load_state_dict({name: state[name] for name in own})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See Backbone; the images are normalized anew as the model's pretrained weights expect."""
        height, width = images.shape[-2:]
        images = images * self.scale + self.shift
        images = F.pad(images, (0, -width % 32, 0, -height % 32))  # most models drop pixels that do not fill a cell
        features = self.model.forward_intermediates(
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        result = {}
        for i, stride in enumerate((4, 8, 16, 32)):
            x = features[i]
            if self.is_plain:
                x = F.interpolate(x, scale_factor=16 / stride, mode="bilinear")
            result[f"C{i + 2}"] = x[:, :, : -(-height // stride), : -(-width // stride)]
        return result


def create_timm(name: str, pretrained: bool) -> Any:
    """A model of timm that takes images of any size.

    Raises:
        ValueError: timm is not installed, or has no such model.
    """
    if find_spec("timm") is None:
        raise ValueError(f"backbone: found {TIMM}{name}, which needs timm, not installed here; pip install timm")
    import timm

    known = timm.list_pretrained() if "." in name else timm.list_models()  # a dot is followed by the tag of weights
    if name not in known:  # others may name a folder or a repository of the Hub
        nearest = get_close_matches(name, known, 3)
        raise ValueError(
            f"backbone: found {TIMM}{name}, expected a model of timm {timm.__version__}"
            + (f", such as {', '.join(f'{TIMM}{other}' for other in nearest)}" if nearest else "")
        )
    with suppress(TypeError):  # only models that are made for one size otherwise have that option
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    return timm.create_model(name, pretrained=pretrained, num_classes=0)


def freeze_norms(module: nn.Module) -> bool:
    """Make every batch norm a FrozenBatchNorm, in place.

    Returns:
        Whether there were any.
    """
    found = False
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm(child.num_features, child.eps)
            frozen.act = getattr(child, "act", frozen.act)
            setattr(module, name, frozen)
            found = True
        else:
            found |= freeze_norms(child)
    return found


class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """Batch norm with fixed statistics and weights: x * scale + shift in one step, in the precision of x.

    Scale and shift are derived from the buffers whenever these are loaded.

    Attributes:
        act: applied to the result; timm's norms include their activation.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.act: nn.Module = nn.Identity()
        self.register_buffer("scale", torch.empty(1, num_features, 1, 1), persistent=False)
        self.register_buffer("shift", torch.empty(1, num_features, 1, 1), persistent=False)
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Derive scale and shift from the current buffers."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        self.scale.copy_(scale[:, None, None])
        self.shift.copy_((self.bias - self.running_mean * scale)[:, None, None])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fold()

    def forward(self, x: Tensor) -> Tensor:
        """(X, C, H, W) to the same shape and dtype."""
        y: Tensor = self.act(torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype)))
        return y


class SmallResNet(nn.Module):
    """A ResNet of four basic blocks (He et al.), 32 to 256 channels wide, under a stem of two 3x3 convolutions.

    Args:
        norm_layer: builds a normalization from a number of channels.
        width: channels of the stem and the first block.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(self._halving(3, width, norm_layer), self._halving(width, width, norm_layer))
        self.layer1 = self._block(width, width, norm_layer)
        self.layer2 = self._block(width, 2 * width, norm_layer)
        self.layer3 = self._block(2 * width, 4 * width, norm_layer)
        self.layer4 = self._block(4 * width, 8 * width, norm_layer)

    @staticmethod
    def _halving(inputs: int, outputs: int, norm_layer: Callable[..., nn.Module]) -> nn.Sequential:
        """A 3x3 convolution that halves the resolution, norm and ReLU."""
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(conv, norm_layer(outputs), nn.ReLU(inplace=True))

    @staticmethod
    def _block(inputs: int, outputs: int, norm_layer: Callable[..., nn.Module]) -> nn.Module:
        """A basic block; it halves the resolution if it has more outputs than inputs."""
        if inputs == outputs:
            return cast("nn.Module", BasicBlock(inputs, outputs, norm_layer=norm_layer))
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), norm_layer(outputs))
        return cast("nn.Module", BasicBlock(inputs, outputs, 2, shortcut, norm_layer=norm_layer))

    def forward(self, images: Tensor) -> Tensor:
        """(X, 3, H, W) images to C5; a feature extractor reads the earlier stages."""
        x: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        return x
