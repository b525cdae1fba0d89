"""The backbone: any torchvision ResNet or Swin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["frozen", "batch"]

RESNET_NODES = {"layer1": "C2", "layer2": "C3", "layer3": "C4", "layer4": "C5"}
SWIN_NODES = {"features.1": "C2", "features.3": "C3", "features.5": "C4", "features.7": "C5"}


class Backbone(nn.Module):
    """Feature maps C2 to C5 at strides 4, 8, 16 and 32.

    Args:
        name: a torchvision ResNet or Swin, for instance ``resnet50``, ``resnet101``, ``swin_t``; or ``small``, a narrow
            ResNet for experiments from random weights (see SmallResNet).
        norm: for a ResNet. ``frozen``, for pretrained weights, as in DETR: batch norm is a fixed affine map, and the
            stem and first stage are not trained. ``batch``, for random weights: ordinary batch norm, and everything is
            trained. A Swin has layer norm, is trained throughout and ignores this.

    Attributes:
        channels: channels of C2, C3, C4, C5.
        is_frozen: whether batch norms are fixed, so that images do not affect each other.

    Raises:
        ValueError: torchvision has no such ResNet or Swin.
    """

    def __init__(self, name: str = "resnet50", norm: Norm = "frozen") -> None:
        super().__init__()
        self.name = name
        self._is_swin = name.startswith("swin")
        norm_layer = FrozenBatchNorm if norm == "frozen" else nn.BatchNorm2d
        if self._is_swin and name in models.list_models(models):
            self.body = create_feature_extractor(models.get_model(name, weights=None), SWIN_NODES)
        elif name == "small":
            self.body = create_feature_extractor(SmallResNet(norm_layer), RESNET_NODES)
        elif name.startswith(("resnet", "resnext", "wide_resnet")) and name in models.list_models(models):
            resnet = models.get_model(name, weights=None, norm_layer=norm_layer)
            self.body = create_feature_extractor(resnet, RESNET_NODES)
            if norm == "frozen":
                for stage in (self.body.conv1, self.body.layer1):
                    stage.requires_grad_(False)
        else:
            known = [
                n for n in models.list_models(models) if n.startswith(("resnet", "resnext", "wide_resnet", "swin"))
            ]
            raise ValueError(f"backbone: found {name!r}, expected small or one of {', '.join(known)}")
        self.is_frozen = norm == "frozen" and not self._is_swin
        self.body.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs and on tensor cores
        self.channels = self._count_channels()

    @torch.no_grad()
    def _count_channels(self) -> tuple[int, ...]:
        training = self.training
        self.eval()
        channels = tuple(feature.shape[1] for feature in self(torch.zeros(1, 3, 64, 64)))
        self.train(training)
        return channels

    def load_imagenet_weights(self, progress: bool = True) -> None:
        """Load torchvision's first ImageNet weights (``IMAGENET1K_V1``), downloading them if they are not cached.

        Raises:
            RuntimeError: they could not be loaded.
        """
        try:
            weights = models.get_model_weights(self.name)["IMAGENET1K_V1"]
            state = weights.get_state_dict(progress=progress, check_hash=True)
        except (OSError, ValueError, KeyError) as error:
            raise RuntimeError(
                f"ImageNet weights of {self.name} could not be loaded ({error}). Put the file that torchvision names "
                f"into {torch.hub.get_dir()}/checkpoints, or train from random weights with "
                "--model.backbone_weights none --model.network.backbone_norm batch."
            ) from error
        missing, _ = self.body.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing:
            raise RuntimeError(f"ImageNet weights of {self.name} lack {', '.join(missing)}")

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


class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """Batch norm with fixed statistics and weights: x * scale + shift in one step, in the precision of x.

    Scale and shift are derived from the buffers whenever these are loaded.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
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
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


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
